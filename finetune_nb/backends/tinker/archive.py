"""An adapter that a service trained, brought home: its archive unpacked, its config completed, and both compared with what the
service sampled.

An archive comes from somebody else. Two files are read from it, as bytes, and nothing else of it reaches the disk.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import BackendError, ConfigError, MissingExtra
from ...redaction import redacting_logger
from ...store.durable import model_directory
from ...types import Sample

__all__ = ["LARGEST_ARCHIVE", "bring_home", "unpack"]

logger = redacting_logger(__name__)

LARGEST_ARCHIVE = 64_000_000_000
"""Bytes, packed and unpacked: more than an adapter of rank 128 to a model of a trillion parameters."""
LARGEST_CONFIG = 1_000_000
MEMBERS = 1000
"""In an archive; ours have three."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.\w+)?(?:\.weight)?")


def bring_home(
    directory: Path,
    fetch: Callable[[Path, int], Any],
    base: str,
    tokenizer: Any,
    replies: Sequence[tuple[Sequence[int], Sample]],
    limit: float,
    *,
    merge: bool = False,
    dtype: str | None = None,
    prove: bool | None = None,
) -> Path:
    """Writes an adapter, or with `merge` its whole model, and the tokenizer to `directory`.

    Args:
        directory: Where to. An older model there is replaced.
        fetch: Writes the archive to a path, if it has at most so many bytes.
        base: The base model on this machine, a directory or a name in Hugging Face's cache.
        tokenizer: The model's.
        replies: Prompts and replies that the adapter sampled at temperature 1.
        limit: Mean |log probability computed here - told by the service|, in nats a token, beyond which it is not the model.
        merge: Adds the adapter to the base model's weights.
        dtype: Of the merged weights. Default: the one that the base model is stored in.
        prove: Whether the log probabilities of the replies are computed here. None: where the base model is here.

    Returns:
        The directory.

    Raises:
        BackendError: The archive is damaged or of something else, the model is not the one that sampled, or it cannot be written.
        ConfigError: `merge` or `prove`, and the base model is not on this machine.
        MissingExtra: They take torch and peft.
    """
    if not merge and (directory / "config.json").exists():
        raise BackendError(
            f"{directory} holds a whole model, beside which from_pretrained would take the adapter for its. Choose another "
            "folder, or save with merge=True."
        )
    with model_directory(directory) as unfinished:
        work = unfinished / ".work"
        work.mkdir()
        archive, adapter = work / "archive", work / "adapter"
        adapter.mkdir()
        fetch(archive, LARGEST_ARCHIVE)
        unpack(archive, adapter, base)
        archive.unlink()
        if merge or prove is not False:
            model = _load_base(base, required=merge or bool(prove))
            if model is not None:
                model = _with_adapter(model, adapter)
                if prove is not False:
                    _prove(model, replies, limit)
                if merge:
                    _write_whole(model, unfinished, dtype)
        if not merge:
            for name in (WEIGHTS, CONFIG):
                shutil.move(adapter / name, unfinished / name)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(work)
    return directory


def unpack(archive: Path, directory: Path, base: str) -> None:
    """Writes weights and config of an adapter, whose base model has that name, from an archive to `directory`. Raises
    BackendError for an archive that is damaged or has links, devices, or paths that lead out of it."""
    found: set[str] = set()
    try:
        with tarfile.open(archive, "r:*") as tar:
            left = LARGEST_ARCHIVE
            for number, member in enumerate(tar):
                parts = Path(member.name.replace("\\", "/")).parts
                if number >= MEMBERS or member.name.startswith("/") or ".." in parts:
                    raise BackendError(
                        f"the archive has an entry {member.name[:200]!r}; expected an adapter's few files"
                    )
                if member.isdir():
                    continue
                if not member.isreg():
                    raise BackendError(
                        f"the archive's {member.name[:200]!r} is a link or a special file; expected plain files"
                    )
                left -= member.size
                name = parts[-1] if parts else ""
                if left < 0 or (name == CONFIG and member.size > LARGEST_CONFIG):
                    raise BackendError(
                        f"the archive's {member.name[:200]!r} has {member.size:,} bytes, which is too large"
                    )
                if name not in (WEIGHTS, CONFIG):
                    continue
                if name in found:
                    raise BackendError(f"the archive has more than one {name}; expected the files of one adapter")
                found.add(name)
                content = tar.extractfile(member)
                assert content is not None  # of a plain file
                with content, (directory / name).open("xb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise BackendError(f"the archive of the adapter cannot be read: {type(error).__name__}: {error}") from error
    missing = {WEIGHTS, CONFIG} - found
    if missing:
        raise BackendError(
            f"the archive has no {' and no '.join(sorted(missing))}; expected an adapter in PEFT's format"
        )
    _complete_config(directory, base)


def _complete_config(directory: Path, base: str) -> None:
    """Writes an adapter_config.json that says what the weights are. SkyRL names no layers in its own, and PEFT then loads
    two of seven kinds, without a word."""
    try:
        said = json.loads((directory / CONFIG).read_bytes())
        alpha = said["lora_alpha"]
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"lora_alpha is {alpha!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise BackendError(
            f"the archive's {CONFIG} is not one of a LoRA adapter: {type(error).__name__}: {error}"
        ) from error
    layers, ranks = _layers(directory / WEIGHTS)
    if not layers or len(ranks) != 1:
        raise BackendError(
            f"the archive's weights have {len(layers)} kinds of layers with ranks {sorted(ranks)}; expected a LoRA adapter of "
            "one rank"
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "target_modules": layers,
        "use_rslora": said.get("use_rslora") is True,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _layers(weights: Path) -> tuple[list[str], set[int]]:
    """The kinds of layers that an adapter's weights are for, and the ranks of their matrices."""
    import safetensors

    layers, ranks = set(), set()
    try:
        with safetensors.safe_open(weights, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                found, shape = LORA.fullmatch(name), file.get_slice(name).get_shape()
                if found is None:
                    raise BackendError(
                        f"the archive's weights have a tensor {name[:200]!r}; expected those of a LoRA adapter"
                    )
                layers.add(found[1].rsplit(".", 1)[-1])
                if len(shape) == 2:
                    ranks.add(int(shape[0] if found[2] == "A" else shape[1]))
    except safetensors.SafetensorError as error:
        raise BackendError(f"the archive's {WEIGHTS} cannot be read: {error}") from error
    return sorted(layers), ranks


def _load_base(base: str, required: bool) -> Any:
    """The base model, in the dtype that it is stored in; None where it is not here and not required."""
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        if required:
            raise MissingExtra("comparing or merging an adapter", "local") from error
        logger.warning("the adapter is saved, but not compared with what was sampled: that takes torch and peft")
        return None
    from ..local.models import no_progress_bars

    try:
        with no_progress_bars():
            return AutoModelForCausalLM.from_pretrained(base, local_files_only=True, use_safetensors=True, dtype="auto")
    except (OSError, ValueError) as error:
        if required:
            raise ConfigError(
                f"the base model {base!r} is not on this machine: {error} Name a copy of it: run.save_model(directory, "
                "base='DIRECTORY'), or base of the trainer adapter. Or save the adapter alone."
            ) from error
        logger.warning(
            "the adapter is saved, but not compared with what was sampled: its base model %r is not on this machine (base)",
            base,
        )
        return None


def _with_adapter(model: Any, adapter: Path) -> Any:
    from ..local.lora import with_saved_adapter

    try:
        return with_saved_adapter(model.eval(), adapter).eval()
    except (RuntimeError, ValueError, KeyError) as error:  # PEFT's, for shapes and layers that do not fit
        raise BackendError(f"the adapter does not fit its base model: {type(error).__name__}: {error}") from error


def _prove(model: Any, replies: Sequence[tuple[Sequence[int], Sample]], limit: float) -> None:
    """Raises BackendError where the model is not the one that sampled the replies."""
    from ..local.scoring import score

    gaps: list[float] = []
    for prompt, sample in replies:
        (found,) = score(model, prompt, sample.ids, (1.0,))
        gaps += [abs(here - told) for here, told in zip(found, sample.logprobs, strict=True)]
    gap = math.fsum(gaps) / len(gaps) if gaps else math.nan
    if not gap <= limit:
        raise BackendError(
            f"the adapter is not what was sampled: its log probabilities of {len(gaps)} recorded tokens differ by {gap:.3g} "
            f"nats a token from those that the service told; expected at most {limit:g} (max_logprob_gap). Is the base model on "
            "this machine the service's? Name it as base, or save with prove=False."
        )
    logger.info("the adapter gives %d recorded tokens their log probabilities within %.2g nats", len(gaps), gap)


def _write_whole(model: Any, directory: Path, dtype: str | None) -> None:
    from ..local import models

    stored = model.dtype if dtype in (None, "auto") else models.chosen_dtype(dtype, "cpu", trains_all=True)
    with models.no_progress_bars():
        models.write(model, directory, stored, True, {})
