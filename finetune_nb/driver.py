"""The driver: runs epochs of any Trainer and makes a record of each, by watching its builder and adapter from outside.

It lives on the engine thread and is all async; it knows Controls and records, no widget and no notebook. What a record is
made of stands in watch.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from .config import Config, CurriculumSettings
from .controls import Controls
from .curriculum import state_from_dict, state_to_dict, steer
from .errors import BackendError, ConfigError, JobFailed, RunError
from .evaluation.evaluate import EvaluationContext, Progress, evaluation_context, progress
from .evaluation.recording import ChatReply
from .interfaces import Trainer, TrainerAdapter, TrajectoryBuilder
from .observe import observe, unobserve
from .recorder import Recorder
from .redaction import redact_text, redacting_logger
from .registry import Builder
from .trajectory_builder import EvalTrajectoryBuilder
from .trial import Trial
from .types import (
    Epoch,
    RolloutFailure,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
    Validation,
)
from .watch import Watch, log_what_was_left, record, settled_late, told_by, validation_of

__all__ = ["Driver"]

logger = redacting_logger(__name__)


class Driver:
    """Drives one Trainer. All methods run on one event loop; one epoch at a time."""

    def __init__(
        self, config: Config, builder: Builder, run_id: str, controls: Controls, epochs: Sequence[Epoch] = ()
    ) -> None:
        self.config, self.builder, self.run_id, self.controls = config, builder, run_id, controls
        self.epochs: list[Epoch] = list(epochs)
        self.recorder: Recorder = None  # type: ignore[assignment]  # set by open
        self.validations: list[Validation] = []
        """Those that belong to no epoch: asked for by hand."""
        self.progress = Progress()
        self.trainer: Trainer = None  # type: ignore[assignment]  # set by open
        self.trajectory_builder: TrajectoryBuilder = None  # type: ignore[assignment]
        self.adapter: TrainerAdapter = None  # type: ignore[assignment]
        self._watch: Watch | None = None
        self._busy: str | None = None
        self._trial = Trial(config, builder, run_id)
        self._recent: deque[tuple[int, TrajectoryCollection]] = deque(maxlen=3)  # epochs that may be submitted late
        self._late: list[tuple[int, TrajectoryCollection, TrainingJobRef]] = []  # submitted after their epoch's record

    # ── opening and closing ──────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Builds the three components, initializes them and checks that the backend is healthy. Once; later calls do
        nothing."""
        if self.trainer is not None:
            return
        names = self.config.finetuning
        if names.trainer is None or names.trajectory_builder is None or names.trainer_adapter is None:
            raise ConfigError("finetuning needs trainer, trajectory_builder and trainer_adapter. Name all three.")
        trainer = await self.builder.get_trainer(names.trainer)
        self.trajectory_builder = await self.builder.get_trajectory_builder(names.trajectory_builder)
        self.adapter = await self.builder.get_trainer_adapter(names.trainer_adapter)
        await trainer.bind_components(self.trajectory_builder, self.adapter)
        await trainer.initialize(names)
        await self._trial.preflight(reads_rows=isinstance(self.trajectory_builder, EvalTrajectoryBuilder))
        if not await self.adapter.is_healthy():
            name = type(self.adapter).__name__
            raise BackendError(
                f"the training backend is not healthy: {name}.is_healthy() is False. No rollout was started. "
                "Start or repair the backend, then run the epoch again."
            )
        run = self.config.run
        self.recorder = self.recorder or await Recorder.open(
            self.folder, self.run_id, self.config.stored(), run.checkpoint_every, run.keep_checkpoints
        )
        self.epochs = list(self.recorder.store.epochs)
        state = await self.recorder.restore(self.adapter)
        if state is not None and state["curriculum"] and trainer._curriculum_state is not None:
            trainer._curriculum_state |= state_to_dict(state_from_dict(state["curriculum"]))
        self._observe(trainer)
        self.trainer = trainer

    @property
    def next_index(self) -> int:
        """The epoch that comes next."""
        return self.epochs[-1].index + 1 if self.epochs else 0

    @property
    def _version(self) -> int | None:
        """The policy's, now; None where the adapter samples from no weights of its own."""
        return getattr(self.adapter.policy, "version", None)

    @property
    def folder(self) -> Path:
        """All that the run leaves behind."""
        return Path(self.config.finetuning.output_dir) / self.run_id

    def _observe(self, trainer: Trainer) -> None:
        observe(self.trajectory_builder, "start_run", self._start_run)
        observe(self.trajectory_builder, "finalize", self._finalize)
        observe(self.adapter, "submit", self._submit)
        observe(self.adapter, "wait_until_complete", self._wait_until_complete)
        observe(trainer, "run_validation_evaluation", self._validate)
        for part, component in (("trainer", trainer), ("builder", self.trajectory_builder), ("adapter", self.adapter)):
            observe(component, "log_progress", self._logger_of(part))

    async def close(self) -> None:
        """Takes the wrappers off and ends every component, once. All are ended even if one raises."""
        if self._late:
            try:
                await asyncio.wait_for(self._settle_late_jobs(), 5.0)
            except Exception:
                logger.warning("a job that was submitted late has not ended well", exc_info=True)
        trainer, components = self.trainer, (self.trainer, self.trajectory_builder, self.adapter)
        for component in components:
            if component is not None:
                unobserve(component)
        try:
            if trainer is not None:
                await trainer.cleanup()
        finally:
            try:
                if self.recorder is not None:
                    self.recorder.journal(self.controls)
                    await self.recorder.close("closed")
            finally:
                await self.builder.close()

    # ── what a run is asked for ──────────────────────────────────────────────────────────────────────────────────────

    async def next_epoch(self) -> Epoch:
        """One epoch, recorded. A job that failed raises JobFailed, with the record in its `epoch`."""
        return await self._alone("an epoch", self._next_epoch)

    async def _next_epoch(self) -> Epoch:
        await self.open()
        self.require_single_epochs()
        await self._settle_late_jobs()
        watch = Watch(self.next_index)
        self.recorder.journal(self.controls)
        await self.recorder.begun(watch, self._version)
        self._watch = watch
        self.progress = Progress("rollouts")
        token = progress.set(self.progress)
        try:
            ref = await self.trainer.run_epoch(watch.epoch, self.run_id)
            await self._wait_for_jobs(watch, ref)
        except asyncio.CancelledError:
            await self._cancel_jobs(watch)
            raise
        except Exception as error:
            self.recorder.event("error", epoch=watch.epoch, error=redact_text(f"{type(error).__name__}: {error}"))
            if watch.collection is not None:
                epoch = await self._record(watch, error)
                if isinstance(error, JobFailed):
                    error.epoch = epoch
            raise
        finally:
            progress.reset(token)
            self._watch = None
        epoch = await self._record(watch)
        if epoch.job is not None and epoch.job.status in (TrainingStatusEnum.FAILED, TrainingStatusEnum.CANCELED):
            failure = JobFailed.of(epoch.index, epoch.job)
            failure.epoch = epoch
            raise failure
        log_what_was_left(watch, epoch, self.trainer, self.folder)
        return epoch

    @property
    def busy(self) -> bool:
        """Whether an epoch or a validation is running."""
        return self._busy is not None

    def require_single_epochs(self) -> None:
        """Raises RunError for a Trainer that trains only in its run()."""
        if self.trainer is not None and self.trainer.trains_in_run:
            raise RunError(
                f"{type(self.trainer).__name__} trains only in its run(): it offers neither single epochs nor a curriculum "
                "that can be changed while it runs."
            )

    async def validate(self) -> Validation:
        """The validation evaluation with the policy as it is now. Raises RunError without a validation dataset."""
        return await self._alone("a validation", self._validate_now)

    async def _validate_now(self) -> Validation:
        await self.open()
        run = self.config.finetuning.run_configuration
        if not run or not run.validation_dataset:
            raise RunError(
                "this run has no validation dataset: give validation=... or run_configuration.validation_dataset."
            )
        watch = self._watch = Watch(self.next_index)
        try:
            await self.trainer.run_validation_evaluation(watch.epoch, self.run_id)
        finally:
            self._watch = None
        self.validations += watch.validations
        await self.recorder.validated(watch.validations[-1])
        return watch.validations[-1]

    async def rollout(self, example: Any = 0) -> Trajectory | RolloutFailure:
        """One rollout of one example: its position in the dataset, or its id. It is not recorded in any epoch."""
        await self.open()
        return await self._trial.rollout(example)

    async def chat(self, messages: Any, **options: Any) -> ChatReply:
        """One reply of the policy to a text or to OpenAI messages."""
        await self.open()
        return await self._trial.chat(messages, **options)

    async def save_model(self, directory: str) -> str:
        await self.open()
        save = getattr(self.adapter, "save", None)
        if save is None:
            raise RunError(f"{type(self.adapter).__name__} cannot save its model: it has no save(directory).")
        saved = save(directory)
        return str(await saved if isinstance(saved, Awaitable) else saved)

    async def _alone(self, what: str, work: Callable[[], Awaitable[Any]]) -> Any:
        if self._busy:
            raise RunError(f"{self._busy} is running in this run already: await it before you start {what}.")
        self._busy = what
        try:
            return await work()
        finally:
            self._busy = None

    # ── what is seen of the components ───────────────────────────────────────────────────────────────────────────────

    async def _start_run(self, original: Callable[..., Awaitable[None]], *args: Any, **kwargs: Any) -> None:
        watch = self._watch
        if watch is not None:
            watch.version = self._version
            watch.collected = time.perf_counter()
        await original(*args, **kwargs)

    async def _finalize(
        self, original: Callable[..., Awaitable[TrajectoryCollection]], *args: Any, **kwargs: Any
    ) -> TrajectoryCollection:
        collection = await original(*args, **kwargs)
        watch = self._watch
        if watch is not None:
            watch.collection = collection
            watch.add_seconds("rollouts", watch.collected or watch.started)
            watch.collected = time.perf_counter()
            await self.recorder.collected(watch.epoch, collection, watch.seconds["rollouts"])
            watch.settings = self._steer(watch.epoch)
            self.progress.phase = "training"
        return collection

    def _steer(self, epoch: int) -> CurriculumSettings:
        """Puts the pending controls into the trainer, right before it selects."""
        settings, resumed = self.controls.apply(epoch)
        trainer = self.trainer
        if trainer._curriculum_state is not None:
            state = steer(state_from_dict(trainer._curriculum_state), settings, epoch, resumed)
            trainer._curriculum_state = {**trainer._curriculum_state, **state_to_dict(state)}
            initial = self.config.finetuning.curriculum_learning.initial_percentile
            trainer.curriculum_config = settings.to_config(initial)
        return settings

    async def _submit(
        self,
        original: Callable[..., Awaitable[TrainingJobRef]],
        trajectories: TrajectoryCollection,
        *args: Any,
        **kwargs: Any,
    ) -> TrainingJobRef:
        watch, started = self._watch, time.perf_counter()
        owner = self._owner_of(trajectories)
        if watch is not None and watch.collected is not None:
            watch.add_seconds("selection", watch.collected)
        ref = await original(trajectories, *args, **kwargs)
        if owner is not None:
            self._late.append((owner, trajectories, ref))
        elif watch is not None:
            watch.submitted.append(trajectories)
            watch.refs.append(ref)
            await self.recorder.submitted(watch.epoch, ref)
            watch.add_seconds("training", started)
        return ref

    async def _wait_until_complete(
        self, original: Callable[..., Awaitable[TrainingJobStatus]], ref: TrainingJobRef, *args: Any, **kwargs: Any
    ) -> TrainingJobStatus:
        started = time.perf_counter()
        status = await original(ref, *args, **kwargs)
        if self._watch is not None and not any(ref is late for _, _, late in self._late):
            self._watch.waited.append(ref)
            self._watch.statuses.append(status)
            self._watch.add_seconds("training", started)
        return status

    async def _validate(
        self, original: Callable[..., Awaitable[dict[str, Any]]], epoch: int, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        version = self._version
        started, before = time.perf_counter(), self.progress.phase
        self.progress.phase = "validation"
        token = evaluation_context.set(EvaluationContext("validation", version or 0))
        meter = progress.set(None)
        try:
            metrics = await original(epoch, *args, **kwargs)
        finally:
            progress.reset(meter)
            evaluation_context.reset(token)
            self.progress.phase = before
        if self._watch is not None:
            self._watch.add_seconds("validation", started)
            self._watch.validations.append(validation_of(epoch, version, metrics, time.perf_counter() - started))
        return metrics

    def _logger_of(self, part: str) -> Callable[..., None]:
        def log_progress(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            if self._watch is not None:
                self._watch.logged.add(part)
            original(*args, **kwargs)

        return log_progress

    # ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _wait_for_jobs(self, watch: Watch, ref: TrainingJobRef | None) -> None:
        """Waits for every job that the trainer left behind."""
        if ref is not None and not any(ref is seen or ref == seen for seen in watch.refs):
            watch.refs.append(ref)
        for unwaited in watch.unwaited():
            await self.adapter.wait_until_complete(unwaited)

    async def _settle_late_jobs(self) -> None:
        """Jobs that were submitted after their epoch's record: waited for, and put into that record."""
        while self._late:
            owner, trajectories, ref = self._late.pop(0)
            status = await self.adapter.wait_until_complete(ref)
            place = next(i for i, epoch in enumerate(self.epochs) if epoch.index == owner)
            self.epochs[place] = await self.recorder.amended(settled_late(self.epochs[place], trajectories, status))

    async def _cancel_jobs(self, watch: Watch) -> None:
        cancel = getattr(self.adapter, "cancel", None)
        for ref in watch.unwaited():
            if cancel is not None:
                await cancel(ref)
        aclose = getattr(self.trajectory_builder, "aclose", None)
        if aclose is not None:
            await aclose()

    def _owner_of(self, trajectories: TrajectoryCollection) -> int | None:
        """The recorded epoch to which submitted trajectories belong; None for those of the running one."""
        first = next((t for group in trajectories.trajectories for t in group), None)
        for index, collection in self._recent:
            if any(first is t for group in collection.trajectories for t in group):
                return index
        return None

    async def _record(self, watch: Watch, error: Exception | None = None) -> Epoch:
        state = state_from_dict(self.trainer._curriculum_state) if self.trainer._curriculum_state else None
        epoch = record(
            watch,
            self.run_id,
            told_by(self.trainer),
            watch.settings or self.controls.applied,
            state,
            self._version,
            error,
        )
        self.controls.settle(epoch.curriculum.percentile)
        self._recent.append((epoch.index, epoch.collection))
        self.recorder.journal(self.controls)
        epoch = await self.recorder.ended(epoch, self.adapter, self.trainer._curriculum_state, self.controls.applied)
        self.epochs.append(epoch)
        return epoch
