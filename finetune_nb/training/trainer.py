"""EpochTrainer, the Trainer that we ship: collect -> select -> submit -> wait -> write down.

With `max_staleness: 1` of the adapter, the next epoch's rollouts begin when a job has been submitted:

    epoch 0   collect  select  train
    epoch 1                    collect  validate  select  train
    epoch 2                                               collect ...

All of them are sampled from the weights before that job, so that each epoch but the first trains on trajectories of the
version before. They are finished before anything else of their epoch happens.

Selection is curriculum.select, metrics are metrics.epoch_metrics; neither this file nor they know a Run, a store or a
plot. The cost of an epoch does not depend on how many went before.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..components.builder import Builder
from ..components.registry import register_trainer
from ..config.base import TrainerConfig
from ..config.sections import settings_from
from ..errors import BackendError, ConfigError, JobFailed, RunError, StoreError
from ..interfaces import Trainer, TrainerAdapter
from ..redaction import error_text, redacting_logger
from ..rewards.numbers import mean
from ..store.json import append_jsonl
from ..types import (
    CurriculumSettings,
    EpochMetrics,
    GroupStatistics,
    Selection,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)
from .curriculum import group_statistics, keep, select, state_from_dict, state_to_dict
from .metrics import epoch_metrics

__all__ = [
    "NAT_NAMES",
    "EpochTrainer",
    "EpochTrainerConfig",
]

logger = redacting_logger(__name__)

NAT_NAMES = {
    "avg_reward": "mean_reward",
    "min_reward": "min_reward",
    "max_reward": "max_reward",
    "num_trajectories": "trajectories",
    "num_groups": "groups",
}
"""What the NeMo Agent Toolkit calls a number in its logs -> the field of EpochMetrics."""
OUR_NAMES = {
    "num_failures": "failures",
    "groups_with_spread": "groups_with_spread",
    "sampled_tokens": "sampled_tokens",
    "drifted_turns": "drifted_turns",
    "rewards_missing": "rewards_missing",
}
"""Numbers of the same logs that the Toolkit does not have -> the field."""


class EpochTrainerConfig(TrainerConfig, name="epoch_trainer"):
    """Epochs with a curriculum by reward percentile."""


@dataclass(frozen=True)
class RolloutsAhead:
    """Rollouts of an epoch that began while the job of the epoch before was at work."""

    epoch: int
    run_id: str
    begun: asyncio.Task[None]
    """Ends once they have begun, or raises what prevents it."""


class EpochTrainer(Trainer):
    """Runs epochs one after the other. A failed or canceled job ends the run: JobFailed with the backend's reason."""

    def __init__(self, trainer_config: TrainerConfig, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(trainer_config, **kwargs)
        self.seed = seed
        self.curriculum_settings: CurriculumSettings | None = None
        """The curriculum in force, set before each selection by whoever steers it, such as a Run. None: nobody does, and
        `curriculum_config` counts."""
        self.selection: Selection | None = None
        """What the last epoch's curriculum chose."""
        self.statistics: GroupStatistics | None = None
        self.metrics: EpochMetrics | None = None
        """What it chose from, and in numbers: whoever makes a record of the epoch need not count again."""
        self.another_follows: Callable[[], bool] = lambda: False
        """Whether the next epoch will be run after this one: asked when a job is submitted, before the next rollouts begin."""
        self._ahead: RolloutsAhead | None = None
        self._jobs: list[TrainingJobRef] = []
        self._healthy = False

    @property
    def overlaps(self) -> bool:
        """Whether an epoch is sampled while the epoch before it trains."""
        return self._staleness > 0

    @property
    def _staleness(self) -> int:
        config = getattr(self.trainer_adapter, "adapter_config", None)
        return getattr(config, "max_staleness", 0)

    def check_overlap(self) -> None:
        """Check that an epoch can be sampled while the epoch before it trains, if it is to be.

        Raises:
            ConfigError: Builder or adapter cannot, or more than one epoch ahead is asked for.
        """
        if not self.overlaps:
            return
        adapter, builder = self.trainer_adapter, self.trajectory_builder
        if self._staleness > 1:
            raise ConfigError(
                f"max_staleness of the trainer adapter is {self._staleness}; expected 0, or 1: the next epoch, and none after "
                "it, is sampled while one trains."
            )
        if type(adapter).keep_sampling is TrainerAdapter.keep_sampling:
            raise ConfigError(
                f"max_staleness is 1, and {type(adapter).__name__} cannot sample while it trains: it has no keep_sampling. Set "
                "it to 0, or take an adapter that can: tinker, or local_grpo with a vLLM server as its sampler."
            )
        problem = getattr(adapter.adapter_config, "overlap_problem", lambda: None)()
        if problem is not None:
            raise ConfigError(f"{problem}.")
        if not getattr(builder, "samples_one_version", False):
            raise ConfigError(
                f"max_staleness is 1, and {type(builder).__name__} does not say that it samples the policy version that it is "
                "given (samples_one_version). Set it to 0, or take eval_traj_builder."
            )

    async def run_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """Run one epoch to its end, the job's included.

        It validates before the rollouts if `epoch` is a multiple of the interval, and after the last epoch's update. Where the
        rollouts began while the job before was at work, it validates after them; the weights are the same.

        Args:
            epoch: Its number, from 0.
            run_id: Id of the run.

        Returns:
            A reference to the job. None if nothing was collected, or nothing is left to train on.

        Raises:
            JobFailed: The training job failed or was canceled.
            BackendError: The backend is not healthy, or cannot train on what was chosen.
        """
        self.selection = None
        await self._check_health()
        run = self.run_config.run_configuration
        validates = run is not None and run.validation_dataset is not None
        validates_first = run is not None and validates and epoch % run.validation_interval == 0
        meta = self._meta(epoch, run_id)
        if await self._has_begun(epoch, run_id):
            collection = await self.trajectory_builder.finalize(run_id=run_id, meta=meta)
            if validates_first:
                await self.run_validation_evaluation(epoch, run_id)
        else:
            if validates_first:
                await self.run_validation_evaluation(epoch, run_id)
            await self.trajectory_builder.start_run(run_id=run_id, meta=meta)
            collection = await self.trajectory_builder.finalize(run_id=run_id, meta=meta)
        selected = self.apply_curriculum_learning(collection, epoch)
        job = await self._train(epoch, run_id, collection, selected)
        if validates and epoch == self.run_config.num_epochs - 1:
            await self.run_validation_evaluation(epoch, run_id)
        return job

    def _meta(self, epoch: int, run_id: str) -> dict[str, Any]:
        return {"epoch": epoch, "run_id": run_id, "trainer_config": self.trainer_config.model_dump()}

    # ── sampling an epoch while the one before it trains ─────────────────────────────────────────────────────────────

    def _begin_ahead(self, epoch: int, run_id: str, version: int) -> None:
        """Begins the rollouts of an epoch, of that policy version, and does not wait for it."""
        meta = {**self._meta(epoch, run_id), "policy_version": version}
        begun = asyncio.create_task(self.trajectory_builder.start_run(run_id=run_id, meta=meta))
        self._ahead = RolloutsAhead(epoch, run_id, begun)

    async def _version_ahead(self, epoch: int) -> int | None:
        """The policy version from which the epoch after that one is sampled while it trains; None: nothing is sampled then."""
        if not self.overlaps or not self.another_follows():
            return None
        try:
            return await self.trainer_adapter.keep_sampling()
        except BackendError as error:  # it is no reason not to train
            logger.warning("epoch %d is not sampled while epoch %d trains: %s", epoch + 1, epoch, error_text(error))
            return None

    async def _has_begun(self, epoch: int, run_id: str) -> bool:
        """Whether the rollouts of that epoch began while the job before was at work. Raises what kept them from it."""
        ahead = self._ahead
        if ahead is None:
            return False
        if (ahead.epoch, ahead.run_id) != (epoch, run_id):
            await self.end_ahead()
            return False
        self._ahead = None
        await ahead.begun
        return True

    async def end_ahead(self) -> None:
        """End rollouts that began ahead of their epoch, if there are any."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        ahead.begun.cancel()
        await asyncio.wait([ahead.begun])
        if not ahead.begun.cancelled():
            ahead.begun.exception()  # of rollouts that nobody wants
        aclose = getattr(self.trajectory_builder, "aclose", None)
        if aclose is not None:
            await aclose()

    async def _check_health(self) -> None:
        if self._healthy:
            return
        self.check_overlap()
        if not await self.trainer_adapter.is_healthy():
            name = type(self.trainer_adapter).__name__
            raise BackendError(f"the training backend is not healthy ({name}.is_healthy() is False). Nothing was run.")
        self._healthy = True

    def apply_curriculum_learning(
        self, trajectory_collection: TrajectoryCollection, epoch: int
    ) -> TrajectoryCollection:
        """Choose the groups to train on; all of them if the curriculum is off.

        Args:
            trajectory_collection: All groups of the epoch.
            epoch: Its number, from 0.

        Returns:
            The groups that the curriculum keeps, in its order.

        Raises:
            ConfigError: Something else has written a curriculum state that cannot be read.
        """
        statistics = group_statistics(trajectory_collection.trajectories)
        settings = self.curriculum_settings
        if settings is None:
            settings = settings_from(self.curriculum_config)
        selection = select(statistics, settings, state_from_dict(self._curriculum_state), epoch, self.seed)
        self.selection, self.statistics = selection, statistics
        self._curriculum_state |= state_to_dict(selection.state)
        self.metrics = epoch_metrics(trajectory_collection, statistics, selection)
        if not settings.enabled:
            return trajectory_collection
        return trajectory_collection.model_copy(
            update={"trajectories": keep(trajectory_collection.trajectories, selection), "failures": []}
        )

    async def _train(
        self, epoch: int, run_id: str, collection: TrajectoryCollection, selected: TrajectoryCollection
    ) -> TrainingJobRef | None:
        metrics = self._epoch_metrics(epoch, selected)
        groups = trainable(selected.trajectories)
        if not groups:
            logger.warning("epoch %d: nothing to train on (%d groups collected)", epoch, len(collection.trajectories))
            self._write(epoch, run_id, None, None, metrics)
            return None
        version = await self._version_ahead(epoch)
        ref = await self.trainer_adapter.submit(TrajectoryCollection(trajectories=groups, run_id=run_id))
        self._jobs.append(ref)
        if version is not None:
            self._begin_ahead(epoch + 1, run_id, version)
        status = await self.trainer_adapter.wait_until_complete(ref)
        self._write(epoch, run_id, ref, status, metrics)
        if status.status in (TrainingStatusEnum.FAILED, TrainingStatusEnum.CANCELED):
            raise JobFailed.of(epoch, status)
        return ref

    def _epoch_metrics(self, epoch: int, selected: TrajectoryCollection) -> dict[str, Any]:
        """The numbers of the log line, by the names that the NeMo Agent Toolkit gives them, and ours after them."""
        found = self.metrics
        assert found is not None
        # What is submitted, which the epoch's metrics do not count: a subclass may choose once more.
        rewards = [t.reward for group in selected.trajectories for t in group if math.isfinite(t.reward)]
        filtered = {
            "filtered_trajectories": sum(map(len, selected.trajectories)),
            "filtered_groups": len(selected.trajectories),
            "filtered_avg_reward": mean(rewards),
            "filtered_min_reward": min(rewards, default=math.nan),
            "filtered_max_reward": max(rewards, default=math.nan),
        }
        steered = self.curriculum_config.enabled
        why_missing = {"reward_error": found.reward_error} if found.rewards_missing else {}
        return {
            **{name: getattr(found, field) for name, field in NAT_NAMES.items()},
            **filtered,
            "curriculum_percentile": self._curriculum_state["current_percentile"] if steered else 1.0,
            **{name: getattr(found, field) for name, field in OUR_NAMES.items()},
            **why_missing,
            "scores": dict(found.scores),
        }

    def _write(
        self,
        epoch: int,
        run_id: str,
        ref: TrainingJobRef | None,
        status: TrainingJobStatus | None,
        metrics: dict[str, Any],
    ) -> None:
        """All three logs, once an epoch. A log that cannot be written is a warning: the epoch is worth more."""
        folder = str(self.run_config.output_dir / run_id)
        training = {"status": status.status.value, "message": status.message} if status else {"status": None}
        training |= (status.metadata or {}).get("metrics", {}) if status else {}
        collected = {k: metrics[k] for k in ("num_trajectories", "num_groups", "num_failures", "avg_reward")}
        try:
            self.log_progress(epoch, {**metrics, "run_id": run_id, "training": training}, folder)
            self.trajectory_builder.log_progress(run_id, {"epoch": epoch, **collected}, folder)
            if ref is not None:
                self.trainer_adapter.log_progress(ref, {"epoch": epoch, **training}, folder)
        except (OSError, StoreError):
            logger.warning("epoch %d: the log in %s cannot be written", epoch, folder, exc_info=True)

    def log_progress(self, epoch: int, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Append a line to training_metrics.jsonl: the Toolkit's keys, with the number of included groups instead of all.

        Args:
            epoch: Its number, from 0.
            metrics: Plain numbers and text.
            output_dir: Folder of the file. Default: `finetuning.output_dir`.
        """
        line: dict[str, Any] = {"epoch": epoch, **metrics}
        if self.curriculum_config.enabled:
            state = self.get_curriculum_state()
            line["curriculum_state"] = {**state, "included_groups": len(state["included_groups"])}
        append_jsonl(Path(output_dir or self.run_config.output_dir) / "training_metrics.jsonl", line)

    async def run_validation_evaluation(self, epoch: int, run_id: str) -> dict[str, Any]:
        """Evaluate as the base class does, and append a line to validation_metrics.jsonl.

        Args:
            epoch: As in the base class.
            run_id: Id of the run.

        Returns:
            As in the base class.
        """
        version = getattr(self.trainer_adapter.policy, "version", None)
        metrics = await super().run_validation_evaluation(epoch, run_id)
        try:
            path = self.run_config.output_dir / run_id / "validation_metrics.jsonl"
            append_jsonl(path, {**metrics, "run_id": run_id, "policy_version": version})
        except (OSError, StoreError):
            logger.warning("epoch %d: the validation log cannot be written", epoch, exc_info=True)
        return metrics

    async def run(self, num_epochs: int) -> list[TrainingJobStatus]:
        """Run epochs 0 to num_epochs - 1; ends at the first failed job.

        Args:
            num_epochs: How many.

        Returns:
            One status for each epoch that submitted a job.

        Raises:
            RunError: The trainer is not initialized.
        """
        if self.run_config is None:
            raise RunError("this trainer is not initialized: call bind_components and initialize first.")
        run_id = f"run-{id(self):x}"
        statuses = []
        try:
            for epoch in range(num_epochs):
                self.another_follows = lambda epoch=epoch: epoch + 1 < num_epochs
                try:
                    ref = await self.run_epoch(epoch, run_id)
                except JobFailed:
                    statuses.append(await self.trainer_adapter.status(self._jobs[-1]))
                    break
                if ref is not None:
                    statuses.append(await self.trainer_adapter.status(ref))
        finally:
            await self.end_ahead()
        return statuses

    async def get_metrics(self, run_id: str) -> dict[str, Any]:
        """Every job of this trainer.

        Args:
            run_id: Id of the run.

        Returns:
            Each job with its status, or with the error that asking for it gave.
        """
        jobs: list[dict[str, Any]] = []
        for ref in self._jobs:
            entry: dict[str, Any] = {"job_ref": ref.model_dump()}
            try:
                entry["status"] = (await self.trainer_adapter.status(ref)).model_dump()
            except Exception as error:
                entry["error"] = error_text(error)
            jobs.append(entry)
        return {"run_id": run_id, "total_epochs": len(self._jobs), "jobs": jobs}

    async def cleanup(self) -> None:
        """Ends what builder and adapter still have going."""
        await self.end_ahead()
        for component in (self.trajectory_builder, self.trainer_adapter):
            aclose = getattr(component, "aclose", None)
            if aclose is not None:
                await aclose()


def trainable(groups: list[list[Trajectory]]) -> list[list[Trajectory]]:
    """The groups without the trajectories that have no reward, and without groups in which one is infinite."""
    kept = []
    for group in groups:
        rewards = [t.reward for t in group]
        if all(map(math.isfinite, rewards)):
            kept.append(group)
        elif not any(map(math.isinf, rewards)):
            kept.append([t for t in group if not math.isnan(t.reward)])
    return [group for group in kept if group]


@register_trainer(config_type=EpochTrainerConfig)
async def epoch_trainer(config: EpochTrainerConfig, builder: Builder):
    trainer = EpochTrainer(config, seed=builder.config.run.seed)
    yield trainer
    await trainer.cleanup()
