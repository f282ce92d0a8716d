"""GGUF files, for llama.cpp and Ollama: made by the converter of a llama.cpp checkout, which runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import BackendError, ConfigError, did_you_mean
from ..redaction import redact_text
from ..text import one_line, plain
from .saved_model import MODEL_CONFIG

__all__ = [
    "CHECKOUT",
    "TYPES",
    "Converter",
]

CHECKOUT = "FINETUNE_NB_LLAMA_CPP"
"""The environment variable that names a checkout of llama.cpp."""
TYPES = ("f32", "f16", "bf16", "q8_0")
"""How the weights are stored: as numbers of 32 or 16 bits, or in blocks of 8 bits."""
SCRIPT = "convert_hf_to_gguf.py"
RECIPE = (
    'git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install "finetune_nb[gguf]", then '
    f"run.save_model(..., llama_cpp='llama.cpp'), or the checkout's folder in {CHECKOUT}"
)


class Converter:
    """The converter of a llama.cpp checkout.

    Args:
        outtype: How the weights are stored, one of `TYPES`.
        checkout: The checkout's folder. Default: what FINETUNE_NB_LLAMA_CPP names.

    Raises:
        ConfigError: There is no such type, or no checkout.
    """

    def __init__(self, outtype: str, checkout: str | os.PathLike[str] | None = None) -> None:
        if outtype not in TYPES:
            raise ConfigError(
                f"gguf is {outtype!r}. {did_you_mean(outtype, TYPES)} For fewer bits, save with gguf='f16' and run llama.cpp's "
                "llama-quantize on the file."
            )
        named = os.fspath(checkout) if checkout is not None else os.environ.get(CHECKOUT)
        if not named:
            raise ConfigError(
                f"gguf is {outtype!r}, and no checkout of llama.cpp is named, whose {SCRIPT} writes such files. Make one: "
                f"{RECIPE}."
            )
        self.script = Path(named).expanduser().absolute() / SCRIPT
        if not self.script.is_file():
            raise ConfigError(
                f"{self.script.parent} has no {SCRIPT}. Expected a checkout of llama.cpp ({CHECKOUT}, or llama_cpp=). Make one: "
                f"{RECIPE}."
            )
        self.outtype = outtype

    def check(self, directory: Path, so_far: str = "Nothing was saved.") -> None:
        """Asks the converter whether it knows a model, by its config and its tokenizer alone.

        Args:
            directory: Holds them; weights are not needed.
            so_far: A sentence for errors: what has been done until now.

        Raises:
            ConfigError: It is an adapter alone, it comes with code, or llama.cpp knows no such architecture or tokenizer.
            BackendError: The converter cannot run.
        """
        if not (directory / MODEL_CONFIG).is_file():
            raise ConfigError(
                f"gguf= takes a whole model, and this is an adapter alone. {so_far} Save with merge=True, too."
            )
        for path in sorted(directory.glob("*.json")):
            # The converter would run it.
            if _names_code(path):
                raise ConfigError(
                    f"the model's {path.name} names code that comes with it (auto_map), which the converter of llama.cpp would "
                    "run. Expected a model of transformers' own. Save without gguf=."
                )
        with tempfile.TemporaryDirectory() as folder:
            output = self._run(directory, Path(folder) / "vocabulary.gguf", "--vocab-only")
        if output is not None:
            raise ConfigError(
                f"llama.cpp cannot hold this model: {output} Expected an architecture and a tokenizer that its {SCRIPT} knows (a "
                f"newer checkout knows more). {so_far} Save without gguf=."
            )

    def convert(self, directory: Path, files: Sequence[str], name: str) -> Path:
        """Writes a saved model as GGUF, into its folder.

        Args:
            directory: The model's folder.
            files: The model's files there.
            name: Of the GGUF. An older one is replaced when the new one is complete.

        Returns:
            The file.

        Raises:
            BackendError: It cannot be written. What had the name is then as it was.
        """
        place, unfinished = directory / name, directory.absolute() / f".{name}.unfinished"
        try:
            with tempfile.TemporaryDirectory() as folder:
                # The converter takes what it finds, such as the tokenizer.model of an older model.
                for file in files:
                    (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
                    (Path(folder) / file).symlink_to(directory.absolute() / file)
                options = ("--outtype", self.outtype, "--model-name", directory.absolute().name)
                output = self._run(Path(folder), unfinished, *options)
            if output is None and not unfinished.is_file():
                output = f"it ended without an error, and {unfinished.name} is not there."
            if output is not None:
                raise BackendError(
                    f"the model is saved in {directory}, but not as GGUF: {output} Expected {name} from {self.script}. Make the "
                    "same call again once that is mended, or run the script yourself."
                )
            os.replace(unfinished, place)
        finally:
            with suppress(FileNotFoundError):
                unfinished.unlink()
        return place

    def _run(self, directory: Path, out: Path, *options: str) -> str | None:
        """Runs the script; None, or what it said when it failed. Raises BackendError where it cannot run."""
        command: Sequence[str | Path] = [sys.executable, self.script, directory, "--outfile", out, *options]
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        # A model that is here takes nothing from the hub.
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        try:
            ended = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise BackendError(
                f"{self.script} cannot be run: {error}. Expected a Python at {sys.executable}."
            ) from error
        if ended.returncode == 0:
            return None
        lines = [line for line in ended.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
        last = one_line(redact_text(plain(lines[-1] if lines else f"exit status {ended.returncode}")), 500)
        if "ModuleNotFoundError" in last or "ImportError" in last:
            raise BackendError(
                f'{self.script} needs a package that is not installed: {last}. pip install "finetune_nb[gguf]", or what the '
                "requirements of the checkout name."
            )
        return last.rstrip(".") + "."


def _names_code(path: Path) -> bool:
    """Whether a config says which Python files belong to the model."""
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(settings, dict) and bool(settings.get("auto_map"))
