"""Says what an epoch teaches: which groups carry a learning signal, why the others do not, and what larger groups would do.

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
    "best_and_worst",
    "chance_of_spread",
    "group_signals",
    "learning_signal",
]

SIZES = (2, 4, 8, 16, 32)
"""Group sizes to forecast."""
LEVELS = 512
"""Most distinct rewards to tell apart; if there are more, each counts as the nearest of this many quantiles."""


def _words(reason: GroupReason) -> tuple[str, str]:
    """Meaning and advice of a reason that is a signal as it is."""
    return REASONS[reason].meaning, REASONS[reason].advice


SIGNALS: dict[str, tuple[str, str]] = {
    "teaches": _words(GroupReason.KEPT),
    # No spread at all: the advice depends on which reward all rollouts got.
    "all_best": (
        "every rollout has the best reward there is",
        "nothing is left to learn from them: take harder examples",
    ),
    "all_worst": (
        "every rollout has the worst reward there is",
        "too hard as they are: start with easier examples, give partial credit, or use more generations",
    ),
    "all_equal": ("all rewards are the same", "a finer-grained reward would tell the rollouts apart"),
    "little_spread": _words(GroupReason.NO_REWARD_SPREAD),
    "beyond_percentile": _words(GroupReason.BEYOND_PERCENTILE),
    "subsampled": _words(GroupReason.SUBSAMPLED),
    "one_reward": ("only one rollout has a reward, so there is nothing to compare it with", "use more generations"),
    "no_reward": _words(GroupReason.NO_REWARD),
    "infinite_reward": _words(GroupReason.INFINITE_REWARD),
    "failed": ("every rollout failed", "see the column `error` of run.trajectories()"),
    "not_submitted": _words(GroupReason.NOT_SUBMITTED),
    "undecided": _words(GroupReason.UNDECIDED),
}
"""For each signal: why such groups teach or do not, and what can be done about it."""


@dataclass(frozen=True, eq=False)
class Example:
    """One example of an epoch, with its history."""

    id: Any
    signal: str
    """A key of SIGNALS."""
    rollouts: int
    failures: int
    mean: float
    spread: float
    epochs: list[int] = field(default_factory=list)
    """The epochs in which it was drawn, up to this one."""
    means: list[float] = field(default_factory=list)
    """Its mean reward in each of them."""
    taught: int = 0
    """Number of those epochs in which its rewards differed."""


@dataclass(frozen=True, eq=False)
class GroupSize:
    """What to expect from groups of a given size."""

    generations: int
    share: float
    """Expected share of the examples whose rewards differ; see `chance_of_spread`."""
    at_least: float
    """The same, assuming that examples whose rewards did not differ never will."""
    tokens: float
    """Sampled tokens in an epoch."""
    seconds: float
    """Time for rollouts and training, assumed to be proportional to the number of rollouts."""
    tokens_per_teaching_group: float


@dataclass(frozen=True, eq=False)
class LearningSignal:
    """What an epoch teaches; displays itself in a cell. `groups`, `reasons` and `sizes` are DataFrames."""

    epoch: int
    examples: Sequence[Example]
    forecast: Sequence[GroupSize]
    generations: int
    """Rollouts per group in this epoch; the median, if failures made some groups smaller."""
    inferred: bool
    """Whether the reasons were inferred from what another Trainer chose."""
    cut: int
    """Rollouts cut at the token limit, among the examples that only got the worst reward."""

    @property
    def groups(self) -> pd.DataFrame:
        """One row = one example: example, signal (a key of SIGNALS), rollouts, failures, mean, spread, epochs (the number
        in which it was drawn so far), epochs_with_spread, previous_mean (NaN the first time)."""
        import pandas as pd

        rows = self.examples
        return pd.DataFrame(
            {
                "example": pd.Series([row.id for row in rows], dtype=object),  # keep ids as they are, not as text
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
        """One row = one signal that occurs, "teaches" first, then by frequency: signal, groups, share, meaning, what_to_do."""
        import pandas as pd

        rows = []
        for signal, examples in self.by_signal().items():
            meaning, advice = SIGNALS[signal]
            rows.append((signal, len(examples), len(examples) / len(self.examples), meaning, advice))
        return pd.DataFrame(rows, columns=["signal", "groups", "share", "meaning", "what_to_do"])

    @property
    def sizes(self) -> pd.DataFrame:
        """One row = one group size: generations, share (expected share of examples whose rewards differ), at_least, tokens
        and seconds per epoch, tokens_per_teaching_group."""
        import pandas as pd

        names = ["generations", "share", "at_least", "tokens", "seconds", "tokens_per_teaching_group"]
        return pd.DataFrame([[getattr(row, name) for name in names] for row in self.forecast], columns=names)

    def by_signal(self) -> dict[str, list[Example]]:
        """Group the examples by signal: "teaches" first, then the others by frequency."""
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
    """Work out what an epoch teaches.

    Args:
        epoch: Its record, complete or not.
        earlier: The epochs before it, which give the examples' history and the best and worst rewards so far.

    Returns:
        Every example with its signal, and a forecast for other group sizes.
    """
    import numpy as np

    statistics, selection = epoch.statistics, epoch.selection
    so_far = [*earlier, epoch]
    best, worst = best_and_worst(so_far)
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
    # The examples still in `failed` have no group: all of their rollouts failed.
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


def best_and_worst(epochs: Sequence[Epoch]) -> tuple[float, float]:
    """The highest and the lowest finite reward; NaN if there is none."""
    highest = [epoch.metrics.max_reward for epoch in epochs if math.isfinite(epoch.metrics.max_reward)]
    lowest = [epoch.metrics.min_reward for epoch in epochs if math.isfinite(epoch.metrics.min_reward)]
    return max(highest, default=math.nan), min(lowest, default=math.nan)


def group_signals(epochs: Sequence[Epoch], worst: float, best: float) -> list[str]:
    """The signal of every group of some epochs.

    Args:
        epochs: Their records.
        worst: The lowest reward there is.
        best: The highest.

    Returns:
        A key of SIGNALS for each group, one epoch's after another's.
    """
    found = []
    for epoch in epochs:
        statistics = epoch.statistics
        columns = (statistics.means.tolist(), statistics.spreads.tolist(), statistics.counts.tolist())
        for place, (mean, spread, rewards) in enumerate(zip(*columns, strict=True)):
            found.append(_signal(epoch.selection.reason_of(place), mean, spread, rewards, best, worst))
    return found


def _signal(reason: GroupReason, mean: float, spread: float, rewards: int, best: float, worst: float) -> str:
    """The key of SIGNALS for a group. Without any spread it depends on the rewards, else on the curriculum's reason."""
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
    """The epochs in which an example was drawn, its mean reward in each, and the number in which its rewards differed."""

    epochs: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    taught: int = 0


def _histories(epochs: Sequence[Epoch], wanted: set[str]) -> dict[str, _History]:
    """The history of each wanted example, keyed by its id as text."""
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
    """Rollouts whose last sampled turn was cut at the token limit, among the examples that only got the worst reward."""
    hard = [place for place, example in enumerate(examples) if example.signal == "all_worst"]
    groups = epoch.collection.trajectories if hard else ()
    return sum(finish_reason(trajectory) == "length" for place in hard for trajectory in groups[place])


# ── the forecast ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _forecast(epoch: Epoch, generations: int) -> list[GroupSize]:
    """Forecast the next epoch for other group sizes. generations: current rollouts per group."""
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

    # Use the threshold of the curriculum for "rewards differ".
    alike = NO_SPREAD
    if settings.enabled:
        alike = max(NO_SPREAD, settings.min_reward_diff - 2 * NO_SPREAD)
    sizes = sorted({*SIZES, generations})
    chances = chance_of_spread(groups, sizes, alike)

    # "At least": assume that an example whose rewards did not differ never will.
    differed = np.array([np.ptp(group) > alike for group in groups])
    observed = np.array([len(group) for group in groups])
    certain = np.where((observed[:, None] >= np.array(sizes)) | differed[:, None], chances, 0.0)

    # True shares never fall as the size grows; noisy estimates of single sizes may.
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
    """Estimate, for each example, the probability that the rewards of a group of new rollouts are not all alike.

    Assumes that the rollouts of an example are independent draws from one distribution: the current policy.

    - Up to the observed number of rollouts nothing else is assumed: the estimate is the share of all subsets of that size
      that have a spread (the U-statistic; unbiased, Hoeffding 1948).
    - For larger groups, all rollouts are alike if all get the same reward, whichever that is. An example's rate of that
      reward is assumed to be drawn from a Beta distribution, fitted to all examples by moments (Kleinman 1973), and the
      probability is that of the Beta-binomial, given the example's observed rewards. So an example that never succeeded
      in 8 rollouts does not count as impossible, unless all examples either always succeed or never do. If some really
      are impossible, the estimate is too high: by 0.1 if a quarter of them are.

    Rewards that no example has had yet cannot be predicted. Averages over examples are estimated well; the value of a
    single example depends on the others, or is the 0 or 1 that was observed.

    Args:
        rewards: The observed finite rewards of each of G examples, at least one per example.
        sizes: S group sizes.
        alike: Rewards of a group count as equal if largest minus smallest is at most this.

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
    """The share of the subsets of that size whose values are all alike. values: sorted."""
    import numpy as np

    # For each value as the smallest of a subset: the number of others that may join it.
    last = np.searchsorted(values, values + alike, side="right")
    others = (last - np.arange(len(values)) - 1).tolist()
    return sum(math.comb(count, size - 1) for count in others) / math.comb(len(values), size)


def _beta_binomial(values: Sequence[np.ndarray], sizes: Sequence[int], alike: float) -> np.ndarray:
    """(G, S) probability that this many further draws are all alike.

    Given levels v_1 < v_2 < ..., all draws are alike with v_i as the smallest if all lie in [v_i, v_i + alike] and not
    all in (v_i, v_i + alike]. With a Beta-distributed rate, the probability that n draws lie in a set is the product over
    j < n of (a + j) / (t + j), where a is the set's weight (prior plus counts) and t the total weight.
    """
    import numpy as np

    pool = np.concatenate(values)
    levels = np.unique(pool)
    if len(levels) > LEVELS:
        levels = np.unique(np.quantile(pool, np.linspace(0, 1, LEVELS), method="nearest"))

    # Each example's rollouts at each level, and how many of them lie in either set of that level.
    counts = np.zeros((len(values), len(levels)))
    for row, group in enumerate(values):
        np.add.at(counts[row], _nearest(levels, group), 1.0)
    below = np.concatenate([np.zeros((len(values), 1)), np.cumsum(counts, axis=1)], axis=1)
    upper = below[:, np.searchsorted(levels, levels + alike, side="right")]
    closed, half_open = upper - below[:, :-1], upper - below[:, 1:]
    rollouts = counts.sum(axis=1, keepdims=True)
    concentration = _concentration(closed, rollouts)

    def weights(inside: np.ndarray) -> np.ndarray:
        """Prior plus counts of the sets."""
        return concentration * inside.sum(axis=0) / rollouts.sum() + inside

    closed, half_open, whole = weights(closed), weights(half_open), concentration + rollouts

    # Each draw adds a factor to both products; a group size takes the products after that many draws.
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
    """(L,) a + b of the Beta distribution of each set's rate: near 0 = each example is all in or all out, large = all
    examples are alike. inside: (G, L) rollouts in the set; rollouts: (G, 1) all rollouts of an example.

    By moments: with m the mean rate, w the share of pairs within an example that are both inside, and x that share for
    pairs from two examples, w = x + (m - x) / (1 + c).
    """
    import numpy as np

    total, squares = rollouts.sum(), (rollouts**2).sum()
    pairs, across = squares - total, total**2 - squares
    if pairs <= 0 or across <= 0:
        return np.ones(inside.shape[1])  # no data on how alike the examples are
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
