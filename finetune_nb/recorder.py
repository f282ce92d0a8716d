"""The recorder of a run: what goes into its folder, and when, and from where it goes on.

Everything is written as it happens, on the engine's loop with the disk's work in a thread. An epoch that cannot be stored
stays in memory and is stored before the next one begins. What the folder looks like is store.py's.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import CurriculumSettings
from .controls import Change, Controls
from .errors import RunError
from .evaluation.executor import in_daemon_thread
from .interfaces import TrainerAdapter
from .redaction import redacting_logger
from .retention import to_keep
from .run_folder import DATABASE
from .store import RunStore
from .types import Epoch, TrainingJobRef, TrajectoryCollection, Validation
from .watch import Watch

__all__ = ["Recorder", "settings_of"]

logger = redacting_logger(__name__)

CHECKPOINTS = "checkpoints"
WORTH_KEEPING_SECONDS = 2.0
"""Rollouts that were collected faster are stored with their epoch alone: repeating them costs less than storing twice."""


class Recorder:
    """Writes one run's folder. `checkpoint_every`: epochs between checkpoints, 0 = none; `keep`: how many of the newest."""

    def __init__(self, store: RunStore, checkpoint_every: int = 1, keep: int = 2) -> None:
        self.store = store
        self._every, self._keep = checkpoint_every, keep
        self._unsaved: list[tuple[Epoch, dict[str, Any]]] = []
        self._checkpoint: str | None = (store.state() or {}).get("checkpoint")
        self._journaled: list[Change] = []
        self._before = len(store.journal())

    @classmethod
    async def open(
        cls, folder: Path, run_id: str, config: Mapping[str, Any], checkpoint_every: int = 1, keep: int = 2
    ) -> Recorder:
        """The recorder of a folder that holds the run already, or of a new one. Raises StoreError, which says who writes
        it already, or what is wrong with it."""

        def work() -> Recorder:
            exists = (folder / DATABASE).exists()
            store = RunStore.open(folder, write=True) if exists else RunStore.create(folder, run_id, config)
            return cls(store, checkpoint_every, keep)

        return await in_daemon_thread(work)

    async def restore(self, adapter: TrainerAdapter) -> dict[str, Any] | None:
        """Puts the adapter where the last epoch left it. Returns that epoch's state; None for a new run.

        Raises RunError where the weights that the record speaks of are not to be had.
        """
        state = self.store.state()
        if state is None:
            return None
        load, version = getattr(adapter, "load_checkpoint", None), state.get("policy_version")
        if load is not None and self._checkpoint is not None:
            await load(self.store.folder / CHECKPOINTS / self._checkpoint)
        found = getattr(adapter.policy, "version", None)
        if load is not None and version is not None and found != version:
            raise RunError(
                f"run {self.store.run_id!r} was left with policy version {version}, but the newest checkpoint has {found}: "
                "weights were not saved (run.checkpoint_every). Fork it from an epoch that has a checkpoint, or start anew."
            )
        return state

    # ── as it happens ────────────────────────────────────────────────────────────────────────────────────────────────

    async def begun(self, watch: Watch, version: int | None) -> None:
        """An epoch begins; what could not be stored before is stored first."""

        def work() -> None:
            self._append_unsaved()
            self.store.begin_epoch(watch.epoch, watch.started_at, version)
            self.store.set_state("running")

        await in_daemon_thread(work)

    async def collected(self, index: int, collection: TrajectoryCollection, seconds: float) -> None:
        """The epoch's rollouts, before they are trained on, if collecting them took so long that they are worth it."""
        if seconds < WORTH_KEEPING_SECONDS:
            return
        rollouts = [trajectory for group in collection.trajectories for trajectory in group]
        await in_daemon_thread(self.store.add_rollouts, index, rollouts, collection.failures)

    async def submitted(self, index: int, ref: TrainingJobRef) -> None:
        await in_daemon_thread(self.store.record_job, index, ref)

    async def validated(self, validation: Validation) -> None:
        """A validation that was asked for by hand."""
        await in_daemon_thread(self.store.add_validation, validation)

    async def amended(self, epoch: Epoch) -> Epoch:
        """A job of an epoch ended after its record had been made."""
        return await in_daemon_thread(self.store.amend, epoch)

    async def ended(
        self, epoch: Epoch, adapter: TrainerAdapter, curriculum: Mapping[str, Any] | None, settings: CurriculumSettings
    ) -> Epoch:
        """Stores the epoch and, where the weights have changed, a checkpoint before it. Returns the stored record, which
        reads its trajectories from disk; the given one where the folder cannot be written, with a warning."""
        if epoch.policy_versions[0] != epoch.policy_versions[1] and self._every and epoch.index % self._every == 0:
            await self._save_checkpoint(epoch.index, adapter)
        state = {
            "curriculum": {**curriculum, "included_groups": sorted(curriculum["included_groups"])}
            if curriculum
            else None,
            "settings": asdict(settings),
            "checkpoint": self._checkpoint,
            "policy_version": epoch.policy_versions[1],
        }
        return await in_daemon_thread(self._store, epoch, state)

    async def _save_checkpoint(self, index: int, adapter: TrainerAdapter) -> None:
        save = getattr(adapter, "save_checkpoint", None)
        if save is None:
            return
        name = f"epoch-{index:06d}"
        try:
            await save(self.store.folder / CHECKPOINTS / name)
        except Exception:
            logger.warning("epoch %d: no checkpoint could be written; training goes on", index, exc_info=True)
            return
        self._checkpoint = name

    def _store(self, epoch: Epoch, state: dict[str, Any]) -> Epoch:
        self._unsaved.append((epoch, state))
        try:
            self._append_unsaved()
            self.store.set_state("ready")
        except Exception:
            logger.warning("epoch %d is in memory, but not stored; it is tried again", epoch.index, exc_info=True)
            return epoch
        self._prune()
        return self.store.epochs[-1]

    def _append_unsaved(self) -> None:
        while self._unsaved:
            self.store.append(*self._unsaved[0])
            self._unsaved.pop(0)

    def _prune(self) -> None:
        folder = self.store.folder / CHECKPOINTS
        there = {int(path.name[6:]): path for path in folder.glob("epoch-[0-9]*") if path.name[6:].isdigit()}
        pinned = [int(self._checkpoint[6:])] if self._checkpoint else []
        best = _best(self.store.epochs)
        for index in there.keys() - to_keep(list(there), self._keep, best, pinned):
            shutil.rmtree(there[index], ignore_errors=True)

    def journal(self, controls: Controls) -> None:
        """Brings the journal on disk up to date. Called from the engine thread; a handful of rows."""
        try:
            for place, change in enumerate(controls.journal):
                if place == len(self._journaled):
                    self.store.record_change(change)
                    self._journaled.append(change)
                elif change.epoch is not None and self._journaled[place].epoch is None:
                    self.store.settle_change(self._before + place, change.epoch)
                    self._journaled[place] = change
        except Exception:
            logger.warning("a change of the controls could not be stored", exc_info=True)

    def event(self, kind: str, **data: Any) -> None:
        """A line of the run's log."""
        try:
            self.store.record_event(kind, **data)
        except Exception:
            logger.warning("an event could not be stored", exc_info=True)

    async def close(self, state: str) -> None:
        """Stores what is left, and gives the lock back."""

        def work() -> None:
            try:
                self._append_unsaved()
                self.store.set_state(state)
            finally:
                self.store.close()

        await in_daemon_thread(work)


def settings_of(state: Mapping[str, Any] | None) -> CurriculumSettings | None:
    """The live settings that a stored state speaks of."""
    return CurriculumSettings(**state["settings"]) if state and state.get("settings") else None


def _best(epochs: Sequence[Epoch]) -> int | None:
    """The epoch after whose update validation was best; None where nothing was validated then."""
    made = {epoch.policy_versions[1]: epoch.index for epoch in epochs if epoch.policy_versions[1] is not None}
    checks = [(check.mean_reward, made[check.policy_version]) for e in epochs for check in e.validations
              if check.policy_version in made and math.isfinite(check.mean_reward)]  # fmt: skip
    return max(checks)[1] if checks else None
