"""Observes from outside what any Trainer does with its builder and adapter, and applies the live settings before it
selects.

Methods of the instances are wrapped, and unwrapped when the run closes. What they do is noted in the EpochInProgress and written
to the run's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from ..components.builder import Builder
from ..config.sections import section_of
from ..errors import RunError
from ..hooks import unwrap_methods, wrap_method
from ..interfaces import Trainer
from ..redaction import redact_text, redacting_logger
from ..rollouts.evaluation import EvaluationContext, Progress, evaluation_context, progress
from ..training.curriculum import state_from_dict, state_to_dict, steer
from ..training.trainer import EpochTrainer
from ..types import (
    CurriculumSettings,
    CurriculumState,
    Demonstrations,
    Epoch,
    TrainingJobRef,
    TrainingJobStatus,
    Trajectory,
    TrajectoryCollection,
    WarmUpSettings,
    as_float,
)
from ..user_code import contained
from .epoch_record import EpochInProgress, record, report_of, report_of_all, settled_late, validation_of
from .live_settings import LiveSettings, write_live_values
from .run_writer import RunWriter
from .state import RunState

__all__ = [
    "TrainerObserver",
    "curriculum_of",
    "set_curriculum",
]

T = TypeVar("T")
ASK_EVERY = 1.0
"""Seconds between two questions to an adapter how far its job is."""
KEEP_EVERY = 2.0
"""Seconds between two batches of rollouts that are put into the folder as they come in."""
PATIENCE = 5.0
"""Seconds that a component gets to end what an aborted epoch has begun."""
logger = redacting_logger(__name__)


def curriculum_of(trainer: Trainer) -> CurriculumState | None:
    """The state of a Trainer's curriculum; None for a Trainer that keeps no state of one.

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
        state: The state of the curriculum.
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


class TrainerObserver:
    """Watches one trainer with its builder and adapter. `run_id`: of the records. All on one event loop."""

    def __init__(
        self,
        trainer: Trainer,
        run_id: str,
        live_settings: LiveSettings,
        state: RunState,
        writer: RunWriter,
        components: Builder,
    ) -> None:
        self.trainer, self.trajectory_builder, self.adapter = (
            trainer,
            trainer.trajectory_builder,
            trainer.trainer_adapter,
        )
        self.run_id, self.live_settings, self.state, self.writer = run_id, live_settings, state, writer
        self._components, self._config = components, components.config
        self.in_progress: EpochInProgress | None = None
        """What is seen of the running epoch."""
        self.ahead: EpochInProgress | None = None
        """The same of the epoch after it, once its rollouts have begun."""
        self._recent: deque[tuple[int, dict[int, weakref.ref[Trajectory]]]] = deque(maxlen=3)
        """Epochs whose trajectories may be submitted late: their number, and the trajectories by identity. Who submits them
        holds them; nothing here keeps an epoch in memory."""
        self._late: list[tuple[int, TrajectoryCollection, TrainingJobRef]] = []  # submitted after their epoch's record
        self._ask = self.adapter.status
        wrap_method(self.trajectory_builder, "start_run", self._start_run)
        wrap_method(self.trajectory_builder, "finalize", self._finalize)
        wrap_method(self.adapter, "submit", self._submit)
        wrap_method(self.adapter, "status", self._status)
        wrap_method(self.adapter, "wait_until_complete", self._wait_until_complete)
        wrap_method(trainer, "run_validation_evaluation", self._validate)
        for part, component in (("trainer", trainer), ("builder", self.trajectory_builder), ("adapter", self.adapter)):
            wrap_method(component, "log_progress", self._logger_of(part))

    def detach(self) -> None:
        """Takes the wrappers off."""
        for component in (self.trainer, self.trajectory_builder, self.adapter):
            unwrap_methods(component)

    @contextlib.contextmanager
    def observing(self, in_progress: EpochInProgress) -> Iterator[EpochInProgress]:
        """Everything that is seen inside belongs to this epoch."""
        self.in_progress = in_progress
        if in_progress.progress.on_result is not None:  # its rollouts began ahead of it
            in_progress.keeping = asyncio.create_task(self._keep_rollouts(in_progress))
        token = progress.set(in_progress.progress)
        try:
            yield in_progress
        finally:
            progress.reset(token)
            self.in_progress = None
            # Contexts of tasks that outlive the epoch have its progress; they must not keep its rollouts.
            in_progress.progress.on_result = None

    @property
    def version(self) -> int | None:
        """The policy's, now; None where the adapter samples from no weights of its own."""
        return getattr(self.adapter.policy, "version", None)

    # ── collecting ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _start_run(self, original: Callable[..., Awaitable[None]], *args: Any, **kwargs: Any) -> None:
        in_progress = self.in_progress
        meta = kwargs.get("meta") or (args[1] if len(args) > 1 else None) or {}
        if in_progress is not None and meta.get("epoch") == in_progress.epoch + 1 and "policy_version" in meta:
            await self._start_ahead(EpochInProgress(in_progress.epoch + 1, version=meta["policy_version"]))
        elif in_progress is not None:
            await self._pass_gate(in_progress)
            self._put("rollouts", in_progress)
            in_progress.collected = time.perf_counter()
            if in_progress.given is not None:
                return
            in_progress.version = self.version
            in_progress.progress.gate = self.state.wait_while_paused
            if hasattr(self.trajectory_builder, "unscored"):
                in_progress.progress.on_result = in_progress.on_result
                in_progress.keeping = asyncio.create_task(self._keep_rollouts(in_progress))
        await original(*args, **kwargs)

    async def _start_ahead(self, ahead: EpochInProgress) -> None:
        """The next epoch's rollouts begin, while the running epoch trains. They are put into the folder once that has ended."""
        ahead.ahead = True
        ahead.progress = Progress("rollouts", gate=self.state.wait_while_paused)
        if hasattr(self.trajectory_builder, "unscored"):
            ahead.progress.on_result = ahead.on_result
        self.ahead = ahead
        progress.set(ahead.progress)  # of the task that begins them
        await self._pass_gate(ahead)
        self._put("rollouts", ahead)
        ahead.collected = time.perf_counter()

    def take_ahead(self, epoch: int) -> EpochInProgress | None:
        """That epoch, if its rollouts have begun: it is the one that runs now."""
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead.epoch != epoch:
            return None
        ahead.seconds["ahead"] = time.perf_counter() - ahead.started
        return ahead

    async def end_ahead(self) -> None:
        """Ends rollouts that have begun for an epoch that is not run."""
        ahead, self.ahead = self.ahead, None
        if isinstance(self.trainer, EpochTrainer):
            await self._end("end_ahead of the trainer", self.trainer.end_ahead())
        if ahead is not None:
            logger.warning(
                "epoch %d is not run now: %d rollouts that had ended ahead of it are dropped, and sampled again when it is",
                ahead.epoch, ahead.progress.done,
            )  # fmt: skip

    async def _keep_rollouts(self, in_progress: EpochInProgress) -> None:
        while not in_progress.all_in.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(in_progress.all_in.wait(), KEEP_EVERY)
            if not in_progress.all_in.is_set():
                await self._keep(in_progress)

    async def _keep(self, in_progress: EpochInProgress) -> None:
        results, in_progress.came_in[:] = list(in_progress.came_in), []
        if results:
            unscored = self.trajectory_builder.unscored  # type: ignore[attr-defined]  # asked for in _start_run
            await self.writer.on_rollouts(in_progress.epoch, [lambda r=r: unscored(r, self.run_id) for r in results])

    async def _finalize(
        self, original: Callable[..., Awaitable[TrajectoryCollection]], *args: Any, **kwargs: Any
    ) -> TrajectoryCollection:
        builder, in_progress = self.trajectory_builder, self.in_progress
        waited_from = time.perf_counter()
        all_in = None if in_progress is None else in_progress.all_in_before()
        if in_progress is not None and in_progress.given is not None:
            collection = in_progress.given
        else:
            collection = _expect(TrajectoryCollection, await original(*args, **kwargs), builder, "finalize")
        if in_progress is not None:
            await in_progress.end_keeping()
            in_progress.came_in.clear()
            everything = in_progress.collect(collection, joined=self.trainer.trains_in_run)
            in_progress.find_lag(self.version)
            in_progress.add_seconds("rollouts", in_progress.collected or in_progress.started)
            if all_in is not None:  # and then waited for the epoch before
                in_progress.seconds["rollouts"] -= waited_from - all_in
            in_progress.collected = time.perf_counter()
            in_progress.kept = in_progress.kept or await self.writer.on_collected(
                in_progress.epoch, everything, in_progress.seconds["rollouts"], self.adapter.finds_jobs_again
            )
            await self._pass_gate(in_progress)
            in_progress.settings = self._steer(in_progress.epoch)
            self.writer.journal(self.live_settings)
            in_progress.progress.phase = "training"
        return collection

    async def keep_what_came(self, in_progress: EpochInProgress) -> None:
        """Puts the rollouts of an unfinished epoch into the folder, so that they can be looked at."""
        await in_progress.end_keeping()
        if in_progress.collection is None:
            await self._keep(in_progress)
        elif not in_progress.kept:
            await self.writer.on_collected(in_progress.epoch, in_progress.collection)

    async def _pass_gate(self, in_progress: EpochInProgress) -> None:
        """A safe point: a paused run stays here."""
        paused = await self.state.wait_while_paused()
        if paused:
            in_progress.seconds["paused"] = in_progress.seconds.get("paused", 0.0) + paused
            if in_progress.collected is not None:
                in_progress.collected += paused  # it belongs to no part of the epoch

    def _put(self, safe_point: str, in_progress: EpochInProgress) -> None:
        """Puts the pending live fields into the components, at their safe point."""
        changed = self.live_settings.take_live(safe_point, in_progress.epoch)
        if changed:
            write_live_values(self._config, self._components, changed)

    def _steer(self, epoch: int) -> CurriculumSettings:
        """Puts the pending settings into the trainer, right before it selects."""
        settings, resumed = self.live_settings.apply(epoch)
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
        in_progress, started = self.in_progress, time.perf_counter()
        owner = self._owner_of(trajectories)
        if owner is not None or in_progress is None:
            ref = await original(trajectories, *args, **kwargs)
            if owner is not None:
                self._late.append((owner, trajectories, ref))
            return ref
        if in_progress.collected is not None:
            in_progress.add_seconds("selection", in_progress.collected)
        self._put("training", in_progress)
        if in_progress.kept:  # the folder has the rollouts: then also what was chosen of them
            in_progress.submitted.append(trajectories)
            await self.writer.on_selected(in_progress.epoch, self.record(in_progress).selection, in_progress.seconds)
            in_progress.submitted.pop()
        ref = _expect(TrainingJobRef, await original(trajectories, *args, **kwargs), self.adapter, "submit")
        in_progress.submitted.append(trajectories)
        in_progress.refs.append(ref)
        await self.writer.on_submitted(in_progress.epoch, ref)
        in_progress.add_seconds("training", started)
        return ref

    async def submit_chosen(self, chosen: TrajectoryCollection, in_progress: EpochInProgress) -> TrainingJobRef:
        """Hands over rollouts that somebody chose, which are all that the running epoch has."""
        return await self._submit_given(chosen, self.adapter.submit_chosen, in_progress, chosen)

    async def submit_demonstrations(
        self,
        demonstrations: Demonstrations,
        held_out: Demonstrations,
        settings: WarmUpSettings,
        in_progress: EpochInProgress,
    ) -> TrainingJobRef:
        """Hands over demonstrations. The running epoch has no rollouts."""
        nothing = TrajectoryCollection(trajectories=[], run_id=self.run_id)
        submit = self.adapter.submit_demonstrations
        return await self._submit_given(nothing, submit, in_progress, self.run_id, demonstrations, held_out, settings)

    async def _submit_given(
        self,
        chosen: TrajectoryCollection,
        submit: Callable[..., Awaitable[TrainingJobRef]],
        in_progress: EpochInProgress,
        *args: Any,
    ) -> TrainingJobRef:
        """Hands over what is not sampled in the running epoch. chosen: the rollouts that it then has."""
        started = time.perf_counter()
        in_progress.version = self.version
        in_progress.progress.phase = "training"
        self._put("training", in_progress)
        ref = _expect(TrainingJobRef, await submit(*args), self.adapter, submit.__name__)
        in_progress.collect(chosen, joined=False)
        if not any(ref is seen for seen in in_progress.refs):  # submit_chosen may have called submit
            in_progress.submitted.append(chosen)
            in_progress.refs.append(ref)
        in_progress.report = report_of_all(chosen, self.live_settings.applied, curriculum_of(self.trainer))
        await self.writer.on_submitted(in_progress.epoch, ref)
        in_progress.add_seconds("training", started)
        return ref

    async def _wait_until_complete(
        self, original: Callable[..., Awaitable[TrainingJobStatus]], ref: TrainingJobRef, *args: Any, **kwargs: Any
    ) -> TrainingJobStatus:
        started = time.perf_counter()
        with self._asking_how_far(ref):
            status = _expect(
                TrainingJobStatus, await original(ref, *args, **kwargs), self.adapter, "wait_until_complete"
            )
        in_progress = self.in_progress
        if in_progress is not None and not any(ref is late for _, _, late in self._late):
            in_progress.waited.append(ref)
            in_progress.statuses.append(status)
            in_progress.add_seconds("training", started)
            if status != in_progress.last_status:
                await self.writer.on_job_status(in_progress.epoch, status)
        return status

    @contextlib.contextmanager
    def _asking_how_far(self, ref: TrainingJobRef) -> Iterator[None]:
        """Shows how far the job is, while somebody waits for it."""
        in_progress = self.in_progress

        async def ask() -> None:
            with contextlib.suppress(Exception):  # what is only shown holds up nothing
                while in_progress is not None:
                    _show_job(in_progress, await self._ask(ref))
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
        """Wraps each request for the status of the running epoch's job: what is new in the answer goes into the folder."""
        status = _expect(TrainingJobStatus, await original(ref, *args, **kwargs), self.adapter, "status")
        in_progress = self.in_progress
        if in_progress is not None:
            _show_job(in_progress, status)
        if (
            in_progress is not None
            and status != in_progress.last_status
            and any(ref is known or ref == known for known in in_progress.refs)
        ):
            in_progress.last_status = status
            await self.writer.on_job_status(in_progress.epoch, status)
        return status

    async def wait_for_jobs(self, in_progress: EpochInProgress, ref: TrainingJobRef | None) -> None:
        """Waits for every job that the trainer did not wait for."""
        if ref is not None and not any(ref is seen or ref == seen for seen in in_progress.refs):
            in_progress.refs.append(ref)
        for unwaited in in_progress.unwaited():
            await self.adapter.wait_until_complete(unwaited)

    async def cancel_jobs(self, in_progress: EpochInProgress) -> None:
        """Ends what the running epoch has going, on both sides."""
        cancel = getattr(self.adapter, "cancel", None)
        for ref in in_progress.unwaited():
            if cancel is not None:
                await self._end("cancel of the adapter", cancel(ref))
        await self.end_collecting()

    async def end_collecting(self) -> None:
        """Ends what the builder has begun, so that it can begin the next epoch."""
        aclose = getattr(self.trajectory_builder, "aclose", None)
        if aclose is not None:
            await self._end("aclose of the builder", aclose())

    @staticmethod
    async def _end(what: str, work: Awaitable[None]) -> None:
        """Ends something of an aborted epoch; it is aborted whether or not that works."""
        try:
            await contained(what, work, PATIENCE)
        except Exception:
            logger.warning("%s failed", what, exc_info=True)

    async def _validate(
        self, original: Callable[..., Awaitable[dict[str, Any]]], epoch: int, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        in_progress, version, started = self.in_progress or EpochInProgress(epoch), self.version, time.perf_counter()
        before, in_progress.progress.phase = in_progress.progress.phase, "validation"
        token = evaluation_context.set(EvaluationContext("validation", version or 0))
        meter = progress.set(None)
        try:
            metrics = await original(epoch, *args, **kwargs)
        finally:
            progress.reset(meter)
            evaluation_context.reset(token)
            in_progress.progress.phase = before
        in_progress.add_seconds("validation", started)
        in_progress.validations.append(validation_of(epoch, version, metrics, time.perf_counter() - started))
        await self.writer.on_validation(in_progress.validations[-1], in_progress.epoch if in_progress.begun else None)
        return metrics

    def _logger_of(self, part: str) -> Callable[..., None]:
        def log_progress(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            if self.in_progress is not None:
                self.in_progress.logged.add(part)
            original(*args, **kwargs)

        return log_progress

    # ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def record(self, in_progress: EpochInProgress, error: Exception | None = None) -> Epoch:
        """The record of the epoch so far."""
        settings = in_progress.settings or self.live_settings.applied
        told = in_progress.report or report_of(self.trainer)
        return record(in_progress, self.run_id, told, settings, curriculum_of(self.trainer), self.version, error)

    def remember(self, epoch: Epoch) -> None:
        """Jobs for its trajectories may still be submitted."""
        trajectories = (each for group in epoch.collection.trajectories for each in group)
        self._recent.append((epoch.index, {id(each): weakref.ref(each) for each in trajectories}))

    async def settle_late_jobs(self, epochs: list[Epoch]) -> None:
        """Jobs that were submitted after their epoch's record: waited for, and put into that record."""
        while self._late:
            owner, trajectories, ref = self._late.pop(0)
            status = await self.adapter.wait_until_complete(ref)
            place = next(i for i, epoch in enumerate(epochs) if epoch.index == owner)
            epochs[place] = await self.writer.update_epoch(settled_late(epochs[place], trajectories, status))

    def _owner_of(self, trajectories: TrajectoryCollection) -> int | None:
        """The recorded epoch to which submitted trajectories belong; None for those of the running one."""
        first = next((t for group in trajectories.trajectories for t in group), None)
        for index, known in self._recent:
            found = known.get(id(first))
            if first is not None and found is not None and found() is first:
                return index
        return None


def _expect(kind: type[T], value: T, component: Any, method: str) -> T:
    """The value that a component's method returned. Raises RunError for one of another kind, before it gets anywhere."""
    if not isinstance(value, kind):
        raise RunError(
            f"{type(component).__name__}.{method}() returned a {type(value).__name__}; expected a {kind.__name__}. Return one."
        )
    return value


def _show_job(in_progress: EpochInProgress, status: TrainingJobStatus) -> None:
    # A status that was made by model_copy or model_construct may hold anything.
    progress, message = as_float(status.progress), status.message
    in_progress.progress.trained = 0.0 if math.isnan(progress) else progress
    in_progress.progress.job = redact_text(message) if isinstance(message, str) else ""
