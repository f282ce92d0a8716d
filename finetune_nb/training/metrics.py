"""What an epoch looks like in numbers, and what each trajectory teaches: groups -> EpochMetrics, advantages, signal.

Pure functions of one epoch. A missing reward stays missing: it counts in no mean and has no advantage. Frames and plots
over epochs are made elsewhere; a training backend measures its own loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..rewards.numbers import group_scales, mean, scale_of, within_floats
from ..rollouts.episodes import drift, recorded_entropies
from ..text import most_frequent_error
from ..types import (
    EpochMetrics,
    GroupStatistics,
    Selection,
    Trajectory,
    TrajectoryCollection,
    as_float,
    sampled_outcome,
)

__all__ = [
    "NO_SPREAD",
    "advantages",
    "deviation_of_all",
    "deviations",
    "epoch_metrics",
    "has_signal",
    "length_correlation",
]

NO_REASON = "no reason was recorded"
NO_SPREAD = 1e-9
"""Rewards of a group that differ by no more than this count as equal: the difference is float rounding."""


def epoch_metrics(collection: TrajectoryCollection, statistics: GroupStatistics, selection: Selection) -> EpochMetrics:
    """The numbers of one epoch. `statistics` and `selection` belong to `collection`: the same groups in the same order.

    Rewards are summed up over finite ones only, NaN where there is none. `kept_trajectories` counts all trajectories of
    the kept groups, as they were submitted, also those without reward. An evaluator's mean in `scores` is over its
    finite scores, NaN where it has none. Tokens count where logprobs are a list: one float a sampled token.
    """
    sizes = np.diff(statistics.offsets)
    kept = np.zeros(len(statistics), dtype=bool)
    kept[selection.kept] = True
    finite = np.isfinite(statistics.rewards)
    rewards = statistics.rewards[finite]
    kept_rewards = statistics.rewards[finite & np.repeat(kept, sizes)]
    means = statistics.means[np.isfinite(statistics.means)]
    low, median, high = [math.nan] * 3
    if len(means):
        scale = scale_of(means)
        low, median, high = (np.quantile(means / scale, [0.1, 0.5, 0.9]) * scale).tolist()
    continued, drifted = drift(trajectory for group in collection.trajectories for trajectory in group)
    everyone = [trajectory for group in collection.trajectories for trajectory in group]
    entropy, scores = _entropy_and_scores(everyone)
    outcomes = [sampled_outcome(trajectory) for trajectory in everyone]
    tokens = np.array([count for count, _ in outcomes], dtype=np.int64)
    cut = np.array([reason == "length" for _, reason in outcomes], dtype=bool)
    messages = np.array([len(trajectory.episode) for trajectory in everyone], dtype=np.int64)
    missing = int(np.isnan(statistics.rewards).sum())
    return EpochMetrics(
        mean_reward=mean(rewards),
        min_reward=float(rewards.min()) if len(rewards) else math.nan,
        max_reward=float(rewards.max()) if len(rewards) else math.nan,
        group_quantiles=(low, median, high),
        trajectories=len(statistics.rewards),
        groups=len(statistics),
        failures=len(collection.failures),
        groups_with_spread=int(has_signal(statistics).sum()),
        kept_trajectories=int(sizes[kept].sum()),
        kept_groups=int(kept.sum()),
        kept_mean_reward=mean(kept_rewards),
        sampled_tokens=int(tokens.sum()),
        mean_entropy=entropy,
        replies_cut=int(cut.sum()),
        length_correlation=length_correlation(statistics, tokens, messages, cut),
        continued_turns=continued,
        drifted_turns=drifted,
        rewards_missing=missing,
        reward_error=(most_frequent_error(_reward_errors(collection)) or NO_REASON) if missing else None,
        scores=scores,
    )


def _reward_errors(collection: TrajectoryCollection) -> Iterator[Any]:
    """Why each trajectory without a reward has none."""
    for group in collection.trajectories:
        for trajectory in group:
            if math.isnan(trajectory.reward):
                yield (trajectory.metadata or {}).get("reward_error")


def has_signal(statistics: GroupStatistics) -> np.ndarray:
    """(G,) bool: whether the group's rewards differ. Where they do not, every advantage is 0 and nothing is taught."""
    return np.isfinite(statistics.spreads) & (statistics.spreads > NO_SPREAD)


def advantages(statistics: GroupStatistics, scale: bool = True) -> np.ndarray:
    """(N,) float64: how much better each trajectory did than its group, the weight of its tokens in GRPO's loss.

    (r - mean(group)) / (std(group) + 1e-4), from DeepSeekMath (arXiv 2402.03300, section 4.1), with the sample standard
    deviation (ddof=1) and the 1e-4 of TRL. `scale=False` leaves the division out (Dr. GRPO, arXiv 2503.20783).

    NaN for a trajectory without reward, and for all of a group that has an infinite one. 0 in a group whose rewards do
    not differ, or that has only one.
    """
    group_of = np.repeat(np.arange(len(statistics)), np.diff(statistics.offsets))
    scales, distances, deviations = _scaled(statistics)
    missing = np.isnan(statistics.rewards) | np.isnan(statistics.spreads)[group_of]
    teaches = ~missing & has_signal(statistics)[group_of]

    out = np.where(missing, np.nan, 0.0)
    if scale:
        out[teaches] = distances[teaches] / (deviations + 1e-4 / scales)[group_of[teaches]]
    else:
        with np.errstate(over="ignore"):
            out[teaches] = within_floats(distances[teaches] * scales[group_of[teaches]])
    return out


def deviations(statistics: GroupStatistics) -> np.ndarray:
    """(G,) float64: the sample standard deviation (ddof=1) of each group's rewards.

    NaN for a group with fewer than two rewards, or with an infinite one.
    """
    scales, _, scaled = _scaled(statistics)
    several = np.isfinite(statistics.spreads) & (statistics.counts > 1)
    with np.errstate(over="ignore"):
        return np.where(several, within_floats(scaled * scales), math.nan)


LENGTHS_COMPARED = 16
"""Fewest rollouts whose length and whose group's rewards differ: among fewer, chance alone correlates anything."""


def length_correlation(
    statistics: GroupStatistics, tokens: np.ndarray, messages: np.ndarray, cut: np.ndarray
) -> float | None:
    """How the reward goes with the number of sampled tokens; its square is the share of the rewards' spread inside groups that
    the length explains, in a straight line.

    Only whole replies are compared, and lengths only within one group and among rollouts of as many messages: a tool call more
    is no longer reply, and a reply that was cut has another fault.

    Args:
        statistics: Rewards of N trajectories, by group.
        tokens: (N,) sampled tokens of each.
        messages: (N,) messages of each episode.
        cut: (N,) bool: whether the last reply was cut at the token limit.

    Returns:
        From -1 (shorter is better) to 1 (longer is better); None where fewer than LENGTHS_COMPARED rollouts differ in both.
    """
    group_of = np.repeat(np.arange(len(statistics)), np.diff(statistics.offsets))
    there = np.isfinite(statistics.rewards) & ~cut
    if there.sum() < LENGTHS_COMPARED:
        return None
    group_of, messages = group_of[there], messages[there]
    rewards = statistics.rewards[there] / scale_of(statistics.rewards[there])
    rewards = rewards - _means_of(group_of, rewards)
    kind_of = np.unique(group_of * (messages.max() + 1) + messages, return_inverse=True)[1]
    lengths = tokens[there] - _means_of(kind_of, tokens[there])
    compared = (np.abs(lengths) > 0) & (np.bincount(group_of, weights=np.abs(rewards))[group_of] > NO_SPREAD)
    if compared.sum() < LENGTHS_COMPARED:
        return None
    scale = math.sqrt((lengths**2).sum() * (rewards**2).sum())
    return float(np.clip((lengths * rewards).sum() / scale, -1.0, 1.0))


def _means_of(place_of: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) of each value, the mean of all in the same place."""
    sums, sizes = np.bincount(place_of, weights=values), np.bincount(place_of)
    return (sums / np.maximum(sizes, 1))[place_of]


def deviation_of_all(statistics: GroupStatistics) -> float:
    """The sample standard deviation of all finite rewards; 0 for fewer than two."""
    rewards = statistics.rewards[np.isfinite(statistics.rewards)]
    if len(rewards) < 2:
        return 0.0
    scale = scale_of(rewards)  # squares of huge rewards would overflow
    return float(np.std(rewards / scale, ddof=1) * scale)


def _scaled(statistics: GroupStatistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each group is divided by, and in that unit each reward's distance to its group's mean (0 where it is not a
    finite number) and each group's sample standard deviation."""
    groups = len(statistics)
    group_of = np.repeat(np.arange(groups), np.diff(statistics.offsets))
    scales = group_scales(statistics.rewards, statistics.offsets)
    present = np.isfinite(statistics.rewards) & np.isfinite(statistics.means)[group_of]
    in_group = group_of[present]

    distances = np.zeros(len(statistics.rewards))
    means = statistics.means[in_group] / scales[in_group]
    distances[present] = statistics.rewards[present] / scales[in_group] - means
    squares = np.bincount(group_of, weights=distances**2, minlength=groups)
    return scales, distances, np.sqrt(squares / np.maximum(statistics.counts - 1, 1))


def _entropy_and_scores(trajectories: Iterable[Trajectory]) -> tuple[float | None, dict[str, float]]:
    """The mean entropy of the sampled tokens, and each evaluator's mean score, in one pass."""
    measured = 0
    entropy = 0.0
    found: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for entropies in recorded_entropies(trajectory):
            entropy += sum(entropies)
            measured += len(entropies)
        scores = (trajectory.metadata or {}).get("scores")
        if isinstance(scores, dict):
            for name, score in scores.items():
                values = found.setdefault(name, [])
                if isinstance(score, int | float) and math.isfinite(as_float(score)):
                    values.append(score)
    return entropy / measured if measured else None, {name: mean(found[name]) for name in found}
