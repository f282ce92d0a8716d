"""Files and directories that are complete or are not there: written under another name, made durable, then renamed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from ..errors import BackendError, FinetuneError, StoreError
from ..redaction import error_text, redacting_logger

__all__ = [
    "FileDigest",
    "append_line",
    "check_inside",
    "check_plain",
    "check_tree",
    "plain_file",
    "atomic_directory",
    "digest_of",
    "machine_id",
    "model_directory",
    "remove_inside",
    "size_of",
    "sync_folder",
    "write_durably",
]
_TEMPORARY = ".tmp-"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def check_plain(*paths: Path) -> None:
    """Raises StoreError for a path that is there but is neither a file nor a folder: a link (which may lead anywhere),
    or a pipe (which would be waited for)."""
    for path in paths:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StoreError(f"{path} cannot be looked at: {error}.") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
            raise StoreError(
                f"{path} is {kind}; a run's folder holds plain files only, and nothing outside it is touched. "
                "Put the file itself there."
            )


def check_inside(folder: Path, *paths: Path) -> None:
    """Refuse to leave a folder: every path must lie in it, with nothing but plain folders on the way.

    Args:
        folder: The folder, which may itself be reached through links.
        *paths: Places in it, there or not.

    Raises:
        StoreError: A path is not in the folder, or it, or a folder on the way to it, is a link or a special file.
    """
    for path in paths:
        parts = path.relative_to(folder).parts if path.is_relative_to(folder) else ("..",)
        if ".." in parts:
            raise StoreError(f"{path} is not inside {folder}; nothing outside a run's folder is touched.")
        place = folder
        for part in parts:
            place = place / part
            check_plain(place)


def check_tree(folder: Path, directory: Path) -> None:
    """The same for a directory in the folder and for all that lies in it.

    Args:
        folder: The folder, which may itself be reached through links.
        directory: A directory in it.

    Raises:
        StoreError: As `check_inside`.
    """
    check_inside(folder, directory)
    for root, folders, files in os.walk(directory):
        for name in (*folders, *files):
            check_plain(Path(root) / name)


def remove_inside(folder: Path, path: Path) -> None:
    """Delete a file, a link or a directory in a folder. A link is deleted itself; what it leads to is never touched.

    Args:
        folder: The folder, which may itself be reached through links.
        path: A place in it. Where nothing is there, nothing is done.

    Raises:
        StoreError: The way to the path leaves the folder, through a link for example.
        OSError: It cannot be deleted, or not all of it.
    """
    if path == folder:
        raise StoreError(f"{path} is the folder itself; expected a place inside it.")
    check_inside(folder, path.parent)
    try:
        is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_directory:
        os.unlink(path)
        return
    shutil.rmtree(path, ignore_errors=True)  # as much as can be; the links in it are not followed
    if os.path.lexists(path):
        raise OSError(f"{path} could not be deleted whole")


def write_durably(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with a new file that then takes the place of `path`. At every moment `path` is the old file or the
    whole new one, and after the return it survives a power failure. Raises OSError; `path` is then as it was."""
    check_plain(path.parent, path)
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}-{machine_id()}")
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _BINARY, 0o666)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def machine_id() -> str:
    """Eight hexadecimal digits that are the same for all processes that can ask for each other by their ids.

    Process ids mean nothing on another host, in another container of this one, or after a reboot, and a folder may be shared
    with all of these.
    """
    known = [socket.gethostname()]
    with suppress(OSError):  # only Linux has these
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def sync_folder(folder: Path) -> None:
    """Makes a rename last. Where the system cannot open a folder (Windows), its own journal does that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone meanwhile
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def append_line(path: Path, line: str) -> None:
    """Appends a line in one write, so that lines of several processes do not mix. Raises OSError."""
    check_plain(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_LINK | _BINARY, 0o666)
    try:
        end = os.fstat(descriptor).st_size
        # A line that a crash or a full disk cut off must not swallow this one.
        torn = end > 0 and os.lseek(descriptor, end - 1, os.SEEK_SET) >= 0 and os.read(descriptor, 1) != b"\n"
        data = ("\n" if torn else "").encode() + line.encode("utf-8", "backslashreplace") + b"\n"
        if (written := os.write(descriptor, data)) < len(data):
            raise OSError(f"only {written} of {len(data)} bytes were written")
    finally:
        os.close(descriptor)


logger = redacting_logger(__name__)


class FileDigest(BaseModel):
    """By which a file is known to be what was written. It finds damage; it does not keep out a forger."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str


def digest_of(path: Path) -> FileDigest:
    """The size and the digest of a file as it is now; reads all of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(bytes=file.tell(), sha256=digest)


def plain_file(directory: Path, name: str) -> Path:
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
def atomic_directory(directory: Path, mark: str) -> Iterator[Path]:
    """An empty directory to write files into, which becomes `directory` when the block ends without an error.

    mark: a file that all such directories hold; an older one that holds it is replaced, and anything else that has the
    name is refused. Raises BackendError for that, and in place of an OSError in the block or after it; what had the
    name before then has it still, and nothing else is left. After a crash at any moment the name refers to
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


@contextmanager
def model_directory(directory: Path) -> Iterator[Path]:
    """Give an empty directory to write a model into; its files come to `directory` when all of them are written.

    A new directory appears at once, with everything in it. In one that is there already, the files of an older model are
    replaced one by one, which takes no space on the disk any more; other files in it stay.

    Args:
        directory: Where the model goes.

    Yields:
        The directory to write into.

    Raises:
        BackendError: Anything went wrong until the last file was written, such as a full disk. What was in `directory` is then
            as it was, and nothing else is left.
    """
    is_new = not directory.exists()
    unfinished = directory / UNFINISHED_MODEL if not is_new else directory.parent / f".{directory.name}.unfinished"
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)  # what a crash left
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.rglob("*"):
            _sync(path)
        _sync(unfinished)
        if is_new:
            unfinished.rename(directory)
            sync_folder(directory.parent)
        else:
            _move_files(unfinished, directory)
    except FinetuneError:
        raise
    except Exception as error:  # libraries that write models have errors of their own for a full disk
        raise BackendError(
            f"the model could not be written to {directory}: {error_text(error)}. {_free(directory.parent)}Expected a folder "
            "that can be written, with room for the whole model. What was there before is as it was, and nothing of the new "
            "model is left. Make room, or choose another folder, then save again."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


UNFINISHED_MODEL = ".unfinished"
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def _move_files(unfinished: Path, directory: Path) -> None:
    """Puts the files of a model in the place of an older one's. Weights come first: a config without them looks whole."""
    names = sorted(path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file())
    for name in names:
        if (directory / name).is_dir():
            raise IsADirectoryError(f"{directory / name} is a folder, and a file of the model has that name")
    for name in sorted(names, key=lambda name: _WEIGHTS.fullmatch(name.name) is None):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished / name, directory / name)

    # Weights of the older model that are cut into other files would be read in place of the new ones, and an older adapter
    # would be added to them.
    written = {match[1] for name in names if (match := _WEIGHTS.fullmatch(name.name))}
    adapter_is_old = bool(written) and "adapter_model" not in written
    for path in directory.iterdir():
        match = _WEIGHTS.fullmatch(path.name)
        of_adapter = path.name == _ADAPTER_CONFIG or (match is not None and match[1] == "adapter_model")
        in_other_files = match is not None and match[1] in written
        if (in_other_files or (of_adapter and adapter_is_old)) and Path(path.name) not in names and path.is_file():
            path.unlink()
    sync_folder(directory)


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
