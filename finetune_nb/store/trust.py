"""Whose a run's folder is: its config.yml is signed with a key of this user's own.

The signature is an HMAC over the run's id and the bytes of config.yml, in the file `signature` of the run's folder. The key is
a random secret in the user's data directory (or in $FINETUNE_NB_DATA_DIR), readable by the user alone. Where no key can be
kept, this process makes one for itself, and what it signed is not known to the next process.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path

from ..errors import StoreError
from ..redaction import redacting_logger
from .durable import _BINARY, _NO_LINK, check_plain, write_durably

__all__ = [
    "DATA_DIRECTORY",
    "SIGNATURE",
    "data_directory",
    "is_signed",
    "sign",
]

logger = redacting_logger(__name__)

SIGNATURE = "signature"
"""The file in a run's folder."""
DATA_DIRECTORY = "FINETUNE_NB_DATA_DIR"
"""The environment variable that names another directory for this user's own files, such as the key."""
KEY = "run_signing_key"
KEY_BYTES = 32
_SCHEME = "hmac-sha256"
_LONGEST = 200
"""Bytes of a signature file that are read; ours have fewer."""

_own_key = secrets.token_bytes(KEY_BYTES)
"""This process's, where the user's cannot be kept."""
_turn = threading.Lock()
_told: set[str] = set()


def sign(folder: Path, run_id: str, config: bytes) -> None:
    """Say that the config of a run is this user's own.

    Args:
        folder: The run's folder.
        run_id: The run's id, as run.db has it.
        config: What config.yml holds.

    Raises:
        OSError: The folder cannot be written.
        StoreError: A link, or a special file, has the name of the signature.
    """
    text = f"{_SCHEME}:{_signature(run_id, config)}\n"
    write_durably(folder / SIGNATURE, lambda file: file.write(text.encode()))


def is_signed(folder: Path, run_id: str, config: bytes) -> bool:
    """Whether this user signed exactly this config of this run.

    Args:
        folder: The run's folder.
        run_id: The run's id, as run.db has it.
        config: What was read from config.yml; no other reading of the file counts.
    """
    path = folder / SIGNATURE
    try:
        check_plain(path)
        descriptor = os.open(path, os.O_RDONLY | _NO_LINK | _BINARY)
    except (OSError, StoreError):  # none, or one that is not to be followed
        return False
    try:
        found = os.read(descriptor, _LONGEST)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    expected = f"{_SCHEME}:{_signature(run_id, config)}"
    return hmac.compare_digest(found.strip(), expected.encode())


def _signature(run_id: str, config: bytes) -> str:
    # No run id has a zero byte, so no two pairs give the same message.
    message = b"finetune_nb run\0" + run_id.encode() + b"\0" + config
    return hmac.new(_key(), message, hashlib.sha256).hexdigest()


# ── the key ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _key() -> bytes:
    """The user's key, which is made when it is first needed; this process's own where that cannot be kept."""
    with _turn:
        try:
            path = data_directory() / KEY
            if not path.exists():
                _make_key(path)
            key = path.read_bytes()
            if len(key) != KEY_BYTES:
                raise ValueError(f"{path} has {len(key)} bytes where {KEY_BYTES} were expected; delete it")
            if path.stat().st_mode & 0o077:
                with suppress(OSError):  # somebody else's file, or a disk without permissions
                    path.chmod(0o600)
            return key
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home directory
            _tell_once(
                "no key that signs run folders can be kept, so runs that are made now will need trust=True in the next "
                f"process: {type(error).__name__}: {error}. Set {DATA_DIRECTORY} to a directory that you can write."
            )
            return _own_key


def data_directory() -> Path:
    """Where this user's own files of this library lie. Raises RuntimeError where this user has no place for them."""
    named = os.environ.get(DATA_DIRECTORY)
    if named:
        return Path(named).expanduser().absolute()
    from platformdirs import user_data_path

    directory = user_data_path("finetune_nb", appauthor=False)
    if not directory.is_absolute():  # "~" stays as it is for a user without a home
        raise RuntimeError(f"{str(directory)!r} is no directory of this user")
    return directory


def _make_key(path: Path) -> None:
    """Writes a new key, unless another process comes first. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _BINARY, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # in one step, and never over the key of another process
        except FileExistsError:
            pass
        except OSError:  # a disk that knows no second names
            if not path.exists():
                os.replace(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _tell_once(problem: str) -> None:
    """For each place that the key may have, once in this process."""
    place = os.environ.get(DATA_DIRECTORY, "")
    if place not in _told:
        _told.add(place)
        logger.warning("%s", problem)
