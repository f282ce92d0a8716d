"""The files of a run's folder: their names, and the lock of the process that writes.

No symbolic link inside the folder is followed, because a folder may come from somebody else.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path

from ..errors import StoreError
from .durable import _BINARY, _NO_LINK, _TEMPORARY, check_plain, machine_id, remove_inside

__all__ = [
    "ARCHIVE",
    "CHECKPOINTS",
    "CONFIG",
    "DATABASE",
    "LOG",
    "RUN_ID",
    "TRAJECTORIES",
    "WriteLock",
    "checkpoint_folder",
    "checkpoints",
    "free_in_archive",
    "name_to_delete",
    "process_lives",
    "remove_leftovers",
    "remove_temporary",
    "trajectory_file",
    "writer_of",
]

DATABASE = "run.db"
TRAJECTORIES = "trajectories"
CHECKPOINTS = "checkpoints"
CONFIG = "config.yml"
LOG = "log.jsonl"
LOCK = "lock"
ARCHIVE = "archive"
"""The folder, beside the runs, that archived ones are moved to."""

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def trajectory_file(folder: Path, epoch: int) -> Path:
    """Where the trajectories of an epoch lie."""
    return folder / TRAJECTORIES / f"epoch-{epoch:06d}.parquet"


def checkpoint_folder(folder: Path, epoch: int) -> Path:
    """Where the checkpoint lies that was written after an epoch."""
    return folder / CHECKPOINTS / f"epoch-{epoch:06d}"


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder, by epoch. Raises StoreError where `checkpoints` is a link: the directories of
    somebody else are no checkpoints of this run."""
    check_plain(folder / CHECKPOINTS)
    found = sorted((folder / CHECKPOINTS).glob("epoch-[0-9]*"))
    return {int(path.name[6:]): path for path in found if path.name[6:].isdigit() and path.is_dir()}


def free_in_archive(folder: Path, name: str) -> Path:
    """A place of that name in the archive beside a run's folder, with a number where it is taken. Raises StoreError for a
    link in the archive's place, OSError."""
    place, n = folder.parent / ARCHIVE / name, 1
    check_plain(place.parent)
    place.parent.mkdir(exist_ok=True)
    while place.exists():
        n += 1
        place = place.with_name(f"{name}-{n}")
    return place


# ── what a process that died has left ────────────────────────────────────────────────────────────────────────────────

STALE = 3600.0
"""Seconds after which a leftover counts as nobody's, where its name does not name a process of this machine."""

_PROCESS = r"(?P<pid>\d+)(?:-(?P<machine>[0-9a-f]{8}))?"
"""Whose a leftover is. Older releases left the machine out."""
_BEGUN = re.compile(rf"\.(?P<name>.+){re.escape(_TEMPORARY)}{_PROCESS}")
"""What `write_durably` had begun to write."""
_OF_WRITER = re.compile(rf"{re.escape(CONFIG)}|epoch-\d+\.parquet|.*\.jsonl")
"""Files that the writer of a run alone writes."""
_CHECKPOINT = re.compile(r"\.(?P<name>epoch-\d+)\.(?P<kind>unfinished|replaced)")
_DELETED = re.compile(rf"\.deleted-{RUN_ID.pattern}?(?:-pid{_PROCESS})?-[0-9a-f]{{4}}")
_UNTIL = re.compile(rf"\.{RUN_ID.pattern}-until-\d+(?:-\d+)?")
"""A copy of a run for the archive that was not finished."""


def name_to_delete(folder: Path) -> Path:
    """The hidden name that a run gets before its files are deleted. What a crash leaves of it is swept later."""
    return folder.with_name(f".deleted-{folder.name}-pid{os.getpid()}-{machine_id()}-{secrets.token_hex(2)}")


def remove_temporary(folder: Path) -> None:
    """Removes what a writer that died had begun to write into a run's folder. Only the writer who holds the lock may call it.

    A checkpoint that was moved aside to be replaced, and was not, gets its name back.
    """
    for place in (folder, folder / TRAJECTORIES):
        for path, match in _leftovers(place, _BEGUN, folders=False):
            if _OF_WRITER.fullmatch(match["name"]) or _is_stale(path, match):
                _remove(folder, path)
    for path, match in _leftovers(folder / CHECKPOINTS, _CHECKPOINT, folders=True):
        whole = path.with_name(match["name"])
        if match["kind"] == "replaced" and not os.path.lexists(whole):
            with suppress(OSError):
                path.rename(whole)
        else:
            _remove(folder, path)


def remove_leftovers(directory: Path) -> None:
    """Removes what processes that died have left in a directory of runs: runs that were being deleted, copies for the archive
    and files that were not finished. Nothing else is touched, and no link is followed."""
    for path, match in _leftovers(directory, _DELETED, folders=True):
        if _is_stale(path, match):
            _remove(directory, path)
    for path, match in _leftovers(directory, _BEGUN, folders=False):
        if _is_stale(path, match):
            _remove(directory, path)
    for path, _ in _leftovers(directory / ARCHIVE, _UNTIL, folders=True):
        if _is_stale(path):
            _remove(directory, path)


def _leftovers(place: Path, pattern: re.Pattern[str], folders: bool) -> list[tuple[Path, re.Match[str]]]:
    """Plain files, or plain folders, whose whole name has the pattern. Nothing in a place that is a link."""
    found = []
    try:
        if place.name in (TRAJECTORIES, CHECKPOINTS, ARCHIVE):
            check_plain(place)
        with os.scandir(place) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                is_kind = entry.is_dir if folders else entry.is_file
                if match and is_kind(follow_symlinks=False):
                    found.append((place / entry.name, match))
    except (OSError, StoreError):  # there is no such place, or it is not to be touched
        return found
    return found


def _is_stale(path: Path, whose: re.Match[str] | None = None) -> bool:
    """Whether nobody works on it any more: its process was one of this machine and is dead, or it has not been changed
    for long. whose: the match of its name."""
    if whose is not None and whose["machine"] == machine_id() and not process_lives(int(whose["pid"])):
        return True
    try:
        return time.time() - os.lstat(path).st_mtime > STALE
    except OSError:
        return False


def process_lives(pid: int) -> bool:
    """Whether a process of that id runs on this machine; True where that cannot be known."""
    if os.name == "nt":
        return True  # os.kill would end it there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _remove(folder: Path, path: Path) -> None:
    with suppress(OSError, StoreError):  # somebody else was faster, or it is not to be touched
        remove_inside(folder, path)


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────


# filelock does not fit here (checked with 3.16 and 4.2). It has no shared lock on a file, so a reader who looks for the
# writer would need permission to write, and would keep a writer out while it looks. On Windows it locks the first byte,
# so nobody else can read who holds the lock; and 3.16 empties that file even when it fails to get the lock.
class WriteLock:
    """The right to write into a run's folder: the operating system's lock on the file `lock`, which ends with its
    process, and in that file who holds it, for people to read."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError, which names the holder, where another process or another store of this one holds it."""
        path = folder / LOCK
        check_plain(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK | _BINARY, 0o666)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written ({error.strerror}), so the run cannot be locked. Open it with write=False "
                "to read it, or copy the folder to a place where you may write."
            ) from error
        try:
            if not (_lock(descriptor) or _lock_soon(descriptor)):
                raise StoreError(
                    f"the run in {folder} is being written by {_owner(descriptor)}. Close it there, or open it with "
                    "write=False to read along."
                )
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps(owner).encode() + b"\n")
        except OSError as error:
            os.close(descriptor)
            raise StoreError(f"{path} cannot be written: {error}. Nothing was changed.") from error
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor: int | None = descriptor
        _held.add(self)

    def path_now(self) -> Path | None:
        """Where the file that is locked lies now; None where that is not known, or where it was deleted."""
        try:
            found = os.readlink(f"/proc/self/fd/{self._descriptor}")
            same = os.path.samestat(os.stat(found), os.fstat(self._descriptor or -1))
        except OSError:
            return None
        return Path(found) if same else None

    def release(self) -> None:
        """Gives the lock back. Again: nothing."""
        _held.discard(self)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self._forget()


_held: weakref.WeakSet[WriteLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


if hasattr(os, "register_at_fork"):
    # A forked child shares the lock; it would hold it on after its parent's death.
    os.register_at_fork(after_in_child=_forget_all)

_FAR = 1 << 40
"""Windows locks bytes, and makes them unreadable to others: one that is never there leaves the owner readable."""


def _lock(descriptor: int, shared: bool = False) -> bool:
    try:
        import fcntl
    except ImportError:
        import msvcrt  # Windows

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_soon(descriptor: int) -> bool:
    """Tries again for a moment: somebody may just have looked who writes."""
    for _ in range(5):
        time.sleep(0.01)
        if _lock(descriptor):
            return True
    return False


def writer_of(folder: Path) -> str | None:
    """Who writes the run in that folder at the moment; None where nobody does."""
    path = folder / LOCK
    try:
        check_plain(path)
        descriptor = os.open(path, os.O_RDONLY | _NO_LINK | _BINARY)
    except (OSError, StoreError):  # never written, or not to be trusted
        return None
    try:
        return None if _lock(descriptor, shared=True) else _owner(descriptor)
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    """Who wrote the lock file. Its text is anybody's: only numbers and a host-like name are repeated."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = json.loads(os.read(descriptor, 1000))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(found["started"])))
        host = re.sub(r"[^A-Za-z0-9._-]", "?", str(found["host"]))[:100]
        return f"process {int(found['pid'])} on {host} since {since}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "another process"
