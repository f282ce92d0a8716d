"""Runs epochs with any Trainer, one at a time, and records each of them.

Everything here is async and runs on the run's own thread. Nothing here imports a widget or IPython.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ..components.builder import Builder
from ..config.sections import Config, overlap_problem
from ..errors import BackendError, ConfigError, JobFailed, RunError, UnknownJob
from ..interfaces import Trainer, TrainerAdapter, TrajectoryBuilder
from ..llms.call_recorder import CallRecorder
from ..llms.client import LLM, ChatReply, PolicyLLM
from ..redaction import error_text, redacting_logger
from ..rewards.functions import needs_group
from ..rewards.scoring import check_evaluator
from ..rollouts.difficulty import Visits
from ..rollouts.evaluation import EvaluationContext, Progress, dataset_of, evaluation_context, workflow_of
from ..rollouts.trajectory_builder import EvalTrajectoryBuilder, EvalTrajectoryBuilderConfig
from ..store.reader import PartialEpoch
from ..store.store import FolderGone
from ..text import count, short, text_of
from ..threads import in_daemon_thread
from ..training.curriculum import state_from_dict
from ..training.trainer import EpochTrainer
from ..types import (
    RESCORED,
    WARM_UP,
    Change,
    CurriculumSettings,
    CurriculumState,
    Demonstrations,
    EpisodeKey,
    Epoch,
    EvalInputItem,
    RolloutFailure,
    TrainingJobRef,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
    Validation,
    WarmUpSettings,
)
from ..user_code import contained
from .continuation import (
    changes_since,
    fingerprints,
    given_components,
    recorded_components,
    require_components,
    reward_digest,
)
from .epoch_record import EpochInProgress, log_what_was_left
from .examples_seen import SeenExamples
from .garbage import older_objects_set_aside
from .live_settings import CHOSEN, LiveSettings, write_live_values
from .observer import TrainerObserver, set_curriculum
from .run_writer import HeldLog, RunWriter, logging_to, restore_settings
from .sinks import MetricsSink, SinkDispatcher
from .state import RunState

__all__ = [
    "Driver",
    "Playground",
]

T = TypeVar("T")
PATIENCE = 30.0
"""Seconds that a Trainer and its components get to clean up after an abort."""
logger = redacting_logger(__name__)


_owners: dict[int, weakref.ref[Driver]] = {}
"""The run that has a component: id of the component -> its driver."""


class Driver:
    """Drives one Trainer. All methods run on one event loop; one epoch at a time."""

    def __init__(
        self,
        config: Config,
        components: Builder,
        run_id: str,
        live_settings: LiveSettings,
        state: RunState,
        epochs: Sequence[Epoch] = (),
        first: int = 0,
    ) -> None:
        self.config, self.components, self.run_id = config, components, run_id
        components.run_folder = self.folder
        self.live_settings, self.state = live_settings, state
        self.epochs: list[Epoch] = list(epochs)
        self._first = first  # the epoch that comes next where there is none yet: of a fork the one after its parent's
        self.writer: RunWriter = None  # type: ignore[assignment]  # set by open
        self.progress = Progress()
        self.trainer: Trainer = None  # type: ignore[assignment]  # set by open
        self.trajectory_builder: TrajectoryBuilder = None  # type: ignore[assignment]
        self.adapter: TrainerAdapter = None  # type: ignore[assignment]
        self._observer: TrainerObserver = None  # type: ignore[assignment]  # set by open
        self._left: PartialEpoch | None = None  # begun by a process that has ended
        self._playground = Playground(config, components, run_id)
        self._claimed: list[Any] = []
        self._seen = SeenExamples()
        self._given: dict[str, Any] = {}  # what the run was given, for whoever continues it
        self.sinks: list[MetricsSink] = []
        self._sink_dispatcher = SinkDispatcher(self.sinks, run_id, config.stored)

    # ── opening and closing ──────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Builds the three components, initializes them and checks that the backend is healthy. Once; later calls do
        nothing."""
        if self.trainer is not None:
            return
        names = self.config.finetuning
        if names.trainer is None or names.trajectory_builder is None or names.trainer_adapter is None:
            raise ConfigError("finetuning needs trainer, trajectory_builder and trainer_adapter. Name all three.")
        said = HeldLog()
        with logging_to(said):
            trainer = await self.components.get_trainer(names.trainer)
            self.trajectory_builder = await self.components.get_trajectory_builder(names.trajectory_builder)
            self.adapter = await self.components.get_trainer_adapter(names.trainer_adapter)
            self._claim(trainer, self.trajectory_builder, self.adapter)
            await trainer.bind_components(self.trajectory_builder, self.adapter)
            if isinstance(trainer, EpochTrainer):
                self._check_overlap(trainer)
            await trainer.initialize(names)
        await self._playground.preflight(reads_rows=getattr(self.trajectory_builder, "reads_our_rows", False))
        if not await self.adapter.is_healthy():
            name = type(self.adapter).__name__
            raise BackendError(
                f"the training backend is not healthy: {name}.is_healthy() is False. No rollout was started. "
                "Start or repair the backend, then run the epoch again."
            )
        if self.writer is None:
            await _to_its_end(self._open_writer())
        await self._take_up(trainer)
        if hasattr(self.trajectory_builder, "visits_before"):
            # An epoch that is sampled ahead is drawn before the one that trains has ended; so is every one, to draw the same.
            lag = int(isinstance(trainer, EpochTrainer) and trainer.overlaps)
            self.trajectory_builder.visits_before = lambda epoch: self.visits_before(epoch - lag)  # type: ignore[attr-defined]
        self._observer = TrainerObserver(
            trainer, self.run_id, self.live_settings, self.state, self.writer, self.components
        )
        self.trainer = trainer
        said.pass_on(self.writer)
        if self.policy_told is not None:
            self.writer.event("policy", text=self.policy_told)

    def _check_overlap(self, trainer: EpochTrainer) -> None:
        """Raises ConfigError where an epoch is to be sampled while the one before it trains, and that cannot be."""
        trainer.check_overlap()
        problem = overlap_problem(self.config.run, 1) if trainer.overlaps else None
        if problem is not None:
            raise ConfigError(f"{problem}.")

    def _claim(self, *components: Any) -> None:
        """Takes the components for this run. Raises RunError for one that another open run has."""
        for component in components:
            owner = _owners.get(id(component), lambda: None)()
            if owner is not None and owner is not self:
                kind = type(component).__name__
                raise RunError(
                    f"this {kind} object belongs to run {owner.run_id!r}, which is open: two runs would train the same weights "
                    f"and collect into the same place. Expected one of its own for run {self.run_id!r}: make another {kind}, or "
                    "close the other run first."
                )
        for component in components:
            _owners[id(component)] = weakref.ref(self)
            self._claimed.append(component)  # held, so that its id stays its own

    def _release(self) -> None:
        while self._claimed:
            _owners.pop(id(self._claimed.pop()), None)

    async def _open_writer(self) -> None:
        run = self.config.run
        self.writer = await RunWriter.open(
            self.folder, self.run_id, self.config.stored(), run.checkpoint_every, run.keep_checkpoints
        )

    async def _take_up(self, trainer: Trainer) -> None:
        """Puts everything where the record ends."""
        store = self.writer.store
        recorded = store.state() or {}
        found = {"trainer": trainer, "trajectory_builder": self.trajectory_builder, "trainer_adapter": self.adapter}
        require_components(recorded_components(recorded), found, self.run_id)
        self.epochs = list(store.epochs)
        self._first = store.next_index
        state = await self.writer.weights.restore(self.adapter)
        restore_settings(self.live_settings, store)
        await self._note_changes(recorded)
        write_live_values(self.config, self.components, self.live_settings.live_values())
        if state is not None and state["curriculum"]:
            set_curriculum(trainer, state_from_dict(state["curriculum"]))
        self._left = store.partial()

    async def _note_changes(self, recorded: Mapping[str, Any]) -> None:
        """Puts into the journal what differs from the record: settings, functions, rows."""
        store = self.writer.store
        self._given = {
            "components": given_components(self.components),
            "functions": await in_daemon_thread(fingerprints, self.components),
        }
        if not self.epochs:
            return
        resume_epoch = self.writer.weights.resume_epoch
        epoch = store.next_index if resume_epoch is None else resume_epoch + 1
        changes = changes_since(
            store.config(),
            self.config.stored(),
            recorded.get("functions") or {},
            self._given["functions"],
            self.live_settings.journal,  # with what was found a moment ago, if the run went back since
            epoch,
        )
        for change in changes:
            said = f"from epoch {epoch} on, {change.field} is {short(change.new)}; it was {short(change.old)}"
            logger.warning("%s", said)
            self.writer.event("changed", text=said)
        self.live_settings.note(changes)

    def example_ids(self) -> list[Any]:
        """Ids of the dataset's rows, in its order. Raises DatasetError."""
        return self._playground.example_ids()

    def visits_before(self, epoch: int) -> Visits:
        """What the record says of each example, of the epochs before that one."""
        epochs = [each for each in self.epochs if each.index < epoch]
        return self._seen.visits(epochs, self.live_settings.journal, self.writer.store.start())

    @property
    def is_open(self) -> bool:
        """Whether the components are built and the record is taken up."""
        return self.trainer is not None

    def write_journal(self) -> None:
        """Writes down which settings were asked for, if the record is open."""
        if self.is_open:
            self.writer.journal(self.live_settings)

    @property
    def at_work(self) -> bool:
        """Whether an epoch is running; between two of them a run may be paused."""
        return self._observer is not None and self._observer.in_progress is not None

    @property
    def policy_told(self) -> str | None:
        """What is sampled and trained, in the policy's own words: its `description`, if it has one."""
        return getattr(self.adapter.policy, "description", None) if self.is_open else None

    @property
    def next_index(self) -> int:
        """The epoch that comes next."""
        return self.epochs[-1].index + 1 if self.epochs else self._first

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.finetuning.output_dir) / self.run_id

    async def close(self) -> None:
        """Takes the wrappers off and ends every component, once. All are ended even if one raises."""
        if self._observer is not None:
            try:
                await asyncio.wait_for(self._observer.settle_late_jobs(self.epochs), 5.0)
            except Exception:
                logger.warning("a job that was submitted late has not ended well", exc_info=True)
            self._observer.detach()
        try:
            if self.trainer is not None:
                await contained("cleanup", self.trainer.cleanup(), PATIENCE)
        finally:
            try:
                await in_daemon_thread(self._sink_dispatcher.close)
                if self.writer is not None:
                    self.writer.journal(self.live_settings)
                    await self.writer.close(self.adapter)
            finally:
                self._release()
                await self.components.close()

    # ── what a run is asked for ──────────────────────────────────────────────────────────────────────────────────────

    async def next_epoch(self, another_follows: Callable[[], bool] = lambda: False) -> Epoch:
        """One epoch, recorded. A job that failed raises JobFailed, with the record in its `epoch`.

        Args:
            another_follows: Whether it is followed by the next one. With max_staleness 1 of the adapter that is then sampled
                while this one trains, and whoever does not run it after all calls `end_ahead`.
        """
        await self.open()
        self.require_single_epochs()
        if isinstance(self.trainer, EpochTrainer):
            self.trainer.another_follows = another_follows
        return await self._next(lambda in_progress: self.trainer.run_epoch(in_progress.epoch, self.run_id))

    @property
    def ahead(self) -> Progress | None:
        """How far the epoch after the running one is, if it is sampled already."""
        ahead = None if self._observer is None else self._observer.ahead
        return None if ahead is None else ahead.progress

    async def end_ahead(self) -> None:
        """Ends rollouts that have begun for an epoch that is not run."""
        if self._observer is not None:
            await self._observer.end_ahead()

    async def whole_run(self, num_epochs: int) -> Epoch:
        """All of a Trainer that trains only in its run(), recorded as one epoch: whatever it collects, and its job."""

        async def work(in_progress: EpochInProgress) -> None:
            statuses = await self.trainer.run(num_epochs)
            if statuses and not in_progress.refs:
                in_progress.statuses.append(statuses[-1])  # why it ended before it submitted anything

        return await self._next(work)

    async def train_on(self, chosen: TrajectoryCollection, told: str) -> Epoch:
        """Trains on rollouts that somebody chose, and records that as an epoch. told: what they are, for the journal.

        Raises:
            ConfigError: The adapter cannot.
            RunError: An epoch has begun that is not complete, or the trainer trains only in its run().
        """
        await self.require_trains_on_chosen()
        await self.open()
        self.require_single_epochs()
        if self._left is not None:
            raise RunError(
                f"epoch {self._left.index} has begun and is not complete: end it first, with await run.next_epoch()."
            )

        async def work(in_progress: EpochInProgress) -> TrainingJobRef:
            ref = await self._observer.submit_chosen(chosen, in_progress)
            self.live_settings.note([Change(time.time(), "code", CHOSEN, None, told, in_progress.epoch)])
            return ref

        return await self._next(work)

    async def warm_up(
        self, demonstrations: Demonstrations, held_out: Demonstrations, settings: WarmUpSettings
    ) -> Epoch:
        """Learns demonstrations, and records that as an epoch.

        Raises:
            ConfigError: The adapter cannot.
            DatasetError: None of them can be rendered.
            RunError: An epoch has begun and has rollouts, or the trainer trains only in its run().
        """
        await self.require_warms_up()
        await self.open()
        self.require_single_epochs()
        left = self._left.collection if self._left is not None else None
        if self._left is not None and left is not None and (left.trajectories or left.failures):
            raise RunError(
                f"epoch {self._left.index} has begun and is not complete: end it first, with await run.next_epoch()."
            )
        told = count(len(demonstrations.rows), "demonstration")

        async def work(in_progress: EpochInProgress) -> TrainingJobRef:
            ref = await self._observer.submit_demonstrations(demonstrations, held_out, settings, in_progress)
            self.live_settings.note([Change(time.time(), "code", WARM_UP, None, told, in_progress.epoch)])
            return ref

        return await self._next(work)

    async def require_trains_on_chosen(self) -> None:
        """Raises ConfigError for an adapter that cannot train on rollouts that were chosen."""
        await self._require_able(
            "submit_chosen",
            "train on rollouts that were chosen. Expected an adapter that can: local_grpo and trl_sft learn them as they are, "
            "trl_dpo as preferences. Name one of them as finetuning.trainer_adapter, for example in a fork.",
        )

    async def require_warms_up(self) -> None:
        """Raises ConfigError for an adapter that cannot learn demonstrations."""
        await self._require_able(
            "submit_demonstrations",
            "learn demonstrations. Expected an adapter that can: local_grpo. Warm up there, run.save_model(directory), and name "
            "that directory as the model of this run; or finetune the model elsewhere, with TRL's SFTTrainer for example.",
        )

    async def _require_able(self, method: str, cannot: str) -> None:
        """Raises ConfigError where the adapter does not override that method. No model is loaded for that, and nothing is
        contacted. cannot: what it cannot do, and what to do then."""
        name = self.config.finetuning.trainer_adapter
        if self.config.run.trains_elsewhere:
            what = "a trainer on a Ray cluster (run.ray.trainer)"
        elif name is None:
            return  # `open` says that it is missing
        else:
            adapter = await self.components.get_trainer_adapter(name)
            if getattr(type(adapter), method, None) not in (None, getattr(TrainerAdapter, method)):
                return
            what = type(adapter).__name__
        raise ConfigError(f"{what} cannot {cannot}")

    async def _next(self, work: Callable[[EpochInProgress], Awaitable[TrainingJobRef | None]]) -> Epoch:
        with logging_to(self.writer), older_objects_set_aside():
            if await self.writer.rewind():
                await self._take_up(self.trainer)
            await self._observer.settle_late_jobs(self.epochs)
            left, self._left = self._left, None
            if left is not None and _is_rescored(left.collection):
                epoch = await self._run_epoch(work, EpochInProgress.rescored(left))
            else:
                epoch = await self._end_left(left) if left is not None else None
                epoch = epoch or await self._run_epoch(work)
        if epoch.job is not None and epoch.job.status in (TrainingStatusEnum.FAILED, TrainingStatusEnum.CANCELED):
            failure = JobFailed.of(epoch.index, epoch.job)
            failure.epoch = epoch
            raise failure
        return epoch

    async def _run_epoch(
        self,
        work: Callable[[EpochInProgress], Awaitable[TrainingJobRef | None]],
        given: EpochInProgress | None = None,
    ) -> Epoch:
        """given: an epoch that has begun, whose rollouts are there."""
        ahead = self._observer.take_ahead(self.next_index)
        in_progress = given or ahead or EpochInProgress(self.next_index, progress=Progress("rollouts"))
        self.writer.journal(self.live_settings)
        if given is None:
            version = self._observer.version if ahead is None else ahead.version
            await self.writer.on_epoch_begin(in_progress, version)
        else:
            await self.writer.on_epoch_resumed(given.epoch)
        in_progress.begun, self.progress = True, in_progress.progress
        with self._observer.observing(in_progress):
            try:
                await contained(self.trainer.shown_as, self._work(in_progress, work), PATIENCE)
            except asyncio.CancelledError:
                await self._observer.cancel_jobs(in_progress)
                await self._observer.end_ahead()
                await self._observer.keep_what_came(in_progress)
                await self.writer.on_epoch_stopped("aborted", in_progress.epoch)
                raise
            except Exception as error:
                if in_progress.collection is not None:
                    epoch = await self._record(in_progress, error)
                    if isinstance(error, JobFailed):
                        error.epoch = epoch
                else:
                    await self._observer.end_collecting()
                    await self._observer.keep_what_came(in_progress)
                await self.writer.on_epoch_stopped("failed", in_progress.epoch, error_text(error))
                raise
            epoch = await self._record(in_progress)
            log_what_was_left(in_progress, epoch, self.trainer, self.folder)
            return epoch

    async def _work(
        self, in_progress: EpochInProgress, work: Callable[[EpochInProgress], Awaitable[TrainingJobRef | None]]
    ) -> None:
        ref = await work(in_progress)
        await self._observer.wait_for_jobs(in_progress, ref)

    async def _end_left(self, left: PartialEpoch) -> Epoch | None:
        """An epoch whose job was handed over by a process that has ended: the job is asked for, and not submitted again.
        None where it cannot be, so that the epoch must be run anew."""
        if not self.adapter.finds_jobs_again or left.selection is None:
            return None
        if left.job is None:
            logger.warning(
                "epoch %d is run again. Its trajectories may have been handed over when the process ended, without the "
                "job's id having come back: look at the backend for a job that is not needed.",
                left.index,
            )
            return None
        in_progress = EpochInProgress.again(left)
        if not (isinstance(self.trainer, EpochTrainer) and self.trainer.overlaps):
            in_progress.find_lag(left.policy_version)  # of an epoch that was sampled ahead nobody knows it any more
        self.progress = in_progress.progress
        await self.writer.on_epoch_resumed(left.index)
        with self._observer.observing(in_progress):
            try:
                await self._observer.wait_for_jobs(in_progress, left.job)
            except UnknownJob as error:
                logger.warning("epoch %d is run again: its training job cannot be found (%s)", left.index, error)
                return None
            except BaseException:
                self._left = left  # it can be asked for again
                raise
            set_curriculum(self.trainer, left.selection.state)
            self.live_settings.restore(left.selection.settings, self.live_settings.journal, left.index + 1)
            epoch = await self._record(in_progress)
            log_what_was_left(in_progress, epoch, self.trainer, self.folder)
            return epoch

    async def _record(self, in_progress: EpochInProgress, error: Exception | None = None) -> Epoch:
        """Makes and stores the record: an epoch is recorded or not, also if somebody aborts meanwhile."""
        return await _to_its_end(self._record_now(in_progress, error))

    async def _record_now(self, in_progress: EpochInProgress, error: Exception | None) -> Epoch:
        epoch = self._observer.record(in_progress, error)
        missing = epoch.metrics.rewards_missing_text
        if missing:
            logger.warning("epoch %d: %s", epoch.index, missing)
        self.live_settings.note_percentile(epoch.curriculum.percentile)
        self._observer.remember(epoch)
        self.writer.journal(self.live_settings)
        state = self.trainer._curriculum_state
        given = {**self._given, "reward": reward_digest(self.config, self._given["functions"])}
        try:
            epoch = await self.writer.store_epoch(epoch, self.adapter, state, self.live_settings, given)
        except FolderGone:
            self.epochs.append(epoch)  # in memory it can still be looked at, and exported
            raise
        self.epochs.append(epoch)
        self._sink_dispatcher.recorded(epoch)
        return epoch

    async def put_in_place(self, index: int, collection: TrajectoryCollection) -> None:
        """Gives the newest epoch, which was not trained on, other rewards: the next epoch trains on its rollouts.

        Args:
            index: Number of the epoch.
            collection: Its trajectories with their new rewards.

        Raises:
            RunError: It was trained on, or is not the newest one; or the trainer trains only in its run().
        """
        await self.open()
        self.require_single_epochs()
        if not self.epochs or self.epochs[-1].index != index:
            raise RunError(
                f"epoch {index} is not the newest of run {self.run_id!r}, so its rewards stay as they are. Continue from before "
                f"it with the new reward: run.fork(epoch={index - 1}, reward=...)."
            )
        sampled_by, version = self.epochs[-1].policy_versions[0], self._observer.version
        lag = self.epochs[-1].metrics.version_lag or 0
        if self.epochs[-1].trained or (version or 0) - (sampled_by or 0) != lag:
            raise RunError(
                f"epoch {index} was trained on with its own rewards, so they stay as they are. Continue from before it with the "
                f"new reward: run.fork(epoch={index - 1}, reward=...)."
            )
        with logging_to(self.writer):
            await self.writer.put_in_place(index, sampled_by, collection)
            await self._take_up(self.trainer)
            if self.writer.store.state() is None:  # it was the run's first epoch
                curriculum = self.config.finetuning.curriculum_learning
                set_curriculum(self.trainer, CurriculumState(percentile=curriculum.initial_percentile))
                self.live_settings.restore(
                    CurriculumSettings.from_config(curriculum), self.writer.store.journal(), index
                )

    async def trains_in_run(self) -> bool:
        """Whether the Trainer is one that trains only in its run()."""
        await self.open()
        return self.trainer.trains_in_run

    def require_single_epochs(self) -> None:
        """Raises RunError for a Trainer that trains only in its run()."""
        if self.trainer is not None and self.trainer.trains_in_run:
            raise RunError(
                f"{self.trainer.shown_as} trains only in its run(): it offers neither single epochs nor a curriculum that can be "
                "changed while it runs. Use run.start()."
            )

    async def validate(self) -> Validation:
        """The validation evaluation with the policy as it is now. Raises RunError without a validation dataset."""
        await self.open()
        run = self.config.finetuning.run_configuration
        if not run or not run.validation_dataset:
            raise RunError(
                "this run has no validation dataset: give validation=... or run_configuration.validation_dataset."
            )
        with logging_to(self.writer), self._observer.observing(EpochInProgress(self.next_index)) as in_progress:
            await self.trainer.run_validation_evaluation(in_progress.epoch, self.run_id)
        return in_progress.validations[-1]

    async def rollout(self, example: Any = 0) -> Trajectory | RolloutFailure:
        """One rollout of one example: its position in the dataset, or its id. It is not recorded in any epoch."""
        await self.open()
        return await self._playground.rollout(example, self.trajectory_builder)

    async def chat(self, messages: Any, **options: Any) -> ChatReply:
        """One reply of the policy to a text or to OpenAI messages."""
        await self.open()
        return await self._playground.chat(messages, self.adapter, **options)

    async def save_model(self, directory: str, **options: Any) -> str:
        """Writes the trained model by the adapter's `save`; returns where. Raises RunError for an adapter that has none."""
        await self.open()
        save = getattr(self.adapter, "save", None)
        if save is None:
            raise RunError(f"{type(self.adapter).__name__} cannot save its model: it has no save(directory).")
        try:
            saved = save(directory, **options)
            return str(await saved if isinstance(saved, Awaitable) else saved)
        except OSError as error:
            raise BackendError(
                f"{type(self.adapter).__name__} could not save its model to {directory}: {error_text(error)}. Expected a folder "
                "that can be written, with room for the whole model. Make room, or choose another folder, then save again."
            ) from error

    async def save_description(self, directory: str, **options: Any) -> bool:
        """Writes what `save_model` would write but for the weights; False where the adapter cannot tell."""
        await self.open()
        describe = getattr(self.adapter, "save_description", None)
        if describe is None:
            return False
        described = describe(directory, **options)
        if isinstance(described, Awaitable):
            await described
        return True


def _is_rescored(collection: TrajectoryCollection) -> bool:
    """Whether all of its trajectories have the rewards that `Rescoring.apply` gave them."""
    trajectories = [trajectory for group in collection.trajectories for trajectory in group]
    return bool(trajectories) and all((each.metadata or {}).get(RESCORED) is True for each in trajectories)


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """What writes the folder is not left in the middle: whoever is canceled waits for that moment first."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):  # canceled once more
                await asyncio.wait([task])
        raise


class Playground:
    """Tries with a run's own components. Each try samples anew."""

    def __init__(self, config: Config, components: Builder, run_id: str) -> None:
        self.config, self.components, self.run_id = config, components, run_id
        self._tries = 0

    async def preflight(self, reads_rows: bool = True) -> None:
        """Reads the datasets and binds the workflow, so that what is wrong there is said before the first rollout.
        reads_rows: whether the datasets are ours to read; somebody's own builder may have its rows from elsewhere."""
        if not reads_rows:
            return
        rows = self._rows()
        (await workflow_of(self.config, self.components)).check(rows)
        for name in self.config.eval.evaluators:
            check_evaluator(await self.components.get_evaluator(name), rows)
        run = self.config.finetuning.run_configuration
        if run and run.validation_dataset:
            dataset_of(self.config, self.components, str(run.validation_dataset))

    def example_ids(self) -> list[Any]:
        """Ids of the dataset's rows, in its order. Raises DatasetError."""
        return [item.id for item in self._rows()]

    def _rows(self) -> Sequence[EvalInputItem]:
        run = self.config.finetuning.run_configuration
        return dataset_of(self.config, self.components, str(run.dataset) if run and run.dataset else None)

    async def rollout(self, example: Any, trajectory_builder: TrajectoryBuilder) -> Trajectory | RolloutFailure:
        """One scored rollout. example: position in the dataset, or id. Raises RunError for one that is not there.

        trajectory_builder: the run's. One whose rollouts are its own makes this one too, by `rollout(example, run_id)`.
        """
        make = getattr(trajectory_builder, "rollout", None)
        if make is not None:
            with self._trying():
                return await make(example, self.run_id)
        self._require_workflow()
        position = self._position_of(example)
        builder = EvalTrajectoryBuilder(EvalTrajectoryBuilderConfig(num_generations=1, min_episode_length=1))
        await builder.initialize(self.config.finetuning)
        with self._trying(lambda rows: [position]):
            collection = await builder.collect([await builder.run_eval()], self.run_id)
        if not collection.trajectories:
            return collection.failures[0]
        trajectory = collection.trajectories[0][0]
        evaluators = [await self.components.get_evaluator(name) for name in self.config.eval.evaluators]
        if trajectory.metadata is not None and any(map(needs_group, evaluators)):
            trajectory.metadata["group_size"] = 1
        return trajectory

    def _position_of(self, example: Any) -> int:
        ids = [item.id for item in self._rows()]
        texts = [text_of(id) for id in ids]
        if text_of(example) in texts:
            return texts.index(text_of(example))
        if isinstance(example, int) and -len(ids) <= example < len(ids):
            return example % len(ids)
        raise RunError(f"no example {example!r}: the dataset has {len(ids)} rows, with ids like {ids[0]!r}.")

    @contextmanager
    def _trying(self, draw: Callable[[Sequence[EvalInputItem]], Sequence[int]] | None = None) -> Iterator[None]:
        """Evaluations inside are the next try, and sample anew. draw: as in EvaluationContext."""
        self._tries += 1
        token = evaluation_context.set(EvaluationContext("try", self._tries, 0, draw))
        try:
            yield
        finally:
            evaluation_context.reset(token)

    async def chat(self, messages: Any, adapter: TrainerAdapter, **options: Any) -> ChatReply:
        """One reply to a text or to OpenAI messages, of the workflow's model, else of the adapter's policy. Raises RunError
        where there is neither."""
        if self.config.workflow is None and adapter.policy is not None:
            llm: LLM | None = PolicyLLM(adapter.policy)
        else:
            self._require_workflow()
            llm = (await workflow_of(self.config, self.components)).llm
        if llm is None:
            raise RunError("this run's workflow uses no llm, so there is nothing to talk to.")
        self._tries += 1
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        episode = CallRecorder(EpisodeKey("try", self._tries, 0, 0), self.config.run.seed)
        with episode.recording([llm.policy] if llm.policy else []):
            return await llm.chat(messages, **options)

    def _require_workflow(self) -> None:
        if self.config.workflow is None:
            raise RunError(
                "this run's workflow is not its own: its trajectory builder runs one that is not known here, so there is "
                "nothing to try by hand. Run an epoch."
            )
