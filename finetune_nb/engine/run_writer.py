"""Writes a run's folder while the run works.

Everything is written as it happens, from the engine's loop, with the disk's work in a thread. An epoch that cannot be stored
at the moment, as the disk is full, stays in memory and is stored before the next one begins; one that cannot be stored as it
is, is stored with less.
"""

from __future__ import annotations

import contextvars
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ..errors import StoreError
from ..interfaces import TrainerAdapter
from ..redaction import error_text, redacting_logger
from ..store.checkpoints import Checkpoints, logs_of, rewind
from ..store.database import UnreadableRecord
from ..store.json import forget_epochs, noting_replaced, plain
from ..store.labels import put_labels, read_labels
from ..store.reader import RunReader
from ..store.store import FolderGone, RunStore
from ..threads import in_daemon_thread
from ..types import (
    Change,
    CurriculumSettings,
    Epoch,
    RolloutFailure,
    Selection,
    TrainingJobRef,
    TrainingJobStatus,
    Trajectory,
    TrajectoryCollection,
    Validation,
)
from .epoch_record import EpochInProgress, recounted
from .live_settings import LiveSettings

__all__ = [
    "HeldLog",
    "RunWriter",
    "logging_to",
    "settings_in",
    "restore_settings",
]

logger = redacting_logger(__name__)

WORTH_KEEPING_SECONDS = 2.0
"""Rollouts that were collected faster are stored with their epoch alone: repeating them costs less than storing twice."""


class RunWriter:
    """Writes one run's folder. checkpoint_every, keep: as Checkpoints takes them."""

    def __init__(self, store: RunStore, checkpoint_every: int = 1, keep: int | None = None) -> None:
        self.store = store
        self.weights = Checkpoints(store, checkpoint_every, keep)
        self._journaling = threading.Lock()  # whoever steers writes it down, in any thread
        self._unsaved: list[tuple[Epoch, dict[str, Any]]] = []
        self._journaled: list[Change] = store.journal()

    @classmethod
    async def open(
        cls, folder: Path, run_id: str, config: Mapping[str, Any], checkpoint_every: int = 1, keep: int | None = None
    ) -> RunWriter:
        """The recorder of a folder that holds the run already, or of a new one. Raises StoreError, which says who writes
        it already, or what is wrong with it."""

        def work() -> RunWriter:
            exists = RunStore.exists(folder)
            store = RunStore.open(folder, write=True) if exists else RunStore.create(folder, run_id, config)
            try:
                return cls(store, checkpoint_every, keep)
            except BaseException:
                store.close()  # whoever mends the cause must find the lock free
                raise

        return await in_daemon_thread(work)

    async def rewind(self) -> bool:
        """Archives the epochs that the run cannot continue after, and returns whether there were any. Raises StoreError
        where that cannot be; nothing is then taken out."""
        resume_epoch, self.weights.resume_epoch = self.weights.resume_epoch, None
        if resume_epoch is None:
            return False

        def work() -> None:
            last = self.store.next_index - 1
            place = rewind(self.store, resume_epoch)
            self.weights.reload()
            self._journaled = self.store.journal()
            self.event("went_back", behind=resume_epoch, last=last, folder=str(place))
            logger.warning(
                "epochs %d to %d are run again; the record until then is in %s", resume_epoch + 1, last, place
            )

        try:
            await in_daemon_thread(work)
        except BaseException:
            self.weights.resume_epoch = resume_epoch
            raise
        return True

    async def put_in_place(self, index: int, version: int | None, collection: TrajectoryCollection) -> None:
        """Takes the newest epoch out of the record, which goes to the archive as it was, and puts trajectories with new rewards
        in its place: those of an epoch that has begun. Raises StoreError where that cannot be."""

        def work() -> None:
            self._append_unsaved()
            labels = read_labels(self.store.folder, [index])
            place = rewind(self.store, index - 1)
            if labels:
                put_labels(self.store.folder, labels)  # the rollouts are the same, and so are their names
            self._journaled = self.store.journal()
            self.store.begin_epoch(index, time.time(), version)
            self.store.add_rollouts(index, collection, True)
            self.event("rescored", epoch=index, folder=str(place))

        await in_daemon_thread(work)
        self.weights.reload()

    # ── as it happens ────────────────────────────────────────────────────────────────────────────────────────────────

    async def on_epoch_begin(self, in_progress: EpochInProgress, version: int | None) -> None:
        """An epoch begins; what could not be stored before is stored first. Raises StoreError where that cannot be."""

        def work() -> None:
            self._append_unsaved()
            if self.store.begin_epoch(in_progress.epoch, in_progress.started_at, version):
                self._forget_logs(in_progress.epoch)
            self.store.set_state("running")

        self.weights.on_epoch_begin(version)
        await in_daemon_thread(work)

    async def on_epoch_resumed(self, index: int) -> None:
        """An epoch whose job was handed over by a process that has ended is brought to its end."""

        def work() -> None:
            self._forget_logs(index)
            self.store.set_state("running")

        await self._unless_full(index, work)

    def _forget_logs(self, index: int) -> None:
        """What an earlier attempt at an epoch wrote into the seed's logs would stand there twice."""
        for log in logs_of(self.store.folder):
            forget_epochs(log, index)

    async def on_rollouts(self, index: int, rollouts: Sequence[Callable[[], Trajectory | RolloutFailure]]) -> None:
        """Rollouts of the running epoch that have ended, each made when called."""

        def work() -> None:
            made = [make() for make in rollouts]
            finished = [rollout for rollout in made if isinstance(rollout, Trajectory)]
            failures = [rollout for rollout in made if isinstance(rollout, RolloutFailure)]
            collection = TrajectoryCollection.model_construct(
                trajectories=[finished], run_id=self.store.run_id, failures=failures
            )
            self.store.add_rollouts(index, collection)

        await self._unless_full(index, work)

    async def on_collected(
        self, index: int, collection: TrajectoryCollection, seconds: float = math.inf, always: bool = False
    ) -> bool:
        """All of the epoch's rollouts, before they are trained on, if collecting them took so long that they are worth
        it, or `always`. Returns whether the folder has them."""
        if seconds < WORTH_KEEPING_SECONDS and not always:
            return False
        return await self._unless_full(index, self.store.add_rollouts, index, collection, True)

    async def on_selected(self, index: int, selection: Selection, seconds: Mapping[str, float]) -> None:
        """What of it is handed over next, and why the rest is not."""
        await self._unless_full(index, self.store.record_selection, index, selection, seconds)

    async def on_submitted(self, index: int, ref: TrainingJobRef) -> None:
        """The running epoch's job, once the backend has taken it."""
        await self._unless_full(index, self.store.record_job, index, ref)

    async def on_job_status(self, index: int, status: TrainingJobStatus) -> None:
        """The status of that job."""
        await self._unless_full(index, self.store.record_status, index, status)

    async def on_validation(self, validation: Validation, index: int | None) -> None:
        """A validation of the running epoch; index None: it was asked for by hand."""
        await self._unless_full(index, self.store.add_validation, validation, index)

    async def on_epoch_stopped(self, how: str, index: int, error: str | None = None) -> None:
        """The running epoch ended before its time: "failed", or "aborted"."""

        def work() -> None:
            self.store.record_event(how, epoch=index, error=error)
            self.store.set_state("failed" if how == "failed" else "ready")

        with suppress(FolderGone):  # why it ended is on its way to whoever waits for it
            await self._unless_full(index, work)

    async def _unless_full(self, index: int | None, work: Callable[..., Any], *args: Any) -> bool:
        """Writes what the epoch's own record will have too. If it cannot, on a full disk say, the epoch continues. Raises
        FolderGone where the folder is not there any more: nothing can be recorded then."""
        try:
            await in_daemon_thread(work, *args)
        except FolderGone:
            raise
        except StoreError as error:
            logger.warning("epoch %s continues, but: %s", index, error)
            return False
        return True

    async def update_epoch(self, epoch: Epoch) -> Epoch:
        """A job of an epoch ended after its record had been made."""
        return await in_daemon_thread(self.store.amend, epoch)

    async def store_epoch(
        self,
        epoch: Epoch,
        adapter: TrainerAdapter,
        curriculum: Mapping[str, Any] | None,
        live_settings: LiveSettings,
        given: Mapping[str, Any] | None = None,
    ) -> Epoch:
        """Stores the epoch and, where the weights have changed, a checkpoint before it. Returns the stored record, which
        reads its trajectories from disk; the given one where the folder cannot be written, with a warning. Raises
        FolderGone where it is not there any more; the epoch is kept, and stored once the folder is back."""
        await self.weights.on_epoch_end(epoch, adapter)
        state = {
            "curriculum": {**curriculum, "included_groups": sorted(curriculum["included_groups"])}
            if curriculum
            else None,
            "settings": asdict(live_settings.applied),
            "live": live_settings.live_values(),
            "checkpoint": self.weights.newest,
            "policy_version": epoch.policy_versions[1],
            **(given or {}),
        }
        return await in_daemon_thread(self._store, epoch, state)

    def _store(self, epoch: Epoch, state: dict[str, Any]) -> Epoch:
        self._unsaved.append((epoch, state))
        try:
            self._append_unsaved()
            self.store.set_state("ready")
        except FolderGone:
            raise
        except Exception:
            logger.warning("epoch %d is in memory, but not stored; it is tried again", epoch.index, exc_info=True)
            return epoch
        self.weights.prune()
        return self.store.epochs[-1]

    def _append_unsaved(self) -> None:
        while self._unsaved:
            self._append(*self._unsaved[0])
            self._unsaved.pop(0)

    def _append(self, epoch: Epoch, state: dict[str, Any]) -> None:
        """Stores an epoch, with less where it cannot be stored as it is. Raises StoreError where nothing can be stored at the
        moment."""
        try:
            self.store.append(epoch, state)
            return
        except UnreadableRecord as error:
            problem: Exception = error
        except StoreError:
            raise
        except Exception as error:
            problem = error
        logger.warning(
            "epoch %d cannot be stored as it is, so it is stored with less: %s", epoch.index, error_text(problem)
        )
        with noting_replaced() as replaced:
            state = plain(state)
        if replaced:
            logger.warning("epoch %d: of its state, %s became a short text", epoch.index, ", ".join(sorted(replaced)))
        try:
            self.store.append(epoch, state)
            return
        except UnreadableRecord as error:
            problem = error
        logger.warning(
            "epoch %d: its numbers are worked out again, as those that its Trainer gave cannot be stored: %s",
            epoch.index, error_text(problem),
        )  # fmt: skip
        self.store.append(recounted(epoch), state)

    def on_fork(self, index: int, run_id: str, pinned: int | None) -> None:
        """Another run continues from an epoch of this one; the checkpoint that it started from stays here."""
        if pinned is not None:
            self.weights.pin(pinned)
        self.event("forked", epoch=pinned, after=index, run=run_id)

    def journal(self, live_settings: LiveSettings) -> None:
        """Brings the journal on disk up to date, once the live settings have started from it. A handful of rows."""
        try:
            with self._journaling:
                for place, change in enumerate(live_settings.journal):
                    if place == len(self._journaled):
                        self.store.record_change(change)
                        self._journaled.append(change)
                    elif change.epoch is not None and self._journaled[place].epoch is None:
                        self.store.settle_change(place, change.epoch)
                        self._journaled[place] = change
        except Exception:
            logger.warning("a change of the live_settings could not be stored", exc_info=True)

    def event(self, kind: str, **data: Any) -> None:
        """A line of the run's log."""
        try:
            self.store.record_event(kind, **data)
        except Exception:
            logger.warning("an event could not be stored", exc_info=True)

    async def close(self, adapter: TrainerAdapter | None) -> None:
        """Stores what is left, the newest weights among it, and gives the lock back."""
        try:
            if adapter is not None:
                await self.weights.save_last(adapter)
        finally:
            await in_daemon_thread(self._close)

    def _close(self) -> None:
        try:
            self._append_unsaved()
            with suppress(FolderGone):  # all that was recorded lies where the folder is now, if anywhere
                self.store.set_state("closed")
        finally:
            self.store.close()


def restore_settings(live_settings: LiveSettings, store: RunReader) -> None:
    """Puts the live settings where the record ends."""
    state = store.state() or {}
    live_settings.restore(settings_in(state), store.journal(), store.next_index, state.get("live"))


def settings_in(state: Mapping[str, Any] | None) -> CurriculumSettings | None:
    """The live settings that a stored state speaks of."""
    return CurriculumSettings(**state["settings"]) if state and state.get("settings") else None


class EventLog(Protocol):
    def event(self, kind: str, **data: object) -> None:
        """Takes one line."""
        ...


class HeldLog:
    """Keeps lines until there is a log to take them: what is said while a model is loaded, before the run's folder is open."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, dict[str, object]]] = []

    def event(self, kind: str, **data: object) -> None:
        """Takes one line."""
        self._lines.append((kind, data))

    def pass_on(self, log: EventLog) -> None:
        """Gives the lines to that log."""
        for kind, data in self._lines:
            log.event(kind, **data)
        self._lines.clear()


_current: contextvars.ContextVar[EventLog | None] = contextvars.ContextVar("finetune_nb_run_log", default=None)


@contextmanager
def logging_to(log: EventLog) -> Iterator[None]:
    """Inside, everything that finetune_nb logs goes to `log` as well."""
    package = logging.getLogger("finetune_nb")
    if not any(isinstance(handler, _ToRun) for handler in package.handlers):
        package.addHandler(_ToRun())
    token = _current.set(log)
    try:
        yield
    finally:
        _current.reset(token)


class _ToRun(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log = _current.get()
        if log is None:
            return
        token = _current.set(None)  # a log that cannot be written says so, and must not come back here
        try:
            trace = {"traceback": record.exc_text} if record.exc_text else {}
            log.event("log", level=record.levelname, logger=record.name, text=record.getMessage(), **trace)
        except Exception:
            self.handleError(record)
        finally:
            _current.reset(token)
