"""What a run leaves behind: its records, its journal, the epoch that did not come to its end; and what can be done with
that: see what another process adds, branch off, put away, delete. Running epochs is live_run.py's.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from . import shelf
from .config import Config
from .controls import Change, Controls
from .driver import Driver
from .errors import ConfigError, RunError
from .from_folder import branch_of, copy_for_fork, make_fork
from .interfaces import Trainer, TrainerAdapter, TrajectoryBuilder
from .recorder import take_up
from .registry import Builder
from .run_folder import RUN_ID, checkpoints, size_of
from .run_reader import RunReader
from .run_views import RunViews
from .store import RunStore
from .types import Epoch
from .watch import partial_record

__all__ = ["RunOnDisk", "free_id"]


class RunOnDisk(RunViews):
    """A run with its folder."""

    config: Config
    _store: RunStore | None
    """The folder as it was opened; None where this run made it, or has not yet."""
    _driver: Driver
    _controls: Controls
    _closed: bool
    _unable: str | None
    """Why it can be read, but not gone on with."""

    @abstractmethod
    def _take(self, config: Config, builder: Builder, run_id: str, store: RunStore | None) -> None:
        """Becomes the run of that config, with what its folder holds."""

    @abstractmethod
    def close(self) -> None:
        """Ends every component."""

    @property
    def records(self) -> Sequence[Epoch]:
        """One Epoch for each epoch that has ended, as of now: a run that goes on adds some while this is looked at."""
        return list(self._driver.epochs)

    def _told_on_disk(self) -> str | None:
        """What the folder says of a run that is only read here."""
        told = self._store.run_state if self._store is not None and self._driver.recorder is None else None
        return told if told in ("running", "paused", "interrupted", "failed", "archived") else None

    @property
    def folder(self) -> Path:
        """All that the run leaves behind."""
        return Path(self.config.finetuning.output_dir) / self.id

    def _stored(self) -> RunReader | None:
        """The folder to read from; None before the first epoch of a new run."""
        return self._driver.recorder.store if self._driver.recorder is not None else self._store

    @property
    def changes(self) -> Sequence[Change]:
        """The journal: every change of the live settings, in order."""
        store = self._stored()
        return self._controls.journal if store is None else store.journal()

    @property
    def partial(self) -> Epoch | None:
        """The epoch that has begun and is not complete, as far as the folder has it: aborted, failed, left behind by a
        kernel that died, or still running. Its rollouts may be unscored. Running the epoch again replaces it."""
        store = self._stored()
        found = store.partial() if store is not None else None
        return found and partial_record(found, self.id, self._controls.applied)

    @property
    def next_index(self) -> int:
        """The epoch that comes next, or is running."""
        return self._driver.next_index

    @property
    def writer(self) -> str | None:
        """Which other process writes this run at the moment; None where none does."""
        store = self._store if self._driver.recorder is None else None
        return None if store is None or self._closed else store.writer

    @property
    def model(self) -> str | None:
        """What is trained: in words where the policy tells, once it is loaded, else as the adapter's config says it."""
        if self._driver.policy_told is not None:
            return self._driver.policy_told
        adapter = self.config.trainer_adapters.get(self.config.finetuning.trainer_adapter or "")
        return getattr(adapter, "model", None)

    def _place(self) -> str:
        sizes = [size_of(path) for path in checkpoints(self.folder).values()]
        kept = f", of which {len(sizes)} checkpoint{'s' * (len(sizes) != 1)} {sum(sizes) / 1e6:.1f} MB" if sizes else ""
        return (
            f"{self.folder} ({size_of(self.folder) / 1e6:.1f} MB{kept})" if self.folder.is_dir() else str(self.folder)
        )

    def refresh(self) -> None:
        """Sees what another process has added to a run that it writes and this one reads. `writer` says who that is."""
        if self._store is not None and self._driver.recorder is None:
            self._store.refresh()
            self._driver.epochs = list(self._store.epochs)
            take_up(self._controls, self._store)

    # ── other runs ───────────────────────────────────────────────────────────────────────────────────────────────────

    def fork(
        self,
        epoch: int | None = None,
        *,
        curriculum: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        name: str | None = None,
        builder: TrajectoryBuilder | None = None,
        adapter: TrainerAdapter | None = None,
        trainer: Trainer | None = None,
    ) -> Self:
        """A new run that goes on behind an epoch of this one, from a copy of its weights and its curriculum's state.

            better = run.fork(epoch=5, curriculum=dict(percentile=0.8))

        Its first epoch has the next number and draws the same examples, so `ft.compare([run, better])` pairs them.
        epoch: None = the last one that is complete. curriculum: changes of the settings that were in force then; giving
        some switches the curriculum on unless they say `enabled`. training: other fields of the adapter's config. builder,
        adapter, trainer: new ones, where this run was given them as objects. Raises RunError where that epoch, or its
        weights, are not there.
        """
        if self._unable:
            raise RunError(self._unable)
        store, recorder = self._stored(), self._driver.recorder
        if store is None:
            raise RunError(f"run {self.id!r} has no epoch to go on from. Run one first, or make a new Run.")
        components = {"trajectory_builder": builder, "trainer_adapter": adapter, "trainer": trainer}
        config, again = copy_for_fork(self.config, self._driver.builder, training, components)
        branch = branch_of(store, epoch, curriculum, training)
        run_id = free_id(name or f"{self.id[:90]}-fork", self.folder.parent)
        if recorder is not None and not self._closed:
            recorder.forked(branch.epoch, run_id, branch.checkpoint)
        folder = self.folder.parent / run_id
        make_fork(store.folder, branch, folder, run_id, config.stored())
        run = type(self).__new__(type(self))
        run._unable = None
        run._take(config, again, run_id, RunStore.open(folder))
        return run

    def archive(self, checkpoints: bool = True) -> Path:
        """Closes the run and puts its folder away, into `archive` beside it; returns where. `ft.runs` does not list it
        there unless asked, and `Run.open` opens it as ever. checkpoints: False deletes them, which saves most of the room;
        the run can then be looked at, not gone on with. Raises StoreError where somebody else writes it."""
        self.close()
        folder = shelf.archive(self.folder, checkpoints)
        self.config.finetuning.output_dir, self.id = folder.parent, folder.name
        self._store = RunStore.open(folder)
        self._driver.recorder, self._driver.epochs = None, list(self._store.epochs)  # type: ignore[assignment]
        return folder

    def delete(self) -> None:
        """Closes the run and deletes its folder with all that is in it. Raises StoreError where somebody else writes it."""
        self.close()
        shelf.delete(self.folder)


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
