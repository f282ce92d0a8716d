"""The contracts, to read first: TrajectoryBuilder collects, TrainerAdapter trains, Trainer joins them into epochs.
Subclass one, register it, name it in the YAML. Policy is what a training backend samples from.

The three abstract classes are those of the NVIDIA NeMo Agent Toolkit's finetuning harness, word for word in names and
signatures. Nothing here knows a Run, a store or a widget.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import BackendError, ConfigError
from .hooks import resolve, without_wrappers
from .redaction import error_text, redacting_logger
from .text import most_frequent_error
from .types import (
    Demonstrations,
    EpisodeKey,
    EvalOutputItem,
    EvaluationRunConfig,
    EvaluationRunOutput,
    RolloutRequest,
    RolloutResult,
    Sample,
    SamplingParams,
    TrainingJobRef,
    TrainingJobStatus,
    Trajectory,
    TrajectoryCollection,
    WarmUpSettings,
)
from .user_code import contained

if TYPE_CHECKING:
    from .config.base import TrainerAdapterConfig, TrainerConfig, TrajectoryBuilderConfig
    from .config.sections import CurriculumLearningConfig, FinetuneConfig, FinetuneRunConfig

__all__ = [
    "Environment",
    "Policy",
    "ReplicatedPolicy",
    "RolloutExecutor",
    "Trainer",
    "TrainerAdapter",
    "TrajectoryBuilder",
]

logger = redacting_logger(__name__)


class Policy(Protocol):
    """A model that is sampled and trained: one set of weights. Built by a TrainerAdapter as `adapter.policy`. A run shows
    the `description` of one that has it: a line about model, device and dtype. One with `constrains = True` holds replies to
    `SamplingParams.reply_format`; others are never asked to.

    A policy that renders a chat template may take more, by name: `render` takes `chat_template_kwargs` and
    `previous_template_kwargs` (variables of the template now and in the turn before), `parse` takes `tools` and `tool_parser`,
    `encode` takes `add_special_tokens`. They are given to a policy whose methods have them. `sample` takes `version` where
    older weights can be sampled: see `TrainerAdapter.keep_sampling`.
    """

    version: int
    """Counts the weight updates, from 0. Every trajectory carries the version that sampled it."""

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        previous_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """Render the prompt for the next assistant turn.

        Args:
            messages: OpenAI chat messages.
            tools: OpenAI tool schemas. Default: none.
            previous_ids: Prompt and reply of the turn before, exactly as sampled. If given, only what follows the last
                assistant message is rendered, after them.

        Returns:
            Token ids of the prompt, `previous_ids` included.
        """
        ...

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int) -> Sample:
        """Sample one reply; awaited on any event loop.

        Args:
            ids: Token ids of the prompt.
            params: Sampling parameters.
            seed: The same ids, params, seed and weights give the same reply.

        Returns:
            Token ids of the reply with their logprobs and the reason why it ended.
        """
        ...

    def parse(self, ids: Sequence[int]) -> dict[str, Any]:
        """Turn the token ids of a reply into a message.

        Args:
            ids: Token ids of the reply.

        Returns:
            An OpenAI assistant message: `content`, and `tool_calls` if the model called tools.
        """
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Text of each token.

        Args:
            ids: Token ids.

        Returns:
            One string a token.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Encode plain text, without a chat template and without anything added to it.

        Args:
            text: The text.

        Returns:
            Token ids.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids, without special tokens.

        Args:
            ids: Token ids.

        Returns:
            The text.
        """
        ...

    def episode(self, key: EpisodeKey) -> AbstractContextManager[None]:
        """Entered for as long as a rollout lives, so that a batch can wait for every live one.

        Args:
            key: Phase, epoch, example and generation of the rollout.

        Returns:
            A context manager.
        """
        ...


class Environment(ABC):
    """Tasks, an agent for them and a reward, which come together: what `ft.Run(env=...)` takes.

    Each kind of environment of other people has a subclass, which `components/environments.py` names. It is made anew when a run
    is opened again from its folder, by the same arguments.

    Args:
        given: The name that follows "<kind>:", or an object or class of the user's.
        options: The user's `env_options`; checked here.
    """

    package: str = ""
    """What to install for it."""

    @classmethod
    def takes(cls, given: Any) -> bool:
        """Say whether an object or class is an environment of this kind, without importing its package.

        Args:
            given: What the user passed; never a text.

        Returns:
            True if it is.
        """
        return False

    @abstractmethod
    def __init__(self, given: Any, options: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def rows(self, role: str) -> list[dict[str, Any]]:
        """Make the dataset.

        Args:
            role: "train" or "validation".

        Returns:
            One row a task: its columns are what agent and reward may take by name. Empty: there is no such dataset.

        Raises:
            ConfigError: It has no tasks of its own: `dataset=` must be given.
        """

    @property
    @abstractmethod
    def workflow(self) -> Callable[..., Any]:
        """The agent, as `Run` takes it. It can be pickled, to run elsewhere."""

    @property
    @abstractmethod
    def reward(self) -> Any:
        """The reward, as `Run` takes it, of what the agent returned: a recorded rollout can be scored again."""

    @property
    def fingerprint(self) -> str:
        """A text that differs where something else would be trained: versions, the source of a class. A run that continues
        compares it with its record."""
        return ""

    def adapt_reward(self, reward: Any) -> Any:
        """Turn a reward of the user's into one that `Run` takes.

        Args:
            reward: As it was given.

        Returns:
            The reward itself, unless it is written for this kind of environment.
        """
        return reward

    async def aclose(self) -> None:
        """Releases what it holds. Called when the run closes."""


class ReplicatedPolicy(Policy, Protocol):
    """A Policy of which other processes may hold replicas: an engine elsewhere samples from them. What a policy without
    these is made of goes there as it is."""

    weights_id: Any
    """Another one whenever the weights may be others."""

    def replica(self) -> Callable[[], ReplicatedPolicy]:
        """What can be pickled and makes a replica there, which `take` gives its weights."""
        ...

    def weights(self) -> tuple[Any, int, Any]:
        """weights_id, version and what training changes, which can be pickled."""
        ...

    def take(self, weights: Any, version: int) -> None:
        """Samples from these weights from now on."""
        ...


class TrajectoryBuilder(ABC):
    """Runs the workflow over a dataset and turns what happened into trajectories."""

    def __init__(self, trajectory_builder_config: TrajectoryBuilderConfig):
        self.trajectory_builder_config = trajectory_builder_config
        self.run_config: FinetuneConfig = None  # type: ignore[assignment]  # set by initialize

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Called once, before the first epoch. Override to open what the builder needs; call super first.

        Args:
            run_config: The section `finetuning` of the config.
        """
        self.run_config = run_config
        self.trajectory_builder_config.reward = self.run_config.reward_function

    async def run_eval(self) -> EvaluationRunOutput:
        """Make one generation: run the workflow once over the dataset, and score it with every evaluator.

        Returns:
            The items, the evaluators' verdicts, and the rollouts that failed.

        Raises:
            ConfigError: The builder is not initialized, or the config has a mistake.
            DatasetError: Something is wrong with the dataset.
            WorkflowError: The workflow cannot be run on the dataset.
        """
        run = _run_configuration(self.run_config)
        evaluation = resolve("finetune_nb.rollouts.evaluation:EvaluationRun")
        config = EvaluationRunConfig(
            config_file=run.config_file,
            dataset=None if run.dataset is None else str(run.dataset),
            result_json_path=run.result_json_path,
            endpoint=run.endpoint,
            endpoint_timeout=run.endpoint_timeout,
            override=run.override,
        )
        return await evaluation(config=config).run_and_evaluate()

    @abstractmethod
    async def start_run(self, run_id: str, meta: dict | None = None) -> None:
        """Start collecting; returns as soon as the work has begun.

        Args:
            run_id: Id of the run.
            meta: Details of the caller; `meta["epoch"]` is the epoch's number, from 0.
        """
        raise NotImplementedError

    @abstractmethod
    async def finalize(self, run_id: str, meta: dict | None = None) -> TrajectoryCollection:
        """Wait for what `start_run` began.

        Args:
            run_id: Id of the run.
            meta: Details of the caller; `meta["epoch"]` is the epoch's number, from 0.

        Returns:
            The trajectories, one group per example.
        """
        raise NotImplementedError

    async def compute_reward(self, output_item: EvalOutputItem, meta: dict | None = None) -> float:
        """Compute the reward of a scored item: its score. Override to shape it.

        Args:
            output_item: What the evaluator returned for it.
            meta: Details of the caller; `meta["epoch"]` is the epoch's number, from 0.

        Returns:
            The reward; 0.0 for an item without a score.
        """
        return float(output_item.score) if output_item.score is not None else 0.0

    @abstractmethod
    def log_progress(self, run_id: str, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Write down how the collecting went.

        Args:
            run_id: Id of the run.
            metrics: Plain numbers and text.
            output_dir: Folder to write to. Default: the component's own choice.
        """
        raise NotImplementedError


_CANNOT_SCORE = (
    "{} cannot compute the log probabilities of recorded tokens. Expected an adapter with load_weights and token_logprobs, "
    "such as local_grpo, trl_sft or trl_dpo."
)


class TrainerAdapter(ABC):
    """The bridge to a training backend. One that samples from its own weights offers them as `policy`."""

    policy: Policy | None = None
    finds_jobs_again: bool = False
    """True where `wait_until_complete` knows a job by its ref in another process too: a run whose process ended while a
    job was running then asks for that job, and does not submit it again. Raise UnknownJob for one that is not there."""
    status_is_cheap: bool = False
    """True where asking for a job's status costs nothing: then it is asked every second, to show how far training is."""
    takes_preferences: bool = False
    """True where it learns from preferences, not from episodes."""

    def __init__(self, adapter_config: TrainerAdapterConfig):
        self.adapter_config = adapter_config
        self.run_config: FinetuneConfig = None  # type: ignore[assignment]  # set by initialize

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Called once, before the first epoch. Override to connect or to load weights; call super first.

        Args:
            run_config: The section `finetuning` of the config.
        """
        self.run_config = run_config
        self.adapter_config.reward = self.run_config.reward_function

    @abstractmethod
    async def is_healthy(self) -> bool:
        """Whether the backend can train. Asked before the first epoch.

        Returns:
            True if it can; False stops the run.
        """
        raise NotImplementedError

    @abstractmethod
    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Hand trajectories over to the backend; returns at once.

        Args:
            trajectories: Groups of trajectories to train on.

        Returns:
            A reference to the job, which has an id of its own.

        Raises:
            BackendError: The backend cannot train on them.
            MissingLogprobs: A sampled turn has no logprobs, and the backend needs them.
            StalePolicy: Other weights sampled them than those that would be trained.
        """
        raise NotImplementedError

    async def submit_chosen(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Hand over rollouts that somebody chose, to be learned as they are: what was sampled in them becomes more likely,
        whatever their rewards. Override it where the backend can. Returns at once.

        Args:
            trajectories: Episodes; preferences, where the adapter takes those.

        Returns:
            As `submit`.

        Raises:
            BackendError: The backend cannot train on them, or on any that were chosen.
        """
        raise BackendError(
            f"{type(self).__name__} learns from rewards alone, not from rollouts that were chosen. Expected an adapter with "
            "submit_chosen, such as local_grpo, trl_sft or trl_dpo."
        )

    async def submit_demonstrations(
        self, run_id: str, demonstrations: Demonstrations, held_out: Demonstrations, settings: WarmUpSettings
    ) -> TrainingJobRef:
        """Hand over conversations, of which the assistant's tokens are to be learned. Override it where the backend can. Returns
        at once. The job's metadata say kind "warm_up", and have what `Epoch.warm_up` reads.

        Args:
            run_id: Id of the run.
            demonstrations: Those to learn, and the rows of which none could be made.
            held_out: Those of which only the loss is measured.
            settings: How.

        Returns:
            As `submit`.

        Raises:
            BackendError: The backend cannot learn them, or demonstrations at all.
            DatasetError: None of them can be rendered.
        """
        raise BackendError(
            f"{type(self).__name__} learns from rollouts alone, not from demonstrations. Expected an adapter with "
            "submit_demonstrations, such as local_grpo."
        )

    async def keep_sampling(self) -> int:
        """Keep the weights as they are now for sampling: `policy.sample(..., version=...)` gives replies of them while a job
        trains, and after it, until this is called again. Called before `submit`, when no job is at work. Override it where the
        backend can; a run with `max_staleness: 1` then samples an epoch while the epoch before it trains.

        Returns:
            Their policy version.

        Raises:
            ConfigError: The backend cannot sample while it trains.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot sample while it trains. Expected an adapter with keep_sampling, such as tinker, or "
            "local_grpo with a vLLM server as its sampler. Leave max_staleness at 0."
        )

    async def load_weights(self, directory: str | Path) -> None:
        """Put the policy's weights where they were when a checkpoint was saved, without what only training needs. Asked of an
        adapter that nobody trains with. Override it together with `token_logprobs`.

        Args:
            directory: What `save_checkpoint` wrote.

        Raises:
            BackendError: It is missing, damaged or of another model.
        """
        raise BackendError(_CANNOT_SCORE.format(type(self).__name__))

    async def token_logprobs(self, trajectory: Trajectory) -> list[list[float]]:
        """Compute the log probabilities of recorded tokens under the policy's weights. Override it where the backend can.

        Args:
            trajectory: An episode with the ids of its tokens and prompts.

        Returns:
            For each sampled turn a list with one number a token: natural logarithms, at the temperature that it was sampled at.

        Raises:
            BackendError: The backend cannot, or the trajectory lacks the ids.
            MissingLogprobs: A sampled turn has no logprobs.
        """
        raise BackendError(_CANNOT_SCORE.format(type(self).__name__))

    @abstractmethod
    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        """Ask for a job's status. Reading changes nothing and can be repeated, also after its end.

        Args:
            ref: What `submit` returned.

        Returns:
            The job's current status.

        Raises:
            UnknownJob: There is no such job.
        """
        raise NotImplementedError

    @abstractmethod
    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        """Wait until a job has ended, well or badly.

        Args:
            ref: What `submit` returned.
            poll_interval: Seconds between questions to a backend that must be asked.

        Returns:
            The job's last status; a failed job is returned, not raised.

        Raises:
            UnknownJob: There is no such job.
        """
        raise NotImplementedError

    @abstractmethod
    def log_progress(self, ref: TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Write down how the training went.

        Args:
            ref: What `submit` returned.
            metrics: Plain numbers and text.
            output_dir: Folder to write to. Default: the component's own choice.
        """
        raise NotImplementedError


class Trainer(ABC):
    """Joins a builder and an adapter into epochs."""

    trains_in_run: bool = False
    """True for a Trainer that trains only in `run()`; a Run then offers `start()`, no single epochs and no live curriculum."""

    @property
    def shown_as(self) -> str:
        """What error messages call it."""
        return type(self).__name__

    def __init__(self, trainer_config: TrainerConfig, **kwargs: Any) -> None:
        self.trainer_config = trainer_config
        self.run_config: FinetuneConfig = None  # type: ignore[assignment]  # set by initialize
        self.curriculum_config: CurriculumLearningConfig = None  # type: ignore[assignment]
        self.trajectory_builder: TrajectoryBuilder = None  # type: ignore[assignment]
        self.trainer_adapter: TrainerAdapter = None  # type: ignore[assignment]
        self._curriculum_state: dict[str, Any] = None  # type: ignore[assignment]

    async def bind_components(self, trajectory_builder: TrajectoryBuilder, trainer_adapter: TrainerAdapter) -> None:
        """Called once, before `initialize`.

        Args:
            trajectory_builder: Collects the trajectories.
            trainer_adapter: Trains on them.
        """
        self.trajectory_builder = trajectory_builder
        self.trainer_adapter = trainer_adapter

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Set the curriculum to its start and initialize the two components.

        Args:
            run_config: The section `finetuning` of the config.
        """
        self.run_config = run_config
        self.curriculum_config = run_config.curriculum_learning
        self._curriculum_state = {
            "current_percentile": self.curriculum_config.initial_percentile,
            "last_expansion_epoch": -1,
            "total_groups": 0,
            "included_groups": set(),
        }
        self.trainer_config.reward = run_config.reward_function
        await self.trajectory_builder.initialize(run_config)
        await self.trainer_adapter.initialize(run_config)

    @abstractmethod
    async def run_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        """Run one epoch: collect, select, submit.

        Args:
            epoch: Its number, from 0.
            run_id: Id of the run.

        Returns:
            A reference to the training job. None if nothing was submitted.
        """
        raise NotImplementedError

    @abstractmethod
    async def run(self, num_epochs: int) -> list[TrainingJobStatus]:
        """Run all epochs, from 0.

        Args:
            num_epochs: How many.

        Returns:
            The last status of each job.
        """
        raise NotImplementedError

    @abstractmethod
    async def get_metrics(self, run_id: str) -> dict[str, Any]:
        """What is known of the run's jobs.

        Args:
            run_id: Id of the run.

        Returns:
            Plain data.
        """
        raise NotImplementedError

    @abstractmethod
    async def cleanup(self) -> None:
        """Releases what the trainer holds. Called once."""
        raise NotImplementedError

    @abstractmethod
    def log_progress(self, epoch: int, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Write down how an epoch went.

        Args:
            epoch: Its number, from 0.
            metrics: Plain numbers and text.
            output_dir: Folder to write to. Default: the component's own choice.
        """
        raise NotImplementedError

    async def run_validation_evaluation(self, epoch: int, run_id: str) -> dict[str, Any]:
        """Evaluate once on `run_configuration.validation_dataset`.

        A copy of the builder does it: nothing of the run that continues in the meantime is touched.

        Args:
            epoch: Number of the epoch that follows; after the last one's update, of that one.
            run_id: Id of the run.

        Returns:
            avg_reward, min_reward, max_reward, num_examples, scores, epoch and dataset_type; rewards_missing and
            reward_error: how many items have no finite score, failed rollouts among them, and the most frequent reason.
            An evaluation that fails has avg_reward NaN and `error`; an item without a score does not count.
        """
        try:
            builder = without_wrappers(self.trajectory_builder)
            builder.run_config = copy.deepcopy(self.run_config)
            run = _run_configuration(builder.run_config)
            run.dataset = run.validation_dataset
            if run.validation_config_file:
                run.config_file = Path(run.validation_config_file)
            output = await contained("the validation", builder.run_eval())
            metrics = self._calculate_validation_metrics(output)
        except Exception as error:
            logger.exception("validation before epoch %d failed", epoch)
            metrics = {**_NO_VALIDATION, "error": error_text(error)}
        return {**metrics, "epoch": epoch, "dataset_type": "validation"}

    def _calculate_validation_metrics(self, eval_output: EvaluationRunOutput) -> dict[str, Any]:
        """Means of what every evaluator said; the reward is the one that the config names."""
        scores: dict[str, list[float]] = {}
        for name, output in eval_output.evaluation_results:
            values = [item.score for item in output.eval_output_items]
            scores[name] = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        reward = self.trainer_config.reward or self.run_config.reward_function
        rewards = scores.get(reward.name, []) if reward else []
        missing = _missing_rewards(eval_output, reward.name) if reward else []
        why = most_frequent_error(missing)
        metrics: dict[str, Any] = {
            **_NO_VALIDATION,
            "rewards_missing": len(missing),
            "reward_error": why,
            "scores": {name: sum(values) / len(values) for name, values in scores.items() if values},
        }
        if not rewards:
            name = reward.name if reward else None
            because = f" ({why})" if why else ""
            known = ", ".join(scores) or "none"
            return {**metrics, "error": f"no item has a score of {name!r}{because}; evaluators: {known}"}
        return {
            **metrics,
            "avg_reward": sum(rewards) / len(rewards),
            "min_reward": min(rewards),
            "max_reward": max(rewards),
            "num_examples": len(rewards),
        }

    def apply_curriculum_learning(
        self, trajectory_collection: TrajectoryCollection, epoch: int
    ) -> TrajectoryCollection:
        """Choose the groups to train on.

        Args:
            trajectory_collection: All groups of the epoch.
            epoch: Its number, from 0.

        Returns:
            The chosen groups, in the order in which they are trained on.

        Raises:
            NotImplementedError: The trainer has no curriculum.
        """
        raise NotImplementedError(
            "Curriculum learning not implemented for this trainer. Override to implement curriculum learning."
        )

    def get_curriculum_state(self) -> dict[str, Any]:
        """The curriculum's state, ready for JSON.

        Returns:
            current_percentile, last_expansion_epoch, total_groups, included_groups (a sorted list) and config.
        """
        return {
            **self._curriculum_state,
            "included_groups": sorted(self._curriculum_state["included_groups"]),
            "config": self.curriculum_config.model_dump() if self.curriculum_config else None,
        }


def _run_configuration(config: FinetuneConfig) -> FinetuneRunConfig:
    if config is None or config.run_configuration is None:
        raise ConfigError(
            "there is no run_configuration, which names the config and the dataset to evaluate. Call initialize with a "
            "FinetuneConfig that has one; a Run does it for you."
        )
    return config.run_configuration


def _missing_rewards(eval_output: EvaluationRunOutput, name: str) -> list[str]:
    """Why each item that has no finite score of the evaluator of that name has none."""
    failures = getattr(eval_output, "failures", ())  # of the Toolkit's own evaluations there are none
    errors = [failure.error for failure in failures]
    for evaluator, output in eval_output.evaluation_results:
        if evaluator != name:
            continue
        for item in output.eval_output_items:
            if not isinstance(item.score, int | float):
                errors.append(getattr(item, "error", None) or "no reason was given")
            elif not math.isfinite(item.score):
                errors.append(f"the reward is {item.score}")
    return errors


_NO_VALIDATION = {
    "avg_reward": math.nan,
    "min_reward": math.nan,
    "max_reward": math.nan,
    "num_examples": 0,
    "scores": {},
}


RolloutFunction = Callable[[RolloutRequest], Awaitable[RolloutResult]]


class RolloutExecutor(Protocol):
    """Whatever runs rollouts. `LocalExecutor` is the smallest one."""

    async def map(
        self,
        rollout: RolloutFunction,
        requests: Sequence[RolloutRequest],
        on_result: Callable[[RolloutResult], None] | None = None,
    ) -> list[RolloutResult]:
        """All results, in the order of the requests. Cancelling it cancels its rollouts and no others. on_result: called
        with each one as it ends."""
        ...
