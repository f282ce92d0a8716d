"""EvalTrajectoryBuilder: G generations of every drawn example, each one evaluation run, grouped by example.

A generation that fails leaves the others; a rollout that fails is a RolloutFailure in the collection; a finished rollout
without a valid reward is a trajectory with reward NaN.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exception
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..components.builder import Builder
from ..components.registry import register_trajectory_builder
from ..config.base import TrajectoryBuilderConfig
from ..errors import ConfigError, did_you_mean
from ..interfaces import RolloutExecutor, TrajectoryBuilder
from ..redaction import error_text, redact_text, redacting_logger
from ..rewards.scoring import score
from ..rewards.verdicts import no_score, scores_of, words_of
from ..store.json import append_jsonl, plain
from ..text import text_of, told_once
from ..types import (
    EpisodeItem,
    EvalInputItem,
    EvalOutputItem,
    EvaluationRunOutput,
    RolloutFailure,
    RolloutResult,
    Trajectory,
    TrajectoryCollection,
    is_sampled,
)
from ..user_code import contained
from .difficulty import DifficultySettings, Visits, draw_by_difficulty
from .episodes import drift, episode_from_steps, tools_from_calls
from .evaluation import EvaluationContext, evaluation_context
from .executor import LocalExecutor

__all__ = [
    "EvalTrajectoryBuilder",
    "EvalTrajectoryBuilderConfig",
    "draw_examples",
    "draw_of",
]

logger = redacting_logger(__name__)


BY_DIFFICULTY = {"live": "rollouts", "where": {"draw": "difficulty"}}
"""Of a setting that counts only where examples are drawn by difficulty."""


class EvalTrajectoryBuilderConfig(TrajectoryBuilderConfig, name="eval_traj_builder"):
    """Trajectories from evaluation runs."""

    num_generations: int = Field(default=8, ge=1, json_schema_extra={"live": "rollouts"})
    """Rollouts of each example: the size of a group. Advantages are relative to it, so 1 teaches nothing."""
    examples_per_epoch: int | None = Field(default=None, ge=1)
    """Examples drawn for an epoch, without replacement until the dataset is used up; None = all of them."""
    draw: Literal["uniform", "difficulty"] = "uniform"
    """Which examples an epoch draws: "difficulty" prefers those whose pass rate, as the run's record measures it, is near
    `target_rate`. Solved examples and those that are too hard rest meanwhile."""
    target_rate: float = Field(default=0.5, gt=0, lt=1, json_schema_extra=BY_DIFFICULTY)
    """The pass rate to draw around: the mean reward of an example's rollouts, held to 0 .. 1."""
    rate_width: float = Field(default=0.25, gt=0, json_schema_extra=BY_DIFFICULTY)
    """How far from it examples are still drawn often: the standard deviation of a bell curve over pass rates."""
    rest_epochs: int = Field(default=5, ge=0, json_schema_extra=BY_DIFFICULTY)
    """Epochs that an example rests once all of its rollouts passed, or none in two epochs that drew it; then it is checked again,
    and rests twice as long if nothing has changed, up to eight times."""
    include_tool_calls: bool = True
    """Whether the episode contains tool messages. What is trained on is the same either way: the sampled tokens."""
    min_episode_length: int = Field(default=2, ge=1)
    """Messages that an episode must have; a shorter one is a failure."""

    @property
    def difficulty(self) -> DifficultySettings | None:
        """How examples are drawn by difficulty; None where they are drawn evenly."""
        if self.draw == "uniform":
            return None
        return DifficultySettings(self.target_rate, self.rate_width, self.rest_epochs)

    @model_validator(mode="after")
    def check_draw(self) -> Self:
        if self.draw == "difficulty" and self.examples_per_epoch is None:
            raise ValueError(
                "draw is 'difficulty' and examples_per_epoch is not given, so that every epoch would take all examples; say how "
                "many it draws"
            )
        return self


@dataclass
class _Finished:
    """A rollout that ended well, on its way to become a trajectory."""

    item: EvalInputItem
    generation: int
    episode: list[EpisodeItem]
    version: int | None
    """The oldest policy version that sampled in it."""
    verdicts: dict[str, EvalOutputItem]
    """By evaluator."""


class EvalTrajectoryBuilder(TrajectoryBuilder):
    """Collects by `run_eval`, once a generation, all generations at the same time under one bound on concurrency."""

    reads_our_rows: bool = True
    """Whether `run_eval` runs the Config's workflow on the Config's dataset, which a Run then checks before it begins."""
    samples_one_version: bool = True
    """Whether all rollouts are of the policy version that `meta["policy_version"]` of `start_run` says, if it says one."""

    def __init__(
        self,
        trajectory_builder_config: TrajectoryBuilderConfig,
        seed: int = 0,
        max_concurrency: int | Callable[[], int] = 8,
        executor: RolloutExecutor | None = None,
    ) -> None:
        super().__init__(trajectory_builder_config)
        self.evaluation_runs: dict[str, list[asyncio.Task[EvaluationRunOutput]]] = {}
        self.seed = seed
        self._executor, self._max_concurrency = executor, max_concurrency
        self.visits_before: Callable[[int], Visits] | None = None
        """Gives what the run's record says of each example before an epoch, for draws by difficulty. Set by whoever has one."""

    @property
    def num_generations(self) -> int:
        """Rollouts of each example."""
        return getattr(self.trajectory_builder_config, "num_generations", 1)

    async def start_run(self, run_id: str, meta: dict | None = None) -> None:
        """Start all generations.

        Args:
            run_id: Id of the run.
            meta: Details of the caller; `meta["epoch"]` is the epoch's number, from 0, and `meta["policy_version"]` the policy
                version to sample. Default: the newest.

        Raises:
            ValueError: The run is already collecting.
        """
        if run_id in self.evaluation_runs:
            raise ValueError(f"Run {run_id} is already in progress: finalize it before the next start_run.")
        epoch = (meta or {}).get("epoch", 0)
        size = getattr(self.trajectory_builder_config, "examples_per_epoch", None)
        draw = draw_of(self.trajectory_builder_config, size, epoch, self.seed, self.visits_before) if size else None
        version = (meta or {}).get("policy_version")
        bound = self._max_concurrency
        executor = self._executor or LocalExecutor(bound if isinstance(bound, int) else bound())
        self.evaluation_runs[run_id] = [
            asyncio.create_task(
                self._generation(self._context(epoch, generation, draw, executor, version)),
                name=f"{run_id}-epoch-{epoch}-generation-{generation}",
            )
            for generation in range(self.num_generations)
        ]

    def _context(
        self,
        epoch: int,
        generation: int,
        draw: Draw | None,
        executor: RolloutExecutor,
        version: int | None,
    ) -> EvaluationContext:
        return EvaluationContext(
            "train", epoch, generation, draw, executor, self._unscored, is_part=True, version=version
        )

    async def _generation(self, context: EvaluationContext) -> EvaluationRunOutput:
        evaluation_context.set(context)
        return await contained("run_eval", self.run_eval())

    async def finalize(self, run_id: str, meta: dict | None = None) -> TrajectoryCollection:
        """Wait for all generations.

        Args:
            run_id: Id of the run.
            meta: Details of the caller; `meta["epoch"]` is the epoch's number, from 0.

        Returns:
            The trajectories, grouped by example in the order of the draw.

        Raises:
            ValueError: The run was not started.
            ConfigError: No evaluator has the reward's name.
            Exception: The first generation's own error, if all of them failed.
        """
        if run_id not in self.evaluation_runs:
            raise ValueError(f"No evaluation runs found for run_id: {run_id}. Call start_run first.")
        tasks = self.evaluation_runs[run_id]
        try:
            outputs = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self.evaluation_runs.pop(run_id, None)
            for task in tasks:
                task.cancel()
        return await self.collect(outputs, run_id, meta)

    def unscored(self, result: RolloutResult, run_id: str) -> Trajectory | RolloutFailure:
        """Turn a rollout that has ended into a trajectory before it is scored.

        Args:
            result: The rollout.
            run_id: Id of the run.

        Returns:
            A trajectory with reward NaN, or the failure.
        """
        key, item = result.request.key, result.request.item
        if result.error is not None:
            return RolloutFailure(item.id, key.generation, redact_text(result.error), result.steps)
        item = item.model_copy(update={"output_obj": result.output, "trajectory": result.steps})
        try:
            episode, version = self._episode(item)
        except ValueError as error:
            return RolloutFailure(item.id, key.generation, error_text(error), result.steps)
        metadata = {"id": item.id, "generation": key.generation, "run_id": run_id, "policy_version": version}
        metadata["output"] = plain(item.output_obj, "output")
        metadata["reward_error"] = "it was not scored before the epoch ended"
        return Trajectory(episode=episode, reward=math.nan, metadata=metadata)

    async def collect(
        self, outputs: Sequence[EvaluationRunOutput | BaseException], run_id: str, meta: dict | None = None
    ) -> TrajectoryCollection:
        """Group the trajectories of finished evaluations.

        Args:
            outputs: One a generation; an exception in place of one that failed.
            run_id: Id of the run.
            meta: Details of the caller; `meta["epoch"]` is the epoch's number, from 0.

        Returns:
            The trajectories and the failures.

        Raises:
            ConfigError: No evaluator has the reward's name.
            Exception: The first of them, if every generation failed.
        """
        errors = [output for output in outputs if isinstance(output, BaseException)]
        if errors and len(errors) == len(outputs):
            raise errors[0]
        finished: list[_Finished] = []
        failures: list[RolloutFailure] = []
        unfinished: dict[str, Any] = {}
        reward_names: list[str] = []
        for generation, output in enumerate(outputs):
            if isinstance(output, BaseException):
                logger.error("generation %d failed:\n%s", generation, redact_text("".join(format_exception(output))))
                failures.append(RolloutFailure(None, generation, error_text(output)))
                continue
            failures += output.failures
            if output.workflow_interrupted:
                failures.append(
                    RolloutFailure(None, generation, "the evaluation was interrupted before all items were done")
                )
            finished += self._finished(output, generation, failures)
            unfinished |= output.unfinished
            reward_names = reward_names or [*(name for name, _ in output.evaluation_results), *output.unfinished]
        if unfinished and finished:
            await self._score_groups(finished, unfinished)
        reward_name = self._reward_name(reward_names) if reward_names or not finished else None
        groups: dict[str, list[Trajectory]] = {}  # by the text of the id: 1, 1.0 and True are equal, and three examples
        for each in finished:
            trajectory = await self._trajectory(each, reward_name, run_id, meta)
            groups.setdefault(text_of(each.item.id), []).append(trajectory)
        if failures:
            logger.warning("%d rollouts failed; %s", len(failures), told_once(failure.error for failure in failures))
        carried, drifted = drift(trajectory for group in groups.values() for trajectory in group)
        if drifted:
            logger.warning(
                "%d of %d turns that carry a conversation on were rendered anew instead of after the sampled ids (the chat "
                "template changes earlier turns, the agent does, or the server renders): each is trained on by itself.",
                drifted, carried,
            )  # fmt: skip
        return TrajectoryCollection(trajectories=list(groups.values()), run_id=run_id, failures=failures)

    def _finished(
        self, output: EvaluationRunOutput, generation: int, failures: list[RolloutFailure]
    ) -> list[_Finished]:
        """The rollouts of one evaluation that have an episode. The others are added to the failures."""
        failed = {text_of(failure.example_id) for failure in output.failures}
        verdicts = {
            name: {text_of(verdict.id): verdict for verdict in result.eval_output_items}
            for name, result in output.evaluation_results
        }
        found = []
        for item in output.eval_input.eval_input_items:
            example = text_of(item.id)
            if example in failed:
                continue
            try:
                episode, version = self._episode(item)
            except ValueError as error:
                failures.append(RolloutFailure(item.id, generation, error_text(error), item.trajectory))
                continue
            of_item = {name: by_id[example] for name, by_id in verdicts.items() if example in by_id}
            found.append(_Finished(item, generation, episode, version, of_item))
        return found

    async def _score_groups(self, finished: Sequence[_Finished], evaluators: Mapping[str, Any]) -> None:
        """Adds the verdicts of evaluators that compare all rollouts of an example."""
        groups: dict[str, list[int]] = {}
        for place, each in enumerate(finished):
            groups.setdefault(text_of(each.item.id), []).append(place)
        names = dict.fromkeys(name for each in finished for name in each.verdicts)
        known = {}
        for name in names:
            none = f"evaluator {name!r} has no verdict on it"
            known[name] = [each.verdicts.get(name) or no_score(each.item.id, none) for each in finished]
        bound = self._max_concurrency
        limit = bound if isinstance(bound, int) else bound()
        items = [each.item for each in finished]
        found = await score(evaluators, items, list(groups.values()), known, limit, self._unscored)
        for name, output in found.items():
            for each, verdict in zip(finished, output.eval_output_items, strict=True):
                each.verdicts[name] = verdict

    def _unscored(self, item: EvalInputItem) -> Trajectory:
        """The trajectory of a finished rollout before it is scored, as rewards get it. Raises ValueError where it has none."""
        episode, version = self._episode(item)
        return Trajectory(episode=episode, reward=math.nan, metadata={"id": item.id, "policy_version": version})

    async def _trajectory(
        self, finished: _Finished, reward_name: str | None, run_id: str, meta: dict | None
    ) -> Trajectory:
        item, verdicts = finished.item, finished.verdicts
        verdict = verdicts.get(reward_name) if reward_name else None
        reward, error = await self._reward(verdict, reward_name, meta)
        shaped = getattr(verdict, "turns", None) if error is None else None
        turns = sum(map(is_sampled, finished.episode))
        if shaped is not None and len(shaped) != turns:
            error = f"the reward has {len(shaped)} rewards of turns; the policy sampled {turns} turns"
            reward, shaped = math.nan, None
        metadata: dict[str, Any] = {
            "id": item.id,
            "generation": finished.generation,
            "run_id": run_id,
            "output": plain(item.output_obj, "output"),
            "reasoning": verdict.reasoning if verdict else None,
            "policy_version": finished.version,
            "scores": scores_of(verdicts, reward_name),
        }
        words = words_of(verdicts, reward_name)
        if words:
            metadata["reasonings"] = words
        tools = tools_from_calls(item)
        if tools is not None:
            metadata["tools"] = tools
        if error:
            metadata["reward_error"] = redact_text(error)
        return Trajectory(episode=finished.episode, reward=reward, shaped_rewards=shaped, metadata=metadata)

    def _episode(self, item: EvalInputItem) -> tuple[list[EpisodeItem], int | None]:
        config, run_config = self.trajectory_builder_config, self.run_config
        episode, version = episode_from_steps(
            item.trajectory,
            target_functions=run_config.target_functions if run_config else None,
            target_model=run_config.target_model if run_config else None,
            include_tool_calls=getattr(config, "include_tool_calls", True),
        )
        least = getattr(config, "min_episode_length", 2)
        if len(episode) < least:
            raise ValueError(f"the episode has {len(episode)} messages; min_episode_length is {least}")
        return episode, version

    async def _reward(
        self, verdict: EvalOutputItem | None, name: str | None, meta: dict | None
    ) -> tuple[float, str | None]:
        """The reward and, where it is NaN, why. An item without a score reaches only an overridden compute_reward."""
        if verdict is None:
            return math.nan, f"evaluator {name!r} has no verdict on it" if name else "no reward function is configured"
        scored = verdict.score is not None and not (isinstance(verdict.score, float) and math.isnan(verdict.score))
        if not scored and type(self).compute_reward is TrajectoryBuilder.compute_reward:
            return math.nan, verdict.error or "the evaluator gave no score"
        try:
            reward = float(await contained("compute_reward", self.compute_reward(verdict, meta)))
        except Exception as error:
            return math.nan, error_text(error)
        return reward, "the reward is NaN" if math.isnan(reward) else None

    def _reward_name(self, evaluators: Sequence[str]) -> str | None:
        reward = self.trajectory_builder_config.reward or (self.run_config and self.run_config.reward_function)
        if reward is None:
            return evaluators[0] if len(evaluators) == 1 else None
        if reward.name not in evaluators:
            raise ConfigError(
                f"reward_function {reward.name!r} is none of the evaluators. {did_you_mean(reward.name, evaluators)}"
            )
        return reward.name

    def log_progress(self, run_id: str, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Append a line to trajectory_builder_<run id>.jsonl.

        Args:
            run_id: Id of the run.
            metrics: Plain numbers and text.
            output_dir: Folder of the file. Default: the run's own, in `finetuning.output_dir`.
        """
        folder = output_dir or (self.run_config.output_dir / run_id if self.run_config else ".")
        line = {"num_generations": self.num_generations, **metrics}
        append_jsonl(Path(folder) / f"trajectory_builder_{run_id}.jsonl", {"run_id": run_id, **line})

    async def aclose(self) -> None:
        """Cancels what is still collecting."""
        tasks = [task for tasks in self.evaluation_runs.values() for task in tasks]
        self.evaluation_runs.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


Draw = Callable[[Sequence[EvalInputItem]], Sequence[int]]


def draw_of(
    config: TrajectoryBuilderConfig, size: int, epoch: int, seed: int, visits_before: Callable[[int], Visits] | None
) -> Draw:
    """What draws the examples of an epoch. Every generation draws, and draws the same.

    Args:
        config: Says how.
        size: How many.
        epoch: Number of the epoch, from 0.
        seed: The run's.
        visits_before: Gives what the record says before an epoch.

    Raises:
        ConfigError: They are drawn by difficulty, and there is no record.
    """
    settings = config.difficulty if isinstance(config, EvalTrajectoryBuilderConfig) else None
    if settings is None:
        return lambda items: draw_examples(len(items), size, epoch, seed)
    if visits_before is None:
        raise ConfigError(
            "draw is 'difficulty', which goes by the record of a run, and nobody keeps one here. Use ft.Run or Run.from_nat, or "
            "draw 'uniform'."
        )
    visits, drawn = visits_before(epoch), dict[int, list[int]]()

    def draw(items: Sequence[EvalInputItem]) -> list[int]:
        if len(items) not in drawn:
            check_size(len(items), size)
            ids = [item.id for item in items]
            drawn[len(items)] = draw_by_difficulty(ids, size, epoch, seed, visits, settings)
        return drawn[len(items)]

    return draw


def check_size(rows: int, size: int) -> None:
    """Raises ConfigError if the dataset is too small."""
    if size > rows:
        raise ConfigError(f"examples_per_epoch is {size}, but the dataset has {rows} rows. Lower it, or leave it out.")


def draw_examples(rows: int, size: int, epoch: int, seed: int) -> list[int]:
    """Positions of the rows of one epoch: the epoch's share of a seeded shuffle; a new shuffle when too few are left.

    The same arguments give the same draw, whatever was drawn before. Raises ConfigError if the dataset is too small.
    """
    import numpy as np

    check_size(rows, size)
    shuffle, place = divmod(epoch, rows // size)
    order = np.random.default_rng([seed, shuffle]).permutation(rows)
    return order[place * size : (place + 1) * size].tolist()


@register_trajectory_builder(config_type=EvalTrajectoryBuilderConfig)
async def eval_trajectory_builder(config: EvalTrajectoryBuilderConfig, builder: Builder):
    general = builder.config.eval.general
    trajectory_builder = EvalTrajectoryBuilder(
        config, builder.config.run.seed, lambda: general.max_concurrency, await builder.get_executor()
    )
    yield trajectory_builder
    await trajectory_builder.aclose()
