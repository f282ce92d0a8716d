"""What an epoch teaches and what it does not: why groups carry no signal, their history, and what larger groups would do.

A group's advantages are measured against its own mean, so it teaches only if its rewards differ and it is trained on. Works
on any Epoch, complete or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..hooks import shown_by
from ..training.metrics import NO_SPREAD
from ..types import Epoch, GroupReason, finish_reason
from .reasons import REASONS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "Example",
    "GroupSize",
    "LearningSignal",
    "SIGNALS",
    "chance_of_spread",
    "learning_signal",
]

SIZES = (2, 4, 8, 16, 32)
"""Generations that are forecast."""
LEVELS = 512
"""Different rewards that are told apart; of more, each counts as the nearest of so many quantiles."""


def _words(reason: GroupReason) -> tuple[str, str]:
    """A reason that is a signal as it is."""
    return REASONS[reason].meaning, REASONS[reason].advice


SIGNALS: dict[str, tuple[str, str]] = {
    "teaches": _words(GroupReason.KEPT),
    # no spread at all: what to do depends on which reward all rollouts have
    "all_best": (
        "every rollout has the best reward there is",
        "nothing is left to learn from them: take harder examples",
    ),
    "all_worst": (
        "every rollout has the worst reward there is",
        "too hard as they are: easier examples first, a reward that gives credit for a part, or more generations",
    ),
    "all_equal": ("all rewards are the same", "a finer reward would tell the rollouts apart"),
    "little_spread": _words(GroupReason.NO_REWARD_SPREAD),
    "beyond_percentile": _words(GroupReason.BEYOND_PERCENTILE),
    "subsampled": _words(GroupReason.SUBSAMPLED),
    "one_reward": ("only one rollout has a reward, so there is nothing to hold it against", "more generations"),
    "no_reward": _words(GroupReason.NO_REWARD),
    "infinite_reward": _words(GroupReason.INFINITE_REWARD),
    "failed": ("every rollout failed", "see the column `error` of run.trajectories()"),
    "not_submitted": _words(GroupReason.NOT_SUBMITTED),
    "undecided": _words(GroupReason.UNDECIDED),
}
"""Why a group teaches or does not, in words, and what can be done about it."""


@dataclass(frozen=True, eq=False)
class Example:
    """One example of an epoch, and how it did before."""

    id: Any
    signal: str
    """A key of SIGNALS."""
    rollouts: int
    failures: int
    mean: float
    spread: float
    epochs: list[int] = field(default_factory=list)
    """In which it was drawn, up to this one."""
    means: list[float] = field(default_factory=list)
    """Its mean reward in each of them."""
    taught: int = 0
    """In how many of them its rewards differed."""


@dataclass(frozen=True, eq=False)
class GroupSize:
    """What to expect of groups of that many rollouts."""

    generations: int
    share: float
    """Expected share of the examples whose rewards differ; see `chance_of_spread`."""
    at_least: float
    """The same if the examples whose rewards did not differ never do."""
    tokens: float
    """Sampled tokens of an epoch."""
    seconds: float
    """Rollouts and training, both taken to grow with the number of rollouts."""
    tokens_per_teaching_group: float


@dataclass(frozen=True, eq=False)
class LearningSignal:
    """What an epoch teaches. `groups`, `reasons` and `sizes` are DataFrames."""

    epoch: int
    examples: Sequence[Example]
    forecast: Sequence[GroupSize]
    generations: int
    """Rollouts of a group in this epoch; the median, where failures made some smaller."""
    inferred: bool
    """The reasons are concluded from the choice of someone else's Trainer."""
    cut: int
    """Rollouts of the examples with only the worst reward that were cut at the token limit."""

    @property
    def groups(self) -> pd.DataFrame:
        """One row = one example: example, signal (a key of SIGNALS), rollouts, failures, mean, spread, epochs (in how many
        it was drawn so far), epochs_with_spread, previous_mean (NaN the first time)."""
        import pandas as pd

        rows = self.examples
        return pd.DataFrame(
            {
                "example": pd.Series([row.id for row in rows], dtype=object),  # ids as they are, not as text
                "signal": pd.Categorical([row.signal for row in rows], categories=list(SIGNALS)),
                "rollouts": [row.rollouts for row in rows],
                "failures": [row.failures for row in rows],
                "mean": [row.mean for row in rows],
                "spread": [row.spread for row in rows],
                "epochs": [len(row.epochs) for row in rows],
                "epochs_with_spread": [row.taught for row in rows],
                "previous_mean": [row.means[-2] if len(row.means) > 1 else math.nan for row in rows],
            }
        )

    @property
    def reasons(self) -> pd.DataFrame:
        """One row = one reason that occurs, the most frequent first: signal, groups, share, meaning, what_to_do."""
        import pandas as pd

        rows = []
        for signal, examples in self.by_signal().items():
            meaning, advice = SIGNALS[signal]
            rows.append((signal, len(examples), len(examples) / len(self.examples), meaning, advice))
        return pd.DataFrame(rows, columns=["signal", "groups", "share", "meaning", "what_to_do"])

    @property
    def sizes(self) -> pd.DataFrame:
        """One row = one group size: generations, share (expected, of examples whose rewards differ), at_least, tokens and
        seconds of an epoch, tokens_per_teaching_group."""
        import pandas as pd

        names = ["generations", "share", "at_least", "tokens", "seconds", "tokens_per_teaching_group"]
        return pd.DataFrame([[getattr(row, name) for name in names] for row in self.forecast], columns=names)

    def by_signal(self) -> dict[str, list[Example]]:
        """The examples by signal: those that teach first, then the most frequent signal."""
        found: dict[str, list[Example]] = {}
        for example in self.examples:
            found.setdefault(example.signal, []).append(example)
        return dict(sorted(found.items(), key=lambda pair: (pair[0] != "teaches", -len(pair[1]))))

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.learning_signal:signal_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.learning_signal:signal_html", self)


# ── records -> signal ────────────────────────────────────────────────────────────────────────────────────────────────


def learning_signal(epoch: Epoch, earlier: Sequence[Epoch] = ()) -> LearningSignal:
    """What an epoch teaches.

    Args:
        epoch: Its record, complete or not.
        earlier: The epochs before it, for the history of its examples and for what counts as the best and the worst reward.

    Returns:
        Every example with its reason, and a forecast for other group sizes.
    """
    import numpy as np

    statistics, selection = epoch.statistics, epoch.selection
    so_far = [*earlier, epoch]
    best, worst = _best_and_worst(so_far)
    failed: dict[str, list[Any]] = {}
    if epoch.metrics.failures:
        for failure in epoch.collection.failures:
            failed.setdefault(str(failure.example_id), []).append(failure.example_id)
    histories = _histories(so_far, {*map(str, statistics.example_ids), *failed})

    sizes = np.diff(statistics.offsets)
    examples = []
    for place, id in enumerate(statistics.example_ids):
        mean, spread = float(statistics.means[place]), float(statistics.spreads[place])
        signal = _signal(selection.reason_of(place), mean, spread, int(statistics.counts[place]), best, worst)
        lost = len(failed.pop(str(id), ()))
        history = histories[str(id)]
        examples.append(
            Example(id, signal, int(sizes[place]), lost, mean, spread, history.epochs, history.means, history.taught)
        )
    # What is left are examples without a group.
    for ids in failed.values():
        history = histories[str(ids[0])]
        examples.append(
            Example(ids[0], "failed", 0, len(ids), math.nan, math.nan, history.epochs, history.means, history.taught)
        )

    generations = int(np.median(sizes)) if len(sizes) else 0
    return LearningSignal(
        epoch=epoch.index,
        examples=examples,
        forecast=_forecast(epoch, generations),
        generations=generations,
        inferred=selection.inferred,
        cut=_cut(epoch, examples),
    )


def _best_and_worst(epochs: Sequence[Epoch]) -> tuple[float, float]:
    """The highest and the lowest finite reward; NaN where there is none."""
    highest = [epoch.metrics.max_reward for epoch in epochs if math.isfinite(epoch.metrics.max_reward)]
    lowest = [epoch.metrics.min_reward for epoch in epochs if math.isfinite(epoch.metrics.min_reward)]
    return max(highest, default=math.nan), min(lowest, default=math.nan)


def _signal(reason: GroupReason, mean: float, spread: float, rewards: int, best: float, worst: float) -> str:
    """The key of SIGNALS for a group: of one without any spread what its rewards are, else the curriculum's reason."""
    if rewards == 0:
        return "no_reward"
    if math.isnan(spread):
        return "infinite_reward"
    if rewards == 1:
        return "one_reward"
    if spread <= NO_SPREAD:
        if best - worst <= NO_SPREAD:
            return "all_equal"
        if mean >= best - NO_SPREAD:
            return "all_best"
        if mean <= worst + NO_SPREAD:
            return "all_worst"
        return "all_equal"
    if reason == GroupReason.KEPT:
        return "teaches"
    if reason == GroupReason.NO_REWARD_SPREAD:
        return "little_spread"
    return str(reason)


@dataclass
class _History:
    """In which epochs an example was drawn, its mean reward in each, and in how many its rewards differed."""

    epochs: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    taught: int = 0


def _histories(epochs: Sequence[Epoch], wanted: set[str]) -> dict[str, _History]:
    """The history of each example, by its id as text."""
    histories = {name: _History() for name in wanted}
    for epoch in epochs:
        statistics = epoch.statistics
        means, spreads = statistics.means.tolist(), statistics.spreads.tolist()
        for example, mean, spread in zip(statistics.example_ids, means, spreads, strict=True):
            history = histories.get(str(example))
            if history is None:
                continue
            history.epochs.append(epoch.index)
            history.means.append(mean)
            if spread > NO_SPREAD:
                history.taught += 1
    return histories


def _cut(epoch: Epoch, examples: Sequence[Example]) -> int:
    """Rollouts whose last sampled turn was cut at the token limit, among the examples that only have the worst reward."""
    hard = [place for place, example in enumerate(examples) if example.signal == "all_worst"]
    groups = epoch.collection.trajectories if hard else ()
    return sum(finish_reason(trajectory) == "length" for place in hard for trajectory in groups[place])


# ── the forecast ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _forecast(epoch: Epoch, generations: int) -> list[GroupSize]:
    """What the next epoch would be with groups of other sizes. generations: rollouts of a group now."""
    import numpy as np

    statistics, metrics, settings = epoch.statistics, epoch.metrics, epoch.curriculum
    groups = []
    for start, stop in pairwise(statistics.offsets.tolist()):
        rewards = statistics.rewards[start:stop]
        finite = rewards[np.isfinite(rewards)]
        if len(finite):
            groups.append(finite)
    if not groups or not generations:
        return []

    # Rewards differ where they do for the curriculum.
    alike = NO_SPREAD
    if settings.enabled:
        alike = max(NO_SPREAD, settings.min_reward_diff - 2 * NO_SPREAD)
    sizes = sorted({*SIZES, generations})
    chances = chance_of_spread(groups, sizes, alike)

    # At least: an example without a difference in all of its rollouts never gets one.
    differed = np.array([np.ptp(group) > alike for group in groups])
    observed = np.array([len(group) for group in groups])
    certain = np.where((observed[:, None] >= np.array(sizes)) | differed[:, None], chances, 0.0)

    # True shares never fall with the size; estimates of single sizes may, by their noise.
    expected = np.maximum.accumulate(chances.mean(axis=0)).tolist()
    at_least = np.maximum.accumulate(certain.mean(axis=0)).tolist()

    tokens = metrics.sampled_tokens / metrics.trajectories if metrics.sampled_tokens else math.nan
    seconds = epoch.seconds.get("rollouts", math.nan) + epoch.seconds.get("training", math.nan)
    forecast = []
    for size, share, least in zip(sizes, expected, at_least, strict=True):
        cost = tokens * size * len(statistics)
        teaching = share * len(groups)
        forecast.append(
            GroupSize(
                generations=size,
                share=share,
                at_least=min(least, share),
                tokens=cost,
                seconds=seconds * size / generations,
                tokens_per_teaching_group=cost / teaching if teaching > 0 else math.nan,
            )
        )
    return forecast


def chance_of_spread(rewards: Sequence[np.ndarray], sizes: Sequence[int], alike: float = 1e-9) -> np.ndarray:
    """For each example, the probability that among so many new rollouts not all rewards are alike.

    Assumes that the rollouts of an example are independent draws from one distribution: the policy as it is now.

    - Up to the observed number of rollouts nothing else is assumed: the share of all subsets of that size that have a
      spread (the U-statistic; unbiased, Hoeffding 1948).
    - Beyond it, all rollouts are alike if all have the same reward, for some reward. An example's rate of that reward is
      taken to be drawn from a Beta distribution, fitted to all examples by moments (Kleinman 1973), and the probability is
      that of the Beta-binomial, given what was observed of the example. So an example that never succeeded in 8 rollouts
      is not taken to be impossible, unless all examples either always succeed or never do. Where some are really
      impossible it promises too much, by 0.1 where a quarter of them are.

    Rewards that no example has had cannot be foreseen. Averages over examples are what is estimated well; a single
    example's value leans on the others, or is the 0 or 1 that was seen.

    Args:
        rewards: Of each of G examples, its observed finite rewards, at least one.
        sizes: S numbers of rollouts.
        alike: Rewards that differ by no more than this count as equal; of a group, largest minus smallest.

    Returns:
        (G, S) float64.
    """
    import numpy as np

    values = [np.sort(np.asarray(group, dtype=np.float64)) for group in rewards]
    if not values:
        return np.zeros((0, len(sizes)))
    all_alike = _beta_binomial(values, sizes, alike)
    for row, group in enumerate(values):
        for column, size in enumerate(sizes):
            if len(group) >= size:
                all_alike[row, column] = _alike_subsets(group, size, alike)
    return np.clip(1.0 - all_alike, 0.0, 1.0)


def _alike_subsets(values: np.ndarray, size: int, alike: float) -> float:
    """The share of the subsets of that size whose values are all alike. `values` are sorted."""
    import numpy as np

    # Of each value as the smallest of a subset: how many others may join it.
    last = np.searchsorted(values, values + alike, side="right")
    others = (last - np.arange(len(values)) - 1).tolist()
    return sum(math.comb(count, size - 1) for count in others) / math.comb(len(values), size)


def _beta_binomial(values: Sequence[np.ndarray], sizes: Sequence[int], alike: float) -> np.ndarray:
    """(G, S) probability that as many further draws are all alike.

    Of levels v_1 < v_2 < ..., all draws are alike with v_i as the smallest where they lie in [v_i, v_i + alike] and not
    all in (v_i, v_i + alike]. With a Beta distributed rate, n draws lie in a set with the probability of the product over
    j < n of (a + j) / (t + j): a is the set's weight, prior and counts, and t the weight of everything.
    """
    import numpy as np

    pool = np.concatenate(values)
    levels = np.unique(pool)
    if len(levels) > LEVELS:
        levels = np.unique(np.quantile(pool, np.linspace(0, 1, LEVELS), method="nearest"))

    # Each example's rollouts at each level, and how many of them lie in both sets of that level.
    counts = np.zeros((len(values), len(levels)))
    for row, group in enumerate(values):
        np.add.at(counts[row], _nearest(levels, group), 1.0)
    below = np.concatenate([np.zeros((len(values), 1)), np.cumsum(counts, axis=1)], axis=1)
    upper = below[:, np.searchsorted(levels, levels + alike, side="right")]
    closed, half_open = upper - below[:, :-1], upper - below[:, 1:]
    rollouts = counts.sum(axis=1, keepdims=True)
    concentration = _concentration(closed, rollouts)

    def weights(inside: np.ndarray) -> np.ndarray:
        """Prior and counts of the sets."""
        return concentration * inside.sum(axis=0) / rollouts.sum() + inside

    closed, half_open, whole = weights(closed), weights(half_open), concentration + rollouts

    # A factor of both products a draw; each size takes them as they are after so many draws.
    out = np.zeros((len(values), len(sizes)))
    in_closed, in_half_open = np.ones_like(closed), np.ones_like(closed)
    for draws in range(max(sizes)):
        in_closed *= (closed + draws) / (whole + draws)
        in_half_open *= np.where(half_open > 0, half_open + draws, 0.0) / (whole + draws)
        for column, size in enumerate(sizes):
            if size == draws + 1:
                out[:, column] = (in_closed - in_half_open).sum(axis=1)
    return out


def _concentration(inside: np.ndarray, rollouts: np.ndarray) -> np.ndarray:
    """(L,) a + b of the Beta distribution of each set's rate: near 0 = an example is all in or all out, large = all
    examples are the same. `inside` (G, L) counts rollouts in the set, `rollouts` (G, 1) all of an example.

    By moments: with m the mean rate, w the share of an example's pairs that are both inside, and x that share of pairs from
    two examples, w = x + (m - x) / (1 + c).
    """
    import numpy as np

    total, squares = rollouts.sum(), (rollouts**2).sum()
    pairs, across = squares - total, total**2 - squares
    if pairs <= 0 or across <= 0:
        return np.ones(inside.shape[1])  # nothing says how alike examples are
    mean = inside.sum(axis=0) / total
    within = (inside * (inside - 1)).sum(axis=0) / pairs
    between = (inside.sum(axis=0) ** 2 - (inside**2).sum(axis=0)) / across
    apart = within - between
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(apart > 1e-9, (mean - within) / apart, 1e6)
    return np.clip(found, 1e-6, 1e6)


def _nearest(levels: np.ndarray, values: np.ndarray) -> np.ndarray:
    import numpy as np

    right = np.clip(np.searchsorted(levels, values), 0, len(levels) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(np.abs(levels[left] - values) < np.abs(levels[right] - values), left, right)
