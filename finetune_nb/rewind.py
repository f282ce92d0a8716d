"""Where a run goes on whose last weights were not saved, and what becomes of the epochs behind that point.

No run can go on from them, and they may not be lost: the record as it was becomes a run of its own in `archive`, to be
looked at and compared with. When a run goes back is recorder.py's to say.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from .errors import StoreError
from .jsonl import forget_epochs
from .run_folder import (
    CONFIG,
    LOG,
    TRAJECTORIES,
    check_plain,
    checkpoints,
    free_in_archive,
    sync_folder,
    trajectory_file,
    write_durably,
)
from .run_reader import RunReader
from .store import RunStore

__all__ = ["has_weights", "logs_of", "newest_checkpoint", "newest_with_weights", "rewind"]


def newest_checkpoint(store: RunReader, epoch: int | None = None) -> int | None:
    """The epoch whose checkpoint was the newest one behind an epoch, the last one by default. None: there was none, or the
    adapter saves none."""
    index = store.next_index - 1 if epoch is None else epoch
    if index in checkpoints(store.folder):  # written when the run was closed, say
        return index
    name = ((store.state() if epoch is None else store.state_of(epoch)) or {}).get("checkpoint")
    if name is None:
        return None
    if not re.fullmatch(r"epoch-\d+", str(name)):
        raise StoreError(
            f"{store.folder} names {name!r} as a checkpoint; expected one like epoch-000003. Fork another epoch."
        )
    return int(name[6:])


def has_weights(store: RunReader, checkpoint: int, epoch: int) -> bool:
    """Whether that checkpoint is there, and has the weights as they were behind that epoch."""
    if checkpoint not in checkpoints(store.folder):
        return False
    return checkpoint == epoch or _version(store, checkpoint) == _version(store, epoch)


def newest_with_weights(store: RunReader, fresh: int | None) -> int | None:
    """The newest epoch behind which the weights can be had; of a fork also the one it began behind. fresh: the policy's
    version before anything is loaded. None: no epoch's can."""
    indices = [epoch.index for epoch in store.epochs]
    if store.parent is not None:
        indices.insert(0, store.parent[1])
    for index in reversed(indices):
        checkpoint = newest_checkpoint(store, index)
        if checkpoint is None and _version(store, index) in (None, fresh):
            return index
        if checkpoint is not None and has_weights(store, checkpoint, index):
            return index
    return None


def _version(store: RunReader, epoch: int) -> int | None:
    return store.state_of(epoch).get("policy_version")


def rewind(store: RunStore, epoch: int) -> Path:
    """Takes the epochs behind `epoch` out of a run that is written here, and returns where the whole of it, as it was, now
    lies. Where that cannot be copied nothing is taken out. Raises StoreError, OSError."""
    folder, last = store.folder, store.next_index - 1
    place = free_in_archive(folder, f"{folder.name[:85]}-until-{last}")
    fresh = place.with_name(f".{place.name}")  # no run until it is whole
    check_plain(fresh)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for path in (folder / CONFIG, folder / LOG, *logs_of(folder)):
        check_plain(path)
        if path.exists():
            write_durably(fresh / path.name, lambda file, path=path: file.write(path.read_bytes()))
    (fresh / TRAJECTORIES).mkdir()
    for path in sorted((folder / TRAJECTORIES).glob("epoch-*.parquet")):
        _share(path, fresh / TRAJECTORIES / path.name)
    sync_folder(fresh / TRAJECTORIES)
    store.copy_database(fresh, state="archived")
    sync_folder(fresh)
    os.rename(fresh, place)
    sync_folder(place.parent)

    for log in logs_of(folder):  # before the epochs: who finds those finds their lines too, or goes back again
        forget_epochs(log, epoch + 1)
    store.go_back(epoch)
    for index in range(epoch + 1, last + 1):  # whoever reads all files of the folder would count them twice
        with suppress(OSError):
            trajectory_file(folder, index).unlink()
    return place


def logs_of(folder: Path) -> list[Path]:
    """The seed's log files in a run's folder."""
    return sorted(folder.glob("*_*.jsonl"))


def _share(path: Path, place: Path) -> None:
    """The same file under a second name: it is replaced whole, never changed. A copy where the disk knows no such thing."""
    check_plain(path)
    try:
        os.link(path, place)
    except OSError:
        write_durably(place, lambda file: file.write(path.read_bytes()))
