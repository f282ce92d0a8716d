"""Scores rollouts that were recorded: with other functions, or with other weights of the scores that are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RunError
from ..types import EvalInputItem, EvalOutputItem, Trajectory
from .functions import RewardFunction, TrajectoryOf, batch_method
from .scoring import WeightedSum, score
from .verdicts import scores_of, words_of

__all__ = [
    "RecordedRollout",
    "RecordedScores",
    "needs_trajectories",
    "score_recorded",
    "weighted_scores",
]


class RecordedRollout(EvalInputItem):
    """A recorded rollout as a reward function gets it. What was not recorded is an error, not an empty value."""

    labels: dict[str, float | None] = {}
    """The tags of its labels, each with the mean of its scores; None for a tag without a score."""

    @classmethod
    def of(
        cls,
        example: Any,
        row: EvalInputItem | None,
        labels: Mapping[str, float | None] | None = None,
        **output: Any,
    ) -> RecordedRollout:
        """Make one.

        Args:
            example: Id of the example.
            row: Its row of the dataset; None if that is not known.
            labels: The scores of its tags.
            **output: `output_obj`, what the workflow returned, if that was recorded.

        Returns:
            The rollout.
        """
        # As model_construct does it, without the defaults: what was not recorded is missing.
        item = cls.__new__(cls)
        known = {
            "id": example,
            "input_obj": row.input_obj if row else None,
            "expected_output_obj": row.expected_output_obj if row else None,
            "expected_trajectory": [],
            "full_dataset_entry": row.full_dataset_entry if row else None,
            "labels": dict(labels or {}),
            **output,
        }
        object.__setattr__(item, "__dict__", known)
        object.__setattr__(item, "__pydantic_fields_set__", set(known))
        object.__setattr__(item, "__pydantic_extra__", None)
        object.__setattr__(item, "__pydantic_private__", None)
        return item

    def __getattr__(self, name: str) -> Any:
        if name == "output_obj":
            raise RunError(
                "what the workflow returned was not recorded by the release that made this run. Take `trajectory` instead of "
                "`output`: its last message is the last reply."
            )
        if name == "trajectory":
            raise RunError(
                "item.trajectory, the steps of a rollout, is not recorded. Take the parameter `trajectory` instead, which has "
                "its messages."
            )
        return super().__getattr__(name)  # type: ignore[misc]  # pydantic has one


@dataclass(frozen=True, eq=False)
class RecordedScores:
    """New scores of N recorded rollouts."""

    rewards: np.ndarray
    """(N,) float64, NaN where there is none."""
    scores: dict[str, np.ndarray]
    """Evaluator or part of one -> (N,) float64."""
    errors: list[str | None]
    """(N,) why a reward is missing."""
    turns: list[list[float] | None]
    """(N,) a reward for each sampled turn, where the function gave some."""
    reasoning: list[Any]
    """(N,) what the reward said besides the number."""
    words: list[dict[str, Any]]
    """(N,) what the other evaluators said, by name."""


def needs_trajectories(evaluators: Mapping[str, Any]) -> bool:
    """Whether a reward function asks for the trajectories, which take longest to read.

    Args:
        evaluators: Evaluators by name.

    Returns:
        True if one has the parameter `trajectory` or `trajectories`, or reads ATIF.
    """
    if any(getattr(each, "evaluate_atif_fn", None) is not None for each in evaluators.values()):
        return True
    functions = [each for each in evaluators.values() if callable(each) and not isinstance(each, WeightedSum)]
    return any(RewardFunction(function).wants_trajectory for function in functions)


async def score_recorded(
    evaluators: Mapping[str, Any],
    reward_name: str,
    items: Sequence[EvalInputItem],
    groups: Sequence[Sequence[int]],
    trajectories: Sequence[Trajectory] | None = None,
    max_concurrency: int = 64,
) -> RecordedScores:
    """Score recorded rollouts.

    Args:
        evaluators: Evaluators by name.
        reward_name: The one whose score is the reward.
        items: The rollouts.
        groups: Positions in `items` of the rollouts of each example.
        trajectories: Their trajectories, if a function asks for them.
        max_concurrency: How many calls of an async function run at once.

    Returns:
        The scores, in the order of `items`.
    """
    trajectory_of: TrajectoryOf | None = None
    if trajectories is not None:
        by_item = {id(item): trajectory for item, trajectory in zip(items, trajectories, strict=True)}
        trajectory_of = lambda item: by_item[id(item)]  # noqa: E731

    known: dict[str, list[EvalOutputItem]] = {}
    batched = {name: each for name, each in evaluators.items() if batch_method(each) is not None}
    for wave in _waves(groups) if batched else ():
        # Such an evaluator tells rollouts apart by their example: it gets one of each at a time.
        found = await score(batched, [items[place] for place in wave], None, None, max_concurrency, trajectory_of)
        for name, output in found.items():
            verdicts = known.setdefault(name, [None] * len(items))  # type: ignore[list-item]  # all are filled
            for place, verdict in zip(wave, output.eval_output_items, strict=True):
                verdicts[place] = verdict
    found = await score(evaluators, items, groups, known, max_concurrency, trajectory_of)
    verdicts_of = known | {name: output.eval_output_items for name, output in found.items()}
    return _scores(verdicts_of, reward_name, len(items))


def _waves(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rollouts in parts that have at most one rollout of each example."""
    longest = max(map(len, groups), default=0)
    return [[places[number] for places in groups if number < len(places)] for number in range(longest)]


def _scores(verdicts: Mapping[str, Sequence[EvalOutputItem]], reward_name: str, count: int) -> RecordedScores:
    rewards = np.full(count, math.nan)
    scores: dict[str, np.ndarray] = {}
    errors: list[str | None] = []
    turns: list[list[float] | None] = []
    reasoning: list[Any] = []
    words: list[dict[str, Any]] = []
    for place in range(count):
        of_rollout = {name: found[place] for name, found in verdicts.items()}
        for name, value in scores_of(of_rollout, reward_name).items():
            if name not in scores:
                scores[name] = np.full(count, math.nan)
            if value is not None:
                scores[name][place] = value
        verdict = of_rollout[reward_name]
        if verdict.score is not None:
            rewards[place] = verdict.score
        errors.append(verdict.error)
        turns.append(getattr(verdict, "turns", None))
        reasoning.append(verdict.reasoning)
        words.append(words_of(of_rollout, reward_name))
    return RecordedScores(rewards, scores, errors, turns, reasoning, words)


def weighted_scores(weights: Mapping[str, float], scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Add up scores that are there already, in the order and with the rounding of an epoch's own sum.

    Args:
        weights: Name -> weight.
        scores: Name -> (N,) float64, for each of the weights.

    Returns:
        (N,) float64, NaN where a score is missing.
    """
    total: Any = 0
    for name, weight in weights.items():
        total = total + weight * scores[name]
    return np.asarray(total, dtype=np.float64)
