"""LocalGRPOAdapter: GRPO on this machine, on the very weights that the policy samples from.

Without torch this module can be imported, but not used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...components.builder import Builder
from ...components.registry import register_trainer_adapter
from ...config.sections import FinetuneConfig
from ...errors import BackendError, ConfigError, MissingExtra
from ...redaction import redacting_logger
from ...threads import in_daemon_thread
from ...training.batch import TrainingBatch, supervised_batch
from ...training.jobs import PolicyAdapter, TrainingJob, check_exact
from ...training.warm_up import Lesson, WarmUpJob, lesson_of, told
from ...types import Demonstrations, TrainingJobRef, Trajectory, TrajectoryCollection, WarmUpSettings
from .config import LocalGRPOConfig, LoRAConfig

if TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .policy import LocalPolicy
    from .training import Learner, TrainingReport
    from .vllm.config import VLLMConfig
    from .vllm.sampler import VLLMSampler

__all__ = ["LoRAConfig", "LocalGRPOAdapter", "LocalGRPOConfig"]

logger = redacting_logger(__name__)

WARM_UP_DRAWS = 1
"""Tells the order of a warm-up's rows from other draws by the same seed."""


class LocalGRPOAdapter(PolicyAdapter[TrainingJob]):
    """Trains `policy` on the trajectories that it is given.

    seed: of the order in which trajectories are trained on. deterministic: a repeat is equal to the last digit. policy:
    one that is loaded already; otherwise `adapter_config.model` is loaded by `initialize`, or at first use. folder: the
    run's, where a vLLM server's log and adapters go; None: a temporary one.
    """

    adapter_config: LocalGRPOConfig
    backend = "local_grpo"

    def __init__(
        self,
        adapter_config: LocalGRPOConfig,
        seed: int = 0,
        deterministic: bool = False,
        *,
        policy: LocalPolicy | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(adapter_config, policy)
        self.seed, self.deterministic, self.folder = seed, deterministic, folder
        self.tell: Callable[[str | None], None] = lambda text: None
        """Told what a run has to wait for, in words; None: nothing any more."""
        self._vllm: VLLMSampler | None = None
        self._learner: Learner | None = None
        self._checkpoints: Checkpoints | None = None

    if TYPE_CHECKING:

        @property
        def policy(self) -> LocalPolicy:  # type: ignore[override]
            """What is sampled and trained; loaded if need be. Raises MissingExtra without torch and transformers."""
            ...

    def _make_policy(self) -> LocalPolicy:
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise MissingExtra("the training backend local_grpo", "local") from error
        from .policy import LocalPolicy

        config = self.adapter_config
        policy: LocalPolicy = self._policy or LocalPolicy.load(
            config.model,
            config.device,
            config.dtype,
            self.deterministic,
            config.threads,
            lora=config.lora,
            seed=self.seed,
        )
        policy.record_entropy = config.record_entropy
        if config.sampler is not None:
            self._vllm = self._sample_with(config.sampler, policy)
        logger.info("local_grpo: %s", policy.description)
        if config.model != "embedded" and "learning_rate" not in config.model_fields_set:
            logger.warning(
                "learning_rate is not set, and its default, %g, suits the embedded model alone: another one can lose "
                "what it knows in an epoch. Usual are 1e-6 to 1e-5, and 1e-5 to 5e-4 with lora.",
                config.learning_rate,
            )
        return policy

    def _sample_with(self, config: VLLMConfig, policy: LocalPolicy) -> VLLMSampler:
        """Has a vLLM server sample the policy. It is started by `initialize`, or by the first reply."""
        from .vllm.sampler import VLLMSampler

        if self.deterministic:
            raise ConfigError(
                "deterministic is on, and what a vLLM server samples depends on the requests that come at the same time. Set "
                "run.deterministic to False, or leave sampler out."
            )
        self._check_dtypes(config.dtype or policy.dtype, policy.dtype)
        return VLLMSampler.of(policy, config, self.folder, self.tell)

    def _check_dtypes(self, sampled: str, trained: str) -> None:
        """A server with another dtype than training's draws from a distribution that is not quite the trained one."""
        config = self.adapter_config
        if sampled == trained or config.importance.on:
            return
        told = (
            f"the vLLM server samples in {sampled}, and the model is trained in {trained}: their log probabilities differ by "
            "more than rounding, and nothing corrects for it. Set importance_cap to 2.0"
        )
        if config.max_logprob_gap == "auto":
            raise ConfigError(f"{told}, or leave sampler.dtype out.")
        logger.warning("%s.", told)

    async def initialize(self, run_config: FinetuneConfig) -> None:
        await super().initialize(run_config)
        if self._vllm is not None:
            await in_daemon_thread(self._vllm.prepare)

    @property
    def learner(self) -> Learner:
        """The optimizer over the policy's weights, and the reference that KL is measured from."""
        policy = self._load()
        if self._learner is None:
            from .training import Learner

            self._learner = Learner(policy, self.adapter_config)
        return self._learner

    async def keep_sampling(self) -> int:
        """Has the vLLM server keep the adapter as it is now. Raises ConfigError where none samples, or where it cannot."""
        policy = await in_daemon_thread(self._load)
        problem = self.adapter_config.overlap_problem()
        if self._vllm is None or problem is not None:
            raise ConfigError(f"{problem or 'the policy was given its sampler, which keeps no weights'}.")
        await in_daemon_thread(self._vllm.keep, policy.version)
        return policy.version

    async def submit_chosen(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Starts a job that makes the sampled tokens of these rollouts more likely, with the config's learning rate, steps and
        passes. They may be of older weights. Raises as `submit`; nothing is then started."""
        policy = await in_daemon_thread(self._load)
        check_exact((t for group in trajectories.trajectories for t in group), self.adapter_config.allow_inexact)
        return self._start(trajectories.run_id, policy, supervised_batch(trajectories))

    async def submit_demonstrations(
        self, run_id: str, demonstrations: Demonstrations, held_out: Demonstrations, settings: WarmUpSettings
    ) -> TrainingJobRef:
        """Starts a job that learns these conversations, rendered by the policy's own chat template. Raises as its interface."""
        from .training import DemonstrationReport

        policy = await in_daemon_thread(self._load)

        def read() -> tuple[Lesson, Lesson]:
            read = lesson_of(demonstrations, policy, settings, policy.longest)
            return read, lesson_of(held_out, policy, settings, policy.longest, held_out=True)

        lesson, other = await in_daemon_thread(read)
        told(lesson, other)
        await in_daemon_thread(lambda: self.learner.check(lesson.batch))
        report, before = DemonstrationReport(), self._newest_job()
        job = WarmUpJob(run_id, self.backend, policy.version, lesson, other, settings, report, before)

        def train(number: int) -> None:
            # By the version and not by the number: a warm-up that was aborted leaves no trace.
            rng = np.random.default_rng([self.seed % 2**64, policy.version, WARM_UP_DRAWS])
            with self._training():
                self.learner.learn(lesson.rows, other.rows, settings, rng, report, job.stepped, job.stopped)

        return self._begin(job, policy, train)

    def _check(self, batch: TrainingBatch) -> TrainingReport:
        from .training import TrainingReport  # needs torch, which is known to be there by now

        self.learner.check(batch)
        self._planned_epochs()
        return TrainingReport()

    def _exclusive(self, job: TrainingJob) -> AbstractContextManager[bool]:
        return self.policy.exclusive.hold(job.stopped)

    def _train(self, job: TrainingJob, batch: TrainingBatch, number: int) -> None:
        planned, report = self._planned_epochs(), cast("TrainingReport", job.report)
        rng = np.random.default_rng([self.seed % 2**64, number - 1])
        with self._training():
            self.learner.train(batch, rng, report, job.stepped, job.stopped, number - 1, planned)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Inside, memory and device are the learner's."""
        from .memory import trim_heap

        trim_heap()  # memory that sampling left
        try:
            with nullcontext() if self._vllm is None else self._vllm.training():
                yield
        finally:
            trim_heap()

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

    async def aclose(self) -> None:
        """Cancels what still runs, waits for it, and ends a vLLM server of our own."""
        try:
            await super().aclose()
        finally:
            if self._vllm is not None:
                await self._vllm.aclose()

    async def save(self, directory: str | Path, merge: bool = False, dtype: str | None = None) -> Path:
        """Writes model and tokenizer to `directory`; from_pretrained, and `model` in the config, read them.

        Args:
            directory: Where to. An older model there is replaced.
            merge: Add a LoRA adapter to the model's weights, so that nobody who loads it needs peft. Otherwise only the
                adapter is written, which names its model.
            dtype: Of the weights, such as "float32". Default: the one that the model was stored in. Weights that were
                trained in float32 lose steps below its spacing where that is bfloat16.

        Returns:
            The directory.

        Raises:
            BackendError: It cannot be written, or an adapter alone would not be the model.
            ConfigError: There is no such dtype.
        """
        # Where the model is sampled in bfloat16, training has its weights in float32.
        values = dict if self._learner is None else self._learner.trained.exact
        return await in_daemon_thread(lambda: self.policy.save(directory, merge, dtype, values))

    async def save_description(self, directory: str | Path, merge: bool = False, **options: Any) -> None:
        """Writes config and tokenizer as `save` would with these options, and no weights."""
        policy = await in_daemon_thread(self._load)
        await in_daemon_thread(policy.save_description, directory, merge)

    async def save_checkpoint(self, directory: str | Path) -> int:
        """Writes what training on needs to `directory`, at once or not at all; returns the bytes written.

        Waits for the jobs submitted so far. An older checkpoint of that name is replaced. Raises BackendError where it
        cannot be written; an older one is then as it was, and so is the training.
        """
        policy = await in_daemon_thread(self._load)
        ended = self._submitted
        await self._all_ended()

        def save() -> int:
            with policy.exclusive.hold():
                return self._checkpoints_of(self.learner).save(Path(directory).absolute(), max(ended, self._trained))

        return await in_daemon_thread(save)

    async def load_checkpoint(self, directory: str | Path) -> None:
        """Puts policy and optimizer where they were when `save_checkpoint` wrote `directory`; settings stay.

        Raises BackendError, and changes nothing, while a job is at work, for a checkpoint of another architecture, and
        for one that is missing, damaged or not ours. Submit nothing before it returns.
        """
        policy = await in_daemon_thread(self._load)
        self._require_no_job_at_work()

        def load() -> None:
            with policy.exclusive.hold():
                self._submitted = self._trained = self._checkpoints_of(self.learner).load(Path(directory).absolute())

        await in_daemon_thread(load)

    async def load_weights(self, directory: str | Path) -> None:
        """Puts the weights of a checkpoint into the policy, and leaves the optimizer alone. Raises as `load_checkpoint`."""
        policy = await in_daemon_thread(self._load)
        self._require_no_job_at_work()

        def load() -> None:
            from .checkpoint import load_weights

            with policy.exclusive.hold():
                load_weights(policy, Path(directory).absolute())

        await in_daemon_thread(load)

    async def token_logprobs(self, trajectory: Trajectory) -> list[list[float]]:
        """By one forward pass. Raises BackendError or MissingLogprobs where a turn lacks its ids or logprobs, and
        BackendError where memory runs out."""
        policy = await in_daemon_thread(self._load)

        def score() -> list[list[float]]:
            from .trajectory_logprobs import trajectory_logprobs

            with policy.exclusive.hold():
                return trajectory_logprobs(policy, trajectory, self.adapter_config.micro_batch_tokens)

        return await in_daemon_thread(score)

    def _checkpoints_of(self, learner: Learner) -> Checkpoints:
        if self._checkpoints is None:
            from .checkpoint import Checkpoints

            self._checkpoints = Checkpoints(learner)
        return self._checkpoints


@register_trainer_adapter(config_type=LocalGRPOConfig)
async def local_grpo(config: LocalGRPOConfig, builder: Builder):
    run = builder.config.run
    if config.sampler is not None and run.engine != "local":
        raise ConfigError(
            f"run.engine is {run.engine!r}, and sampler a vLLM server, which samples for one process. Use engine 'local', or "
            "leave sampler out."
        )
    adapter = LocalGRPOAdapter(config, seed=run.seed, deterministic=run.deterministic, folder=builder.run_folder)
    adapter.tell = functools.partial(setattr, builder, "doing")
    yield adapter
    await adapter.aclose()
