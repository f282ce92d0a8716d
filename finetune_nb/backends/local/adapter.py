"""LocalGRPOAdapter: GRPO on this machine, on the very weights that the policy samples from.

Without torch this module can be imported, but not used.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...components.builder import Builder
from ...components.registry import register_trainer_adapter
from ...config.sections import FinetuneConfig
from ...errors import BackendError, FinetuneError, MissingExtra
from ...redaction import redacting_logger
from ...training.batch import training_batch
from ...training.jobs import JobAdapter, TrainingJob, check_exact, check_versions
from ...types import TrainingJobRef, TrajectoryCollection
from .config import LocalGRPOConfig, LoRAConfig

if TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .policy import LocalPolicy
    from .training import Learner

__all__ = ["LoRAConfig", "LocalGRPOAdapter", "LocalGRPOConfig"]

logger = redacting_logger(__name__)


class LocalGRPOAdapter(JobAdapter[TrainingJob]):
    """Trains `policy` on the trajectories that it is given.

    seed: of the order in which trajectories are trained on. deterministic: a repeat is equal to the last digit. policy:
    one that is loaded already; otherwise `adapter_config.model` is loaded by `initialize`, or at first use.
    """

    adapter_config: LocalGRPOConfig

    def __init__(
        self,
        adapter_config: LocalGRPOConfig,
        seed: int = 0,
        deterministic: bool = False,
        *,
        policy: LocalPolicy | None = None,
    ) -> None:
        super().__init__(adapter_config)
        self.seed, self.deterministic = seed, deterministic
        self._policy = policy
        self._learner: Learner | None = None
        self._loading = threading.Lock()
        self._checkpoints: Checkpoints | None = None

    @property
    def policy(self) -> LocalPolicy:  # type: ignore[override]  # never None, and nobody else sets it
        """What is sampled and trained. Loads the model if need be; MissingExtra without torch and transformers."""
        return self._load()[0]

    def _load(self) -> tuple[LocalPolicy, Learner]:
        with self._loading:
            if self._policy is None or self._learner is None:
                try:
                    import torch  # noqa: F401
                    import transformers  # noqa: F401
                except ImportError as error:
                    raise MissingExtra("the training backend local_grpo", "local") from error
                from .policy import LocalPolicy
                from .training import Learner

                config = self.adapter_config
                if self._policy is None:
                    self._policy = LocalPolicy.load(
                        config.model,
                        config.device,
                        config.dtype,
                        self.deterministic,
                        config.threads,
                        lora=config.lora,
                        seed=self.seed,
                    )
                self._learner = Learner(self._policy, config)
                logger.info("local_grpo: %s", self._policy.description)
                if config.model != "embedded" and "learning_rate" not in config.model_fields_set:
                    logger.warning(
                        "learning_rate is not set, and its default, %g, suits the embedded model alone: another one can lose "
                        "what it knows in an epoch. Usual are 1e-6 to 1e-5, and 1e-5 to 5e-4 with lora.",
                        config.learning_rate,
                    )
            return self._policy, self._learner

    async def initialize(self, run_config: FinetuneConfig) -> None:
        await super().initialize(run_config)
        await asyncio.to_thread(self._load)

    async def is_healthy(self) -> bool:
        """Whether the model can be loaded; the log says why not."""
        try:
            await asyncio.to_thread(self._load)
        except FinetuneError as error:
            logger.error("local_grpo is not healthy: %s", error)
            return False
        return True

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Starts a job. Raises StalePolicy for trajectories of older weights, BackendError or MissingLogprobs for those
        that cannot be trained on; nothing is then started."""
        policy, learner = await asyncio.to_thread(self._load)
        from .memory import trim_heap  # both need torch, which is known to be there by now
        from .training import TrainingReport

        config = self.adapter_config
        check_versions(trajectories, policy.version, config.max_staleness)
        check_exact((t for group in trajectories.trajectories for t in group), config.allow_inexact)
        learned = training_batch(trajectories, config.scale_rewards, config.truncated)
        learner.check(learned)
        planned = self._planned_epochs()
        report = TrainingReport()
        job = TrainingJob(trajectories.run_id, "local_grpo", policy.version, learned, report, before=self._newest_job())
        rng = np.random.default_rng([self.seed % 2**64, self._submitted])
        self._jobs[job.id] = job
        self._submitted = number = self._submitted + 1

        def train() -> None:
            with policy.exclusive.hold(job.stopped) as alone:
                if not alone or not learned.trajectories:
                    return
                check_versions(
                    trajectories, policy.version, config.max_staleness
                )  # a job before this one may have trained
                trim_heap()  # what sampling has left
                try:
                    learner.train(learned, rng, report, job.stepped, job.stopped, number - 1, planned)
                finally:
                    self._trained = number
                    policy.version += bool(report.steps)
                    job.policy_version = policy.version
                    trim_heap()

        job.start(train)
        return job.ref

    def _planned_epochs(self) -> int:
        config = self.adapter_config
        if self.run_config is not None:
            return self.run_config.num_epochs
        if config.lr_schedule != "constant" or config.warmup:
            raise BackendError(
                f"lr_schedule is {config.lr_schedule!r} and warmup {config.warmup:g}, but the adapter does not know how "
                "many epochs are planned. Call initialize with a FinetuneConfig, or keep the learning rate constant."
            )
        return 1

    async def save(self, directory: str | Path, merge: bool = False) -> Path:
        """Writes model and tokenizer to `directory`; from_pretrained, and `model` in the config, read them.

        merge: a LoRA adapter is added to the model's weights, so that nobody who loads it needs peft. Otherwise only
        the adapter is written, which names its model.
        """
        return await asyncio.to_thread(self.policy.save, directory, merge)

    async def save_checkpoint(self, directory: str | Path) -> int:
        """Writes what training on needs to `directory`, at once or not at all; returns the bytes written.

        Waits for the jobs submitted so far. An older checkpoint of that name is replaced. Raises BackendError where it
        cannot be written; an older one is then as it was, and so is the training.
        """
        policy, learner = await asyncio.to_thread(self._load)
        ended = self._submitted
        await self._all_ended()

        def save() -> int:
            with policy.exclusive.hold():
                return self._checkpoints_of(learner).save(Path(directory).absolute(), max(ended, self._trained))

        return await asyncio.to_thread(save)

    async def load_checkpoint(self, directory: str | Path) -> None:
        """Puts policy and optimizer where they were when `save_checkpoint` wrote `directory`; settings stay.

        Raises BackendError, and changes nothing, while a job is at work, for a checkpoint of another architecture, and
        for one that is missing, damaged or not ours. Submit nothing before it returns.
        """
        policy, learner = await asyncio.to_thread(self._load)
        self._require_no_job_at_work()

        def load() -> None:
            with policy.exclusive.hold():
                self._submitted = self._trained = self._checkpoints_of(learner).load(Path(directory).absolute())

        await asyncio.to_thread(load)

    def _checkpoints_of(self, learner: Learner) -> Checkpoints:
        if self._checkpoints is None:
            from .checkpoint import Checkpoints

            self._checkpoints = Checkpoints(learner)
        return self._checkpoints


@register_trainer_adapter(config_type=LocalGRPOConfig)
async def local_grpo(config: LocalGRPOConfig, builder: Builder):
    run = builder.config.run
    adapter = LocalGRPOAdapter(config, seed=run.seed, deterministic=run.deterministic)
    yield adapter
    await adapter.aclose()
