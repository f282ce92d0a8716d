"""What was saved: where it is, how large it is, and the lines that load it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError
from ..redaction import error_text
from ..store.durable import plain_file
from ..text import plain
from ..views.html import element, facts_table, title, view

__all__ = [
    "ADAPTER_CONFIG",
    "MODEL_CONFIG",
    "SavedModel",
    "saved_model",
]

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""What a vLLM server can be told of the highest rank of its adapters; the first is its default."""


@dataclass(frozen=True, repr=False)
class SavedModel(os.PathLike[str]):
    """A model that was saved. It can be used as the path of its folder."""

    path: Path
    """The folder."""
    files: tuple[str, ...]
    """What was written there."""
    base: str | None = None
    """The model that an adapter belongs to; None for a whole model."""
    rank: int | None = None
    """Of an adapter."""
    gguf: Path | None = None
    """The file for llama.cpp and Ollama, where it was asked for."""
    url: str | None = None
    """Where it is on the hub, if it was pushed."""
    notes: tuple[str, ...] = ()
    """What could not be taken over, in sentences."""

    @property
    def bytes(self) -> int:
        """The size of all that was written."""
        return sum((self.path / name).stat().st_size for name in self.files)

    @property
    def transformers(self) -> str:
        """The Python that loads it with transformers (an adapter also takes peft)."""
        place = repr(self._place)
        return (
            f"model, tokenizer = AutoModelForCausalLM.from_pretrained({place}), AutoTokenizer.from_pretrained({place})"
        )

    @property
    def vllm(self) -> str:
        """The command that serves it with vLLM; an adapter on its base model, under the name of its folder."""
        if self.base is None:
            return f"vllm serve {shlex.quote(self._place)}"
        # "=" parts the name from the path.
        name = re.sub(r"[\s=]+", "-", self.path.absolute().name) or "adapter"
        command = (
            f"vllm serve {shlex.quote(self.base)} --enable-lora --lora-modules {shlex.quote(f'{name}={self._place}')}"
        )
        if self.rank is not None and self.rank > VLLM_RANKS[0]:
            command += f" --max-lora-rank {next((most for most in VLLM_RANKS if most >= self.rank), self.rank)}"
        return command

    @property
    def ollama(self) -> str | None:
        """The command that gives it to Ollama; None without a GGUF."""
        if self.gguf is None:
            return None
        name = re.sub(r"[^a-z0-9._-]+", "-", self.path.absolute().name.lower()).strip("-._") or "model"
        return f"ollama create {name} -f {shlex.quote(os.path.join(self._place, 'Modelfile'))}"

    @property
    def _place(self) -> str:
        """The folder, for whoever runs a line in another one."""
        return str(self.path.absolute())

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:
        return self.path / name

    if not TYPE_CHECKING:  # a path until now: whatever a path can do is still there

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return getattr(self.path, name)

    def _facts(self) -> list[tuple[str, str | None]]:
        kind = "the whole model" if self.base is None else f"an adapter of {self.base}"
        return [
            ("where", str(self.path)),
            ("what", f"{kind}, {self.bytes / 1e6:,.1f} MB"),
            ("on the hub", self.url),
        ]

    def _lines(self) -> list[tuple[str, str | None]]:
        return [("transformers", self.transformers), ("vLLM", self.vllm), ("Ollama", self.ollama)]

    def __repr__(self) -> str:
        told = [*self._facts(), *self._lines(), *(("note", note) for note in self.notes)]
        return plain("\n".join(f"{name + ':':14}{value}" for name, value in told if value))

    def _repr_html_(self) -> str:
        rows: list[tuple[str, Any]] = list(self._facts())
        rows += [(name, line and element("code", line)) for name, line in self._lines()]
        rows += [("note", note) for note in self.notes]
        return view(title("saved model", self.path.absolute().name), facts_table(rows))


def saved_model(path: Path, files: Sequence[str]) -> SavedModel:
    """What was saved to a folder.

    Args:
        path: The folder.
        files: What was written there.

    Returns:
        The model, or the adapter with the base model that it names.

    Raises:
        BackendError: The adapter's config cannot be read.
    """
    if (path / MODEL_CONFIG).is_file() or not (path / ADAPTER_CONFIG).is_file():
        return SavedModel(path, tuple(files))
    try:
        config = json.loads(plain_file(path, ADAPTER_CONFIG).read_bytes())
        base, rank = config["base_model_name_or_path"], config.get("r")
        if not isinstance(base, str):
            raise TypeError(f"base_model_name_or_path is {base!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BackendError(
            f"{path / ADAPTER_CONFIG} names no base model: {error_text(error)}. Expected an adapter in PEFT's format."
        ) from error
    return SavedModel(path, tuple(files), base, rank if isinstance(rank, int) else None)
