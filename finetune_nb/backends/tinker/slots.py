"""Which models this machine's processes have in training on services: a note for each, locked while its process lives.

A service keeps a dead process's model, and the adapter slot that it holds, until its session times out, which takes minutes.
A note whose lock is free says which model to unload instead.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from contextlib import suppress
from pathlib import Path

from ...errors import StoreError
from ...redaction import redacting_logger
from ...store.durable import remove_inside, write_durably
from ...store.folder import WriteLock
from ...store.trust import data_directory

__all__ = ["HeldSlot", "dead_models"]

logger = redacting_logger(__name__)

FOLDER, NOTE = "tinker_models", "model.json"
OLD_SECONDS = 86_400.0
"""After which no service still holds a dead process's model."""
LONGEST_NOTE = 10_000
"""Bytes; ours have some hundred."""


def _folder() -> Path:
    return data_directory() / FOLDER


class HeldSlot:
    """The note of a model that this process has in training. Where no note can be written, there is none."""

    def __init__(self, url: str, model: str) -> None:
        self._lock: WriteLock | None = None
        self._place = None
        try:
            folder = _folder()
            place = folder / hashlib.sha256(f"{url} {model}".encode()).hexdigest()[:32]
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock, self._place = WriteLock(place), place
            note = {"url": url, "model": model, "host": socket.gethostname()}
            write_durably(place / NOTE, lambda file: file.write(json.dumps(note).encode()))
        except (OSError, StoreError, RuntimeError) as error:
            logger.info("no note of model %s could be written: %s", model, error)

    def forget(self) -> None:
        """The model is unloaded. Again: nothing."""
        lock, place = self._lock, self._place
        self._lock = self._place = None
        if place is not None:
            with suppress(OSError, StoreError):
                remove_inside(place.parent, place)
        if lock is not None:
            lock.release()


def dead_models(url: str) -> list[str]:
    """The models that processes of this machine had in training at `url` and left behind when they ended. Each is
    returned once."""
    found = []
    try:
        places = sorted(path for path in _folder().iterdir() if path.is_dir() and not path.is_symlink())
    except (OSError, RuntimeError):
        return []
    for place in places:
        with suppress(OSError, StoreError, ValueError):
            lock = WriteLock(place)  # StoreError: its process lives
            try:
                path = place / NOTE
                if path.is_symlink() or path.stat().st_size > LONGEST_NOTE:
                    continue
                note, age = json.loads(path.read_bytes()), time.time() - path.stat().st_mtime
                ours = note.get("url") == url and note.get("host") == socket.gethostname()
                if ours and isinstance(note.get("model"), str) and age < OLD_SECONDS:
                    found.append(note["model"])
                if ours or age > OLD_SECONDS:
                    remove_inside(place.parent, place)
            finally:
                lock.release()
    return found
