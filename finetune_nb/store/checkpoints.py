"""The weights of a run that lie on its disk: when they are saved, which checkpoints are kept, and where a run continues.

A checkpoint is the adapter's own directory. Checkpoints and the record of the epochs need not end at the same epoch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import BackendError, ConfigError, RunError, StoreError
from ..interfaces import TrainerAdapter
from ..redaction import redacting_logger
from ..threads import in_daemon_thread
from ..types import Epoch
from ..user_code import contained
from .durable import check_inside, check_plain, check_tree, remove_inside, size_of, sync_folder, write_durably
from .folder import CONFIG, LOG, TRAJECTORIES, checkpoint_folder, checkpoints, free_in_archive, trajectory_file
from .json import forget_epochs
from .reader import RunReader
from .store import RunStore
from .trust import SIGNATURE

__all__ = [
    "Checkpoints",
    "has_weights",
    "logs_of",
    "newest_checkpoint",
    "newest_with_weights",
    "rewind",
    "to_keep",
    "weights_of_epochs",
]


def to_keep(epochs: Sequence[int], last: int, best: int | None, pinned: Collection[int]) -> set[int]:
    """The epochs whose checkpoints stay: always some of `epochs`, those that have a checkpoint now, in any order.

    last: how many of the newest stay (0: none for being new; continuing a run needs the newest one). best: the
    epoch that did best on validation; None where nothing was validated. pinned: epochs that must not go, for example
    because a run was forked from them. Raises ConfigError for a negative `last`.
    """
    if last < 0:
        raise ConfigError(f"the number of newest checkpoints to keep is {last}; expected 0 or more")
    there = set(epochs)
    newest = sorted(there, reverse=True)[:last]
    return there & {*newest, *pinned, *([] if best is None else [best])}


def newest_checkpoint(store: RunReader, epoch: int | None = None) -> int | None:
    """The epoch whose checkpoint was the newest one after an epoch, the last one by default. None: there was none, or the
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
    """Whether that checkpoint is there, and has the weights as they were after that epoch."""
    if checkpoint not in checkpoints(store.folder):
        return False
    return checkpoint == epoch or _version(store, checkpoint) == _version(store, epoch)


def newest_with_weights(store: RunReader, fresh: int | None) -> int | None:
    """The newest epoch whose weights are available; of a fork also the one that it starts from. fresh: the policy's
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


def weights_of_epochs(store: RunReader) -> dict[int, Path | None]:
    """The epochs whose weights are available, in order, each with its checkpoint; None: the weights that the run began with."""
    folders = checkpoints(store.folder)
    versions = {epoch.index: epoch.policy_versions[1] for epoch in store.epochs}
    if store.parent is not None and store.parent[1] in folders:
        versions = {store.parent[1]: _version(store, store.parent[1]), **versions}
    of_version: dict[int, Path | None] = {0: None}
    for index, version in versions.items():
        if index in folders and version is not None:
            of_version[version] = folders[index]
    found: dict[int, Path | None] = {}
    for epoch in store.epochs:
        version = versions[epoch.index]
        if epoch.index in folders:
            found[epoch.index] = folders[epoch.index]
        elif version is not None and version in of_version:
            found[epoch.index] = of_version[version]
    return found


def _version(store: RunReader, epoch: int) -> int | None:
    return store.state_of(epoch).get("policy_version")


def rewind(store: RunStore, epoch: int) -> Path:
    """Removes the epochs after `epoch` from a run that is written here, and returns where the whole of it, as it was, now
    lies. Where that cannot be copied nothing is taken out. Raises StoreError, OSError."""
    folder, last = store.folder, store.next_index - 1
    place = free_in_archive(folder, f"{folder.name[:85]}-until-{last}")
    fresh = place.with_name(f".{place.name}")  # no run until it is whole
    remove_inside(place.parent, fresh)
    fresh.mkdir()
    for path in (folder / CONFIG, folder / SIGNATURE, folder / LOG, *logs_of(folder)):
        check_plain(path)
        if path.exists():
            write_durably(fresh / path.name, lambda file, path=path: file.write(path.read_bytes()))
    (fresh / TRAJECTORIES).mkdir()
    for path in sorted((folder / TRAJECTORIES).glob("epoch-*.parquet")):
        check_inside(folder, path)
        _share(path, fresh / TRAJECTORIES / path.name)
    sync_folder(fresh / TRAJECTORIES)
    store.copy_database(fresh, state="archived")
    sync_folder(fresh)
    os.rename(fresh, place)
    sync_folder(place.parent)

    for log in logs_of(folder):  # before the epochs: who finds those finds their lines too, or goes back again
        forget_epochs(log, epoch + 1)
    store.rewind(epoch)
    for index in range(epoch + 1, last + 1):  # whoever reads all files of the folder would count them twice
        with suppress(OSError):
            remove_inside(folder, trajectory_file(folder, index))
    return place


def logs_of(folder: Path) -> list[Path]:
    """The seed's log files in a run's folder."""
    return sorted(folder.glob("*_*.jsonl"))


def _share(path: Path, place: Path) -> None:
    """The same file under a second name: it is replaced whole, never changed. A copy where the disk knows no such thing."""
    try:
        os.link(path, place)
    except OSError:
        write_durably(place, lambda file: file.write(path.read_bytes()))


logger = redacting_logger(__name__)

KEEP_BYTES = 500_000_000
"""What the newest checkpoints may take together, where the config names no number."""


class Checkpoints:
    """The checkpoints in one run's folder. every: epochs between two of them, 0 = none. keep: how many of the newest stay;
    None: as many as KEEP_BYTES hold, at least 2."""

    def __init__(self, store: RunStore, every: int, keep: int | None) -> None:
        self.store = store
        self.resume_epoch: int | None = None
        """The epoch that the run continues after, if that is not the last one of the record."""
        self._every, self._keep = every, keep
        self._forget: Callable[[Sequence[Path]], None] | None = (
            None  # the adapter's, for checkpoints that name what lies elsewhere
        )
        self._pinned = {e["epoch"] for e in store.events("forked") if isinstance(e.get("epoch"), int)}
        self.reload()

    def reload(self) -> None:
        """Sees where the record ends."""
        self._checkpoint = newest_checkpoint(self.store)
        self._version: int | None = (self.store.state() or {}).get("policy_version")
        self._saved_version = self._version

    @property
    def newest(self) -> str | None:
        """The name of the newest checkpoint's folder; None where there is none."""
        return None if self._checkpoint is None else checkpoint_folder(self.store.folder, self._checkpoint).name

    # ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def restore(self, adapter: TrainerAdapter) -> dict[str, Any] | None:
        """Puts the adapter where the last epoch left it, or the last one whose weights were saved. Returns that epoch's
        state; None for a new run. The record is as it was: `RunWriter.rewind` comes before the next epoch.

        Raises RunError if no weights of this run are available.
        """
        self._forget = getattr(adapter, "forget_checkpoints", None)
        state = self.store.state()
        held = await self._held(adapter, state)
        load, fresh = getattr(adapter, "load_checkpoint", None), getattr(adapter.policy, "version", None)
        if held or state is None or load is None:
            return state
        last, version = self.store.next_index - 1, state.get("policy_version")
        kept = await in_daemon_thread(newest_with_weights, self.store, fresh)
        if kept is None:
            raise RunError(
                f"run {self.store.run_id!r} was left with policy version {version}, and none of its weights are kept "
                "(run.checkpoint_every). It can be read; to train, start anew."
            )
        if kept != last:
            logger.warning(
                "no checkpoint was kept after epoch %d of run %r (run.checkpoint_every is %d). Resuming from the weights after "
                "epoch %d; epoch %d runs next. What was recorded since is moved to the archive first, not lost.",
                last, self.store.run_id, self._every, kept, kept + 1,
            )  # fmt: skip
            state, self.resume_epoch = self.store.state_of(kept), kept
        version, checkpoint = state.get("policy_version"), newest_checkpoint(self.store, kept)
        if checkpoint is not None:
            place = checkpoint_folder(self.store.folder, checkpoint)
            check_tree(self.store.folder, place)
            await load(place)
        found = getattr(adapter.policy, "version", None)
        if version is not None and found != version:
            raise RunError(
                f"the checkpoint of epoch {checkpoint} of run {self.store.run_id!r} has policy version {found}; the record "
                f"says {version}. Fork the run from an epoch that has another checkpoint, or start anew."
            )
        return state

    async def _held(self, adapter: TrainerAdapter, state: dict[str, Any] | None) -> bool:
        """Whether a backend that outlived the process that wrote the record still has the weights that it ends with, or
        the job: there is nothing to load then."""
        holds = getattr(adapter, "holds_weights", None)
        if holds is None:
            return False
        left = await in_daemon_thread(self.store.partial)
        version = None if state is None else state.get("policy_version")
        if not await holds(version, None if left is None else left.job):
            return False
        if (
            state is not None
            and await in_daemon_thread(newest_with_weights, self.store, 0) != self.store.next_index - 1
        ):
            self._saved_version = -1  # of no weights: those that are held lie on no disk
        return True

    # ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_epoch_begin(self, version: int | None) -> None:
        """An epoch begins with weights of that policy version."""
        if self._saved_version is None:
            self._saved_version = version  # what a run starts with needs no checkpoint

    async def on_epoch_end(self, epoch: Epoch, adapter: TrainerAdapter) -> None:
        """An epoch has ended: saves its weights where they have changed and it is time."""
        self._version = epoch.policy_versions[1]
        if self._unsaved() and epoch.index % self._every == 0:
            await self._save(epoch.index, adapter)

    async def save_last(self, adapter: TrainerAdapter) -> None:
        """Saves the newest weights, if the record's last epoch left others than were saved."""
        if self._unsaved() and self.store.epochs:
            await self._save(self.store.epochs[-1].index, adapter)

    def _unsaved(self) -> bool:
        return bool(self._every) and self._version != self._saved_version

    async def _save(self, index: int, adapter: TrainerAdapter) -> None:
        save = getattr(adapter, "save_checkpoint", None)
        if save is None:
            return
        place = checkpoint_folder(self.store.folder, index)
        try:
            self.store.require_place()
            check_inside(self.store.folder, place)
            await contained("save_checkpoint", save(place))
        except Exception:
            logger.warning("epoch %d: no checkpoint could be written; training continues", index, exc_info=True)
            return
        self._checkpoint, self._saved_version = index, self._version

    def pin(self, index: int) -> None:
        """A run was forked from that epoch's checkpoint, which stays."""
        self._pinned.add(index)

    def prune(self) -> None:
        """Deletes the checkpoints that are not worth their space."""
        try:
            there = checkpoints(self.store.folder)
        except StoreError as error:  # put there while the run works
            logger.warning("no checkpoint was deleted: %s", error)
            return
        pinned = [index for index in (*self._pinned, self._checkpoint) if index is not None]
        keep = self._keep
        if keep is None:
            size = max(1, size_of(there[max(there)])) if there else 1
            keep = max(2, KEEP_BYTES // size)
        if len(there) > keep:
            gone = there.keys() - to_keep(list(there), keep, _best(self.store.epochs), pinned)
            if self._forget is not None and gone:
                try:
                    for index in gone:
                        check_tree(self.store.folder, there[index])
                    self._forget([there[index] for index in sorted(gone)])
                except (BackendError, StoreError) as error:
                    logger.warning("no checkpoint was deleted; it is tried again after the next epoch: %s", error)
                    return
            for index in gone:
                with suppress(OSError):  # tried again after the next epoch
                    remove_inside(self.store.folder, there[index])


def _best(epochs: Sequence[Epoch]) -> int | None:
    """The epoch after whose update validation was best; None where nothing was validated then."""
    made = {epoch.policy_versions[1]: epoch.index for epoch in epochs if epoch.policy_versions[1] is not None}
    checks = [(check.mean_reward, made[check.policy_version]) for e in epochs for check in e.validations
              if check.policy_version in made and math.isfinite(check.mean_reward)]  # fmt: skip
    return max(checks)[1] if checks else None
