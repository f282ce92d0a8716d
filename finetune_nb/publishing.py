"""Directories that are complete or are not there: written beside under another name, made durable, then renamed.
Also what their reader needs: plain files only, and their seals. What the files mean is the business of others.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from .errors import BackendError
from .redaction import redacting_logger

__all__ = ["Seal", "file_in", "published", "seal"]

logger = redacting_logger(__name__)


class Seal(BaseModel):
    """By which a file is known to be what was written. It finds damage; it does not keep out a forger."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str


def seal(path: Path) -> Seal:
    """The seal of a file as it is now; reads all of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Seal(bytes=file.tell(), sha256=digest)


def file_in(directory: Path, name: str) -> Path:
    """The plain file of that name. Raises BackendError where there is none: a link is not followed."""
    path = directory / name
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise BackendError(
            f"{path} cannot be read: {error.strerror}. Expected a checkpoint, with {name} in it. Load another one."
        ) from error
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a file"
        raise BackendError(f"{path} is {kind}; expected a plain file, as a checkpoint is written. Load another one.")
    return path


@contextmanager
def published(directory: Path, mark: str) -> Iterator[Path]:
    """An empty directory to write files into, which becomes `directory` when the block ends without an error.

    mark: a file that all such directories hold; an older one that holds it is replaced, and anything else that has the
    name is refused. Raises BackendError for that, and in place of an OSError in the block or after it; what had the
    name before then has it still, and nothing else is left behind. After a crash at any moment the name stands for
    the old, for the new, or (between two renames) for nothing.
    """
    if directory.is_symlink() or (directory.exists() and not _is_replaceable(directory, mark)):
        raise BackendError(
            f"{directory} exists and is not a checkpoint (it has no {mark}), so it is not replaced. "
            "Expected a new directory, or an older checkpoint."
        )
    parent = directory.parent
    unfinished, replaced = parent / f".{directory.name}.unfinished", parent / f".{directory.name}.replaced"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)  # what a crash left
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.iterdir():
            _sync(path)
        _sync(unfinished)
        _rename(unfinished, directory, replaced)
    except OSError as error:
        raise BackendError(
            f"checkpoint {directory} could not be written: {error}. {_free(parent)}Nothing of it is left; a checkpoint "
            "that had the name before still has it. Make room or make it writable, then save again."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_replaceable(directory: Path, mark: str) -> bool:
    return directory.is_dir() and ((directory / mark).is_file() or not any(directory.iterdir()))


def _rename(unfinished: Path, directory: Path, replaced: Path) -> None:
    if directory.exists():
        _remove(replaced)
        directory.rename(replaced)
        try:
            unfinished.rename(directory)
        except OSError:
            replaced.rename(directory)
            raise
    else:
        unfinished.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        _sync(directory.parent)
    except OSError as error:  # it is there, and whole; only a power cut could still take it back
        logger.warning("the name of %s may not outlive a power cut: %s", directory, error)


def _sync(path: Path) -> None:
    """Returns once the file, or the directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _free(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free / 1e6:,.1f} MB are free there. "
    except OSError:
        return ""
