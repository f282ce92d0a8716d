"""Saves a model, and then what was asked for beside it: a GGUF with a Modelfile, and a push to the hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import BackendError
from ..llms.chat_templates.template import ChatTemplate
from ..llms.chat_tokenizer import load_tokenizer
from ..types import SamplingParams
from .card import Training, model_card, public_name
from .gguf import Converter
from .hub import CARD, push, write_card
from .modelfile import modelfile
from .saved_model import SavedModel, saved_model

__all__ = [
    "Extras",
    "save",
]

_OF_A_MODEL = re.compile(r".+\.(safetensors|bin|json|jinja|txt|model|tiktoken)")
"""Names of the files that a model is made of."""
MODELFILE, OURS = "Modelfile", "# written by finetune_nb"


@dataclass(frozen=True)
class Extras:
    """What is asked for beside the saved model."""

    push_to_hub: str | None = None
    private: bool | None = None
    gguf: str | None = None
    llama_cpp: str | Path | None = None


def save(
    write: Callable[[], Path],
    describe: Callable[[Path], bool],
    directory: Path,
    extras: Extras,
    training: Callable[[], Training],
    sampling: SamplingParams | None,
) -> SavedModel:
    """Save a model, and what was asked for beside it.

    Args:
        write: Writes the model; returns where.
        describe: Writes what it would write but for the weights, into an empty folder; False where that is not known.
        directory: Where the model is going to be.
        extras: What is asked for.
        training: What the model card says of the training.
        sampling: How the model was sampled; None: not known.

    Returns:
        What was saved.

    Raises:
        BackendError: Something cannot be written, converted or pushed. What was done before that is on the disk, and the error
            says so.
        ConfigError: The GGUF cannot be made. Nothing was saved then, if that can be known before.
        MissingExtra: A package is missing.
    """
    converter = None if extras.gguf is None else Converter(extras.gguf, extras.llama_cpp)
    is_checked = False
    if converter is not None:
        with tempfile.TemporaryDirectory() as folder:
            is_checked = describe(Path(folder))
            if is_checked:
                converter.check(Path(folder))
    before = _stamps(directory)
    directory = write()
    files = sorted(name for name, stamp in _stamps(directory).items() if before.get(name) != stamp)
    saved = saved_model(directory, files)
    if converter is not None:
        if not is_checked:
            converter.check(directory, f"The model is saved in {directory}.")
        saved = _with_gguf(saved, converter, sampling)
    if extras.push_to_hub is not None:
        saved = _pushed(saved, extras.push_to_hub, extras.private, training())
    return saved


def _stamps(directory: Path) -> dict[str, tuple[int, int]]:
    """A model's files in a folder, each with what differs once it is written anew."""
    found = {}
    for path in directory.rglob("*") if directory.is_dir() else ():
        name = path.relative_to(directory).as_posix()
        if _OF_A_MODEL.fullmatch(path.name) and not name.startswith(".") and path.is_file() and not path.is_symlink():
            found[name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def _with_gguf(saved: SavedModel, converter: Converter, sampling: SamplingParams | None) -> SavedModel:
    gguf = converter.convert(saved.path, saved.files, f"model-{converter.outtype}.gguf")
    tokenizer, end_ids = load_tokenizer(str(saved.path))
    ends = [tokenizer.decode([token]) for token in end_ids]
    template = ChatTemplate(tokenizer, end_ids, saved.path.name)
    if template.source and template.missing_end is not None:
        ends.append(template.missing_end[1])
    text, notes = modelfile(gguf.name, tokenizer, ends, sampling)
    files = (*saved.files, gguf.name)
    place = saved.path / MODELFILE
    if place.is_symlink() or (place.exists() and OURS not in place.read_text(encoding="utf-8", errors="replace")):
        notes.append(f"{place} is not one of ours, so it stays as it is: see that it says FROM ./{gguf.name}.")
    else:
        place.write_text(f"{OURS}\n{text}", encoding="utf-8")
        files = (*files, MODELFILE)
    return replace(saved, gguf=gguf, files=files, notes=(*saved.notes, *notes))


def _pushed(saved: SavedModel, repository: str, private: bool | None, training: Training) -> SavedModel:
    is_adapter = saved.base is not None
    if is_adapter and public_name(saved.base) is None:
        raise BackendError(
            f"the adapter is saved in {saved.path}. It was not pushed: its base model, {saved.base!r}, is a folder of this "
            "machine, and expected is one that others can load, too. Make the call again with merge=True, or train on the model "
            "by its name on the hub."
        )
    write_card(saved.path, model_card(training, is_adapter, saved.base))
    saved = replace(saved, files=(*saved.files, CARD))
    return replace(saved, url=push(saved.path, saved.files, repository, private))
