"""The witness: sees from outside what any Trainer does with its builder and adapter, and puts the live settings in
before it selects.

It wraps methods of the instances, fills in the Watch of the running epoch and tells the recorder. Running an epoch is
driver.py's, the record that comes of it watch.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from ..components.builder import Builder
from ..config.sections import section_of
from ..hooks import observe, unobserve
from ..interfaces import Trainer
from ..redaction import redact_text
from ..rollouts.evaluation import EvaluationContext, evaluation_context, progress
from ..training.curriculum import state_from_dict, state_to_dict, steer
from ..training.trainer import EpochTrainer
from ..types import (
    CurriculumSettings,
    CurriculumState,
    Epoch,
    TrainingJobRef,
    TrainingJobStatus,
    TrajectoryCollection,
)
from .epoch_record import Watch, record, settled_late, told_by, validation_of
from .live_settings import Controls, put
from .run_writer import Recorder
from .state import Standing

__all__ = [
    "Witness",
    "curriculum_of",
    "set_curriculum",
]

ASK_EVERY = 1.0
"""Seconds between two questions to an adapter how far its job is."""
KEEP_EVERY = 2.0
"""Seconds between two batches of rollouts that are put into the folder as they come in."""


def curriculum_of(trainer: Trainer) -> CurriculumState | None:
    """Where a Trainer's curriculum stands; None for a Trainer that keeps no state of one.

    Raises:
        ConfigError: Its `_curriculum_state` is not what `Trainer.initialize` makes.
    """
    if not trainer._curriculum_state:
        return None
    return state_from_dict(trainer._curriculum_state)


def set_curriculum(trainer: Trainer, state: CurriculumState, settings: CurriculumSettings | None = None) -> None:
    """Puts a curriculum into a Trainer, ours or somebody else's. Does nothing to one that keeps no state of it.

    Args:
        trainer: Keys of its own in its `_curriculum_state` stay.
        state: Where the curriculum stands.
        settings: What the next selection uses. Default: what the trainer has.
    """
    if trainer._curriculum_state is None:
        return
    trainer._curriculum_state |= state_to_dict(state)
    if settings is None:
        return
    trainer.curriculum_config = section_of(settings, trainer.run_config.curriculum_learning.initial_percentile)
    if isinstance(trainer, EpochTrainer):
        # The section has no field for percentile and schedule; a Trainer of ours takes the settings themselves.
        trainer.curriculum_settings = settings


class Witness:
    """Watches one trainer with its builder and adapter. `run_id`: of the records. All on one event loop."""

    def __init__(
        self,
        trainer: Trainer,
        run_id: str,
        controls: Controls,
        standing: Standing,
        recorder: Recorder,
        components: Builder,
    ) -> None:
        self.trainer, self.builder, self.adapter = trainer, trainer.trajectory_builder, trainer.trainer_adapter
        self.run_id, self.controls, self.standing, self.recorder = run_id, controls, standing, recorder
        self._components, self._config = components, components.config
        self.watch: Watch | None = None
        """What is seen of the running epoch."""
        self._recent: deque[tuple[int, TrajectoryCollection]] = deque(maxlen=3)  # epochs that may be submitted late
        self._late: list[tuple[int, TrajectoryCollection, TrainingJobRef]] = []  # submitted after their epoch's record
        self._ask = self.adapter.status
        observe(self.builder, "start_run", self._start_run)
        observe(self.builder, "finalize", self._finalize)
        observe(self.adapter, "submit", self._submit)
        observe(self.adapter, "status", self._status)
        observe(self.adapter, "wait_until_complete", self._wait_until_complete)
        observe(trainer, "run_validation_evaluation", self._validate)
        for part, component in (("trainer", trainer), ("builder", self.builder), ("adapter", self.adapter)):
            observe(component, "log_progress", self._logger_of(part))

    def leave(self) -> None:
        """Takes the wrappers off."""
        for component in (self.trainer, self.builder, self.adapter):
            unobserve(component)

    @contextlib.contextmanager
    def watching(self, watch: Watch) -> Iterator[Watch]:
        """Everything that is seen inside belongs to this epoch."""
        self.watch = watch
        token = progress.set(watch.progress)
        try:
            yield watch
        finally:
            progress.reset(token)
            self.watch = None

    @property
    def version(self) -> int | None:
        """The policy's, now; None where the adapter samples from no weights of its own."""
        return getattr(self.adapter.policy, "version", None)

    # ── collecting ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _start_run(self, original: Callable[..., Awaitable[None]], *args: Any, **kwargs: Any) -> None:
        watch = self.watch
        if watch is not None:
            await self._pass_gate(watch)
            self._put("rollouts", watch)
            watch.version = self.version
            watch.collected = time.perf_counter()
            watch.progress.gate = self.standing.gate
            if hasattr(self.builder, "unscored"):
                watch.progress.on_result = watch.came_in.append
                watch.keeping = asyncio.create_task(self._keep_rollouts(watch))
        await original(*args, **kwargs)

    async def _keep_rollouts(self, watch: Watch) -> None:
        while not watch.all_in.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watch.all_in.wait(), KEEP_EVERY)
            if not watch.all_in.is_set():
                await self._keep(watch)

    async def _keep(self, watch: Watch) -> None:
        results, watch.came_in[:] = list(watch.came_in), []
        if results:
            unscored = self.builder.unscored  # type: ignore[attr-defined]  # asked for in _start_run
            await self.recorder.came_in(watch.epoch, [lambda r=r: unscored(r, self.run_id) for r in results])

    async def _finalize(
        self, original: Callable[..., Awaitable[TrajectoryCollection]], *args: Any, **kwargs: Any
    ) -> TrajectoryCollection:
        collection = await original(*args, **kwargs)
        watch = self.watch
        if watch is not None:
            await watch.end_keeping()
            watch.came_in.clear()
            everything = watch.collect(collection, joined=self.trainer.trains_in_run)
            watch.add_seconds("rollouts", watch.collected or watch.started)
            watch.collected = time.perf_counter()
            watch.kept = await self.recorder.collected(
                watch.epoch, everything, watch.seconds["rollouts"], self.adapter.finds_jobs_again
            )
            await self._pass_gate(watch)
            watch.settings = self._steer(watch.epoch)
            self.recorder.journal(self.controls)
            watch.progress.phase = "training"
        return collection

    async def keep_what_came(self, watch: Watch) -> None:
        """Puts the rollouts of an epoch that does not come to its end into the folder, so that they can be looked at."""
        await watch.end_keeping()
        if watch.collection is None:
            await self._keep(watch)
        elif not watch.kept:
            await self.recorder.collected(watch.epoch, watch.collection)

    async def _pass_gate(self, watch: Watch) -> None:
        """A safe point: a paused run stays here."""
        paused = await self.standing.gate()
        if paused:
            watch.seconds["paused"] = watch.seconds.get("paused", 0.0) + paused
            if watch.collected is not None:
                watch.collected += paused  # it belongs to no part of the epoch

    def _put(self, safe_point: str, watch: Watch) -> None:
        """Puts the pending live fields into the components, at their safe point."""
        changed = self.controls.take(safe_point, watch.epoch)
        if changed:
            put(self._config, self._components, changed)

    def _steer(self, epoch: int) -> CurriculumSettings:
        """Puts the pending controls into the trainer, right before it selects."""
        settings, resumed = self.controls.apply(epoch)
        state = curriculum_of(self.trainer)
        if state is not None:
            set_curriculum(self.trainer, steer(state, settings, epoch, resumed), settings)
        return settings

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _submit(
        self,
        original: Callable[..., Awaitable[TrainingJobRef]],
        trajectories: TrajectoryCollection,
        *args: Any,
        **kwargs: Any,
    ) -> TrainingJobRef:
        watch, started = self.watch, time.perf_counter()
        owner = self._owner_of(trajectories)
        if owner is not None or watch is None:
            ref = await original(trajectories, *args, **kwargs)
            if owner is not None:
                self._late.append((owner, trajectories, ref))
            return ref
        if watch.collected is not None:
            watch.add_seconds("selection", watch.collected)
        self._put("training", watch)
        if watch.kept:  # the folder has the rollouts: then also what was chosen of them
            watch.submitted.append(trajectories)
            await self.recorder.selected(watch.epoch, self.record(watch).selection, watch.seconds)
            watch.submitted.pop()
        ref = await original(trajectories, *args, **kwargs)
        watch.submitted.append(trajectories)
        watch.refs.append(ref)
        await self.recorder.submitted(watch.epoch, ref)
        watch.add_seconds("training", started)
        return ref

    async def _wait_until_complete(
        self, original: Callable[..., Awaitable[TrainingJobStatus]], ref: TrainingJobRef, *args: Any, **kwargs: Any
    ) -> TrainingJobStatus:
        started = time.perf_counter()
        with self._asking_how_far(ref):
            status = await original(ref, *args, **kwargs)
        watch = self.watch
        if watch is not None and not any(ref is late for _, _, late in self._late):
            watch.waited.append(ref)
            watch.statuses.append(status)
            watch.add_seconds("training", started)
            if status != watch.stands:
                await self.recorder.waited(watch.epoch, status)
        return status

    @contextlib.contextmanager
    def _asking_how_far(self, ref: TrainingJobRef) -> Iterator[None]:
        """Shows how far the job is, while somebody waits for it."""
        watch = self.watch

        async def ask() -> None:
            with contextlib.suppress(Exception):  # what is only shown holds up nothing
                while watch is not None:
                    _show_job(watch, await self._ask(ref))
                    await asyncio.sleep(ASK_EVERY)

        if not getattr(self.adapter, "status_is_cheap", False):
            yield
            return
        asking = asyncio.create_task(ask())
        try:
            yield
        finally:
            asking.cancel()

    async def _status(
        self, original: Callable[..., Awaitable[TrainingJobStatus]], ref: TrainingJobRef, *args: Any, **kwargs: Any
    ) -> TrainingJobStatus:
        """Whoever asks how the running epoch's job stands: what is new in the answer goes into the folder."""
        status, watch = await original(ref, *args, **kwargs), self.watch
        if watch is not None:
            _show_job(watch, status)
        if watch is not None and status != watch.stands and any(ref is known or ref == known for known in watch.refs):
            watch.stands = status
            await self.recorder.waited(watch.epoch, status)
        return status

    async def wait_for_jobs(self, watch: Watch, ref: TrainingJobRef | None) -> None:
        """Waits for every job that the trainer left behind."""
        if ref is not None and not any(ref is seen or ref == seen for seen in watch.refs):
            watch.refs.append(ref)
        for unwaited in watch.unwaited():
            await self.adapter.wait_until_complete(unwaited)

    async def cancel_jobs(self, watch: Watch) -> None:
        """Ends what the running epoch has going, on both sides."""
        cancel = getattr(self.adapter, "cancel", None)
        for ref in watch.unwaited():
            if cancel is not None:
                await cancel(ref)
        aclose = getattr(self.builder, "aclose", None)
        if aclose is not None:
            await aclose()

    async def _validate(
        self, original: Callable[..., Awaitable[dict[str, Any]]], epoch: int, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        watch, version, started = self.watch or Watch(epoch), self.version, time.perf_counter()
        before, watch.progress.phase = watch.progress.phase, "validation"
        token = evaluation_context.set(EvaluationContext("validation", version or 0))
        meter = progress.set(None)
        try:
            metrics = await original(epoch, *args, **kwargs)
        finally:
            progress.reset(meter)
            evaluation_context.reset(token)
            watch.progress.phase = before
        watch.add_seconds("validation", started)
        watch.validations.append(validation_of(epoch, version, metrics, time.perf_counter() - started))
        await self.recorder.validated(watch.validations[-1], watch.epoch if watch.begun else None)
        return metrics

    def _logger_of(self, part: str) -> Callable[..., None]:
        def log_progress(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            if self.watch is not None:
                self.watch.logged.add(part)
            original(*args, **kwargs)

        return log_progress

    # ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def record(self, watch: Watch, error: Exception | None = None) -> Epoch:
        """The record of the epoch, as it stands."""
        settings = watch.settings or self.controls.applied
        told = watch.told or told_by(self.trainer)
        return record(watch, self.run_id, told, settings, curriculum_of(self.trainer), self.version, error)

    def recorded(self, epoch: Epoch) -> None:
        """Jobs for its trajectories may still be submitted."""
        self._recent.append((epoch.index, epoch.collection))

    async def settle_late_jobs(self, epochs: list[Epoch]) -> None:
        """Jobs that were submitted after their epoch's record: waited for, and put into that record."""
        while self._late:
            owner, trajectories, ref = self._late.pop(0)
            status = await self.adapter.wait_until_complete(ref)
            place = next(i for i, epoch in enumerate(epochs) if epoch.index == owner)
            epochs[place] = await self.recorder.amended(settled_late(epochs[place], trajectories, status))

    def _owner_of(self, trajectories: TrajectoryCollection) -> int | None:
        """The recorded epoch to which submitted trajectories belong; None for those of the running one."""
        first = next((t for group in trajectories.trajectories for t in group), None)
        for index, collection in self._recent:
            if any(first is t for group in collection.trajectories for t in group):
                return index
        return None


def _show_job(watch: Watch, status: TrainingJobStatus) -> None:
    watch.progress.trained, watch.progress.job = status.progress or 0.0, redact_text(status.message or "")
