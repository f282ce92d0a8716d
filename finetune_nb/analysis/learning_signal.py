"""What an epoch teaches and what it does not: why groups carry no signal, their history, and what larger groups would do.

A group's advantages are measured against its own mean, so it teaches only if its rewards differ and it is trained on. The
forecast for other group sizes is spread_forecast.py's. Pure functions of Epochs, complete or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..frames.columns import objects
from ..text import count, duration, number, one_line, short
from ..training.metrics import NO_SPREAD
from ..types import Epoch, GroupReason
from ..views.html import Html, bar, details, element, line, some, sparkline, table, title, view
from .reasons import REASONS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "LearningSignal",
    "SIGNALS",
    "chance_of_spread",
    "learning_signal",
]

LEVELS = 512
"""Different rewards that are told apart; of more, each counts as the nearest of so many quantiles."""


def chance_of_spread(rewards: Sequence[np.ndarray], sizes: Sequence[int], alike: float = 1e-9) -> np.ndarray:
    """(G, S) float64: for each example, the probability that among `sizes[s]` new rollouts not all rewards are alike.

    rewards: of each of G examples, its observed finite rewards, at least one. alike: rewards that differ by no more than
    this count as equal; of a group, largest minus smallest.

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
    """
    import numpy as np

    values = [np.sort(np.asarray(group, dtype=np.float64)) for group in rewards]
    chances = np.zeros((len(values), len(sizes)))
    if not values:
        return chances
    beyond = _beta_binomial(values, sizes, alike)
    for row, group in enumerate(values):
        for column, size in enumerate(sizes):
            known = len(group) >= size
            chances[row, column] = 1.0 - _alike_subsets(group, size, alike) if known else 1.0 - beyond[row, column]
    return np.clip(chances, 0.0, 1.0)


def _alike_subsets(values: np.ndarray, size: int, alike: float) -> float:
    """The share of the subsets of that size whose values are all alike. `values` are sorted."""
    import numpy as np

    last = np.searchsorted(values, values + alike, side="right")
    behind = (last - np.arange(len(values)) - 1).tolist()  # of each value as the smallest: those that may join it
    return sum(math.comb(count, size - 1) for count in behind) / math.comb(len(values), size)


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
    counts = np.zeros((len(values), len(levels)))
    for row, group in enumerate(values):
        np.add.at(counts[row], _nearest(levels, group), 1.0)
    below = np.concatenate([np.zeros((len(values), 1)), np.cumsum(counts, axis=1)], axis=1)
    upper = below[:, np.searchsorted(levels, levels + alike, side="right")]
    closed, half_open = upper - below[:, :-1], upper - below[:, 1:]
    rollouts = counts.sum(axis=1, keepdims=True)
    concentration = _concentration(closed, rollouts)

    def weights(inside: np.ndarray) -> np.ndarray:
        return concentration * inside.sum(axis=0) / rollouts.sum() + inside

    closed, half_open, whole = weights(closed), weights(half_open), concentration + rollouts
    out = np.zeros((len(values), len(sizes)))
    in_closed, in_half_open = np.ones_like(closed), np.ones_like(closed)
    for draws in range(max(sizes)):
        in_closed *= (closed + draws) / (whole + draws)
        in_half_open *= np.where(half_open > 0, half_open + draws, 0.0) / (whole + draws)
        for column in (column for column, size in enumerate(sizes) if size == draws + 1):
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


SIZES = (2, 4, 8, 16, 32)
"""Generations that are forecast."""
ROWS = 12
"""Examples with their history, for each reason."""


def _words(reason: GroupReason) -> tuple[str, str]:
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
    """Expected share of the examples whose rewards differ; see spread_forecast.chance_of_spread."""
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
                "example": objects([row.id for row in rows]),
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

        found = self._by_signal()
        total = max(1, len(self.examples))
        rows = [(name, len(those), len(those) / total, *SIGNALS[name]) for name, those in found.items()]
        return pd.DataFrame(rows, columns=["signal", "groups", "share", "meaning", "what_to_do"])

    @property
    def sizes(self) -> pd.DataFrame:
        """One row = one group size: generations, share (expected, of examples whose rewards differ), at_least, tokens and
        seconds of an epoch, tokens_per_teaching_group."""
        import pandas as pd

        names = ["generations", "share", "at_least", "tokens", "seconds", "tokens_per_teaching_group"]
        return pd.DataFrame([[getattr(row, name) for name in names] for row in self.forecast], columns=names)

    def _by_signal(self) -> dict[str, list[Example]]:
        found: dict[str, list[Example]] = {}
        for example in self.examples:
            found.setdefault(example.signal, []).append(example)
        return dict(sorted(found.items(), key=lambda pair: (pair[0] != "teaches", -len(pair[1]))))

    def _headline(self) -> str:
        teaching = sum(example.signal == "teaches" for example in self.examples)
        groups = f"{teaching:,} of {count(len(self.examples), 'group')} teach" + "es" * (len(self.examples) == 1)
        return groups + (" (concluded from what the Trainer submitted)" if self.inferred else "")

    def _what_to_do(self, signal: str) -> str:
        advice = SIGNALS[signal][1]
        if signal == "all_worst" and self.cut:
            return f"{count(self.cut, 'rollout')} of them were cut at the token limit: raise max_tokens. Else {advice}"
        return advice

    def __repr__(self) -> str:
        lines = [f"epoch {self.epoch}: {self._headline()}"]
        for signal, those in self._by_signal().items():
            advice = self._what_to_do(signal)
            ids = ", ".join(one_line(example.id, 40) for example in those[:3]) + (", …" if len(those) > 3 else "")
            lines.append(f"{len(those):>5,}  {SIGNALS[signal][0]} ({ids})" + (f": {advice}" if advice else ""))
        for row in self.forecast:
            now = "  (now)" if row.generations == self.generations else ""
            lines.append(
                f"{row.generations:>5,} generations: {row.share:.0%} of the groups with spread, {number(row.tokens)} tokens, "
                f"{duration(row.seconds)}{now}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        found = self._by_signal()
        rows = []
        for signal, those in found.items():
            share = element("span", bar(len(those), len(self.examples), f"{len(those):,}"), style="white-space:nowrap")
            meaning = [SIGNALS[signal][0], some([example.id for example in those])]
            rows.append([share, element("strong", signal), line(*meaning), self._what_to_do(signal)])
        body = [
            title(f"epoch {self.epoch}", self._headline()),
            table(rows, ["groups", "signal", "why", "what to do"]),
            *self._sizes_html(),
            *(_history(signal, those) for signal, those in found.items()),
        ]
        return view(*body)

    def _sizes_html(self) -> list[Html]:
        if not self.forecast:
            return []
        rows = [
            [
                f"{row.generations:,}" + (" (now)" if row.generations == self.generations else ""),
                bar(row.share, 1.0, f"{row.share:.0%}"),
                f"{row.at_least:.0%}",
                number(row.tokens),
                duration(row.seconds),
                number(row.tokens_per_teaching_group),
            ]
            for row in self.forecast
        ]
        headers = ["generations", "groups with spread", "at least", "tokens", "time", "tokens per group with spread"]
        note = (
            "Expected of the next epoch, with the policy and the examples as they are. “At least”: if the examples without "
            "any difference never get one. Time is taken to grow with the number of rollouts."
        )
        return [table(rows, headers, "larger or smaller groups"), element("div", note, class_="ft-dim")]


def _history(signal: str, those: Sequence[Example]) -> Html:
    """A fold with the examples of one reason, and how they did in earlier epochs."""
    rows = []
    for example in those[:ROWS]:
        course = " → ".join(map(number, example.means[-6:]))
        seen = f"{example.taught} of {count(len(example.epochs), 'epoch')}"
        drawn = sparkline(example.means[-40:], course, 120, 24) if len(example.means) > 1 else Html()
        rows.append([short(example.id, 60), f"{example.rollouts:,}", course, drawn, number(example.spread), seen])
    headers = ["example", "rollouts", "mean reward so far", "", "spread", "rewards differed in"]
    rest = f"the first {ROWS} of {len(those):,}" if len(those) > ROWS else None
    return details(f"{signal}: {count(len(those), 'example')}", table(rows, headers, rest))


# ── records -> signal ────────────────────────────────────────────────────────────────────────────────────────────────


def learning_signal(epoch: Epoch, earlier: Sequence[Epoch] = ()) -> LearningSignal:
    """What that epoch teaches. earlier: the epochs before it, for the history of its examples and for what counts as the
    best and the worst reward."""
    import numpy as np

    statistics, selection = epoch.statistics, epoch.selection
    known = [one.metrics for one in [*earlier, epoch]]
    best = max((m.max_reward for m in known if math.isfinite(m.max_reward)), default=math.nan)
    worst = min((m.min_reward for m in known if math.isfinite(m.min_reward)), default=math.nan)
    failed: dict[str, list[Any]] = {}
    for failure in epoch.collection.failures if epoch.metrics.failures else ():
        failed.setdefault(str(failure.example_id), []).append(failure.example_id)
    history = _courses([*earlier, epoch], {*map(str, statistics.example_ids), *failed})
    examples = []
    for place, example in enumerate(statistics.example_ids):
        mean, spread, rewards = (
            float(column[place]) for column in (statistics.means, statistics.spreads, statistics.counts)
        )
        signal = _signal(selection.reason_of(place), mean, spread, int(rewards), best, worst)
        rollouts = int(statistics.offsets[place + 1] - statistics.offsets[place])
        lost = len(failed.pop(str(example), ()))
        examples.append(Example(example, signal, rollouts, lost, mean, spread, *history[str(example)]))
    for ids in failed.values():
        examples.append(Example(ids[0], "failed", 0, len(ids), math.nan, math.nan, *history[str(ids[0])]))

    sizes = np.diff(statistics.offsets)
    generations = int(np.median(sizes)) if len(sizes) else 0
    return LearningSignal(
        epoch.index, examples, _forecast(epoch, generations), generations, selection.inferred, _cut(epoch, examples)
    )


def _signal(reason: GroupReason, mean: float, spread: float, rewards: int, best: float, worst: float) -> str:
    if rewards == 0:
        return "no_reward"
    if math.isnan(spread):
        return "infinite_reward"
    if rewards == 1:
        return "one_reward"
    if spread <= NO_SPREAD:
        if best - worst <= NO_SPREAD:
            return "all_equal"
        return "all_best" if mean >= best - NO_SPREAD else "all_worst" if mean <= worst + NO_SPREAD else "all_equal"
    names = {GroupReason.KEPT: "teaches", GroupReason.NO_REWARD_SPREAD: "little_spread"}
    return names.get(reason, str(reason))


def _courses(epochs: Sequence[Epoch], wanted: set[str]) -> dict[str, tuple[list[int], list[float], int]]:
    """By example: in which epochs it was drawn, its mean reward there, and in how many its rewards differed."""
    courses: dict[str, tuple[list[int], list[float], int]] = {name: ([], [], 0) for name in wanted}
    for epoch in epochs:
        statistics = epoch.statistics
        means, spreads = statistics.means.tolist(), statistics.spreads.tolist()
        for example, mean, spread in zip(map(str, statistics.example_ids), means, spreads, strict=True):
            if example in courses:
                drawn, so_far, taught = courses[example]
                drawn.append(epoch.index)
                so_far.append(mean)
                courses[example] = drawn, so_far, taught + (spread > NO_SPREAD)
    return courses


def _forecast(epoch: Epoch, generations: int) -> list[GroupSize]:
    import numpy as np

    statistics, metrics, settings = epoch.statistics, epoch.metrics, epoch.curriculum
    bounds = statistics.offsets.tolist()
    groups = [statistics.rewards[start:stop] for start, stop in pairwise(bounds)]
    groups = [group[np.isfinite(group)] for group in groups]
    groups = [group for group in groups if len(group)]
    if not groups or not generations:
        return []
    alike = max(NO_SPREAD, settings.min_reward_diff - 2 * NO_SPREAD) if settings.enabled else NO_SPREAD
    sizes = sorted({*SIZES, generations})
    chances = chance_of_spread(groups, sizes, alike)
    differed = np.array([np.ptp(group) > alike for group in groups])
    known = np.array([[len(group) >= size for size in sizes] for group in groups])
    # true shares never fall with the size; estimates of single sizes may, by their noise
    expected = np.maximum.accumulate(chances.mean(axis=0)).tolist()
    at_least = np.maximum.accumulate(np.where(known | differed[:, None], chances, 0.0).mean(axis=0)).tolist()
    tokens = metrics.sampled_tokens / metrics.trajectories if metrics.sampled_tokens else math.nan
    seconds = sum(epoch.seconds.get(part, math.nan) for part in ("rollouts", "training"))
    found = []
    for size, share, least in zip(sizes, expected, at_least, strict=True):
        cost = tokens * size * len(statistics)
        teaching = share * len(groups)
        each = cost / teaching if teaching > 0 else math.nan
        found.append(GroupSize(size, share, min(least, share), cost, seconds * size / generations, each))
    return found


def _cut(epoch: Epoch, examples: Sequence[Example]) -> int:
    """Rollouts whose last sampled turn was cut at the token limit, among the examples that only have the worst reward."""
    hard = [place for place, example in enumerate(examples) if example.signal == "all_worst"]
    groups = epoch.collection.trajectories if hard else ()
    return sum(_ended(trajectory) == "length" for place in hard for trajectory in groups[place])


def _ended(trajectory: Any) -> Any:
    said = [(getattr(item, "metadata", None) or {}).get("finish_reason") for item in trajectory.episode]
    return next((reason for reason in reversed(said) if reason), None)
