"""The runs of a directory: listed, archived, deleted."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, StoreError
from ..redaction import error_text
from .durable import check_plain, remove_inside
from .folder import ARCHIVE, CHECKPOINTS, DATABASE, RUN_ID, free_in_archive, name_to_delete
from .store import RunStore

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "archive_run",
    "delete_run",
    "free_id",
    "runs",
]


def runs(directory: str | Path = "runs", archived: bool = False) -> pd.DataFrame:
    """List the runs in a directory, newest first.

    Args:
        directory: The directory with the runs' folders.
        archived: List the archived runs instead.

    Returns:
        One row = one run. Columns: run (its id), created_at (UTC), epochs, last_reward (mean reward of the last epoch, NaN
        without one), state, parent and parent_epoch (of a fork), size (bytes), folder, error (why a folder cannot be read; the
        rest is then missing).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for folder in sorted((Path(directory) / (ARCHIVE if archived else "")).glob("[!.]*")):
        try:
            os.lstat(folder / DATABASE)  # a link that leads nowhere is a damaged run, and no missing one
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            pass  # opening it tells why
        row: dict[str, Any] = {"run": folder.name, "folder": str(folder)}
        try:
            row |= _about(folder)
        except Exception as error:  # whatever is wrong with one folder, the others are listed
            row["error"] = str(error) if isinstance(error, StoreError) else error_text(error)
        rows.append(row)
    frame = pd.DataFrame(rows, columns=list(_RUN_COLUMNS)).astype(_RUN_COLUMNS)
    frame["created_at"] = pd.to_datetime(frame.created_at, unit="s", utc=True, errors="coerce")
    return frame.sort_values("created_at", ascending=False, ignore_index=True)


def _about(folder: Path) -> dict[str, Any]:
    """What the table says of a run that can be read."""
    store = RunStore.open(folder)
    parent, parent_epoch = store.parent or (None, None)
    epochs = store.epochs
    return {
        "created_at": store.created_at,
        "epochs": len(epochs),
        "last_reward": epochs[-1].metrics.mean_reward if epochs else None,
        "state": store.run_state,
        "parent": parent,
        "parent_epoch": parent_epoch,
        "size": store.size(),
    }


_RUN_COLUMNS = {
    "run": "object",
    "created_at": "float64",
    "epochs": "Int64",
    "last_reward": "float64",
    "state": "object",
    "parent": "object",
    "parent_epoch": "Int64",
    "size": "Int64",
    "folder": "object",
    "error": "object",
}


def archive_run(folder: Path, checkpoints: bool = True, forget: Callable[[], None] = lambda: None) -> Path:
    """Puts a run's folder away, with or without its checkpoints; returns where. forget: called before checkpoints are
    deleted. Raises StoreError."""
    with _alone(folder) as store:
        store.set_state("archived")
        if not checkpoints:
            forget()
            with suppress(OSError):
                remove_inside(folder, folder / CHECKPOINTS)
        place = free_in_archive(folder, folder.name)
    os.rename(folder, place)
    return place


def delete_run(folder: Path, forget: Callable[[], None] = lambda: None) -> None:
    """Deletes a run's folder. forget: called before that. Raises StoreError for a folder that is no run, or that somebody else
    writes."""
    with _alone(folder):
        forget()
    # First out of sight, in one step: what is left after a crash does not look like a run.
    gone = name_to_delete(folder)
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[RunStore]:
    """The run, while nobody else can write it."""
    check_plain(folder)
    try:
        with RunStore.open(folder, write=True) as store:
            yield store
    except OSError as error:
        raise StoreError(f"{folder} cannot be moved: {error}. It is as it was.") from error


def free_id(name: str | None, output_dir: Path) -> str:
    """The id of a new run in `output_dir`: the name, with a number where it is taken; None: the time, and a few letters. Raises
    ConfigError for a name that no folder should have."""
    if name is None:
        return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not RUN_ID.fullmatch(name):
        raise ConfigError(
            f"run name {name!r}: expected letters, digits, '.', '_' and '-', at most 100, no leading sign."
        )
    run_id, n = name, 1
    while (output_dir / run_id).exists():
        run_id, n = f"{name}-{n + 1}", n + 1
    return run_id
