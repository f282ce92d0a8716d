"""Compares runs on the same examples: did a change help, or did the runs just draw different questions?

Groups are paired by (epoch, example): runs with the same seed draw the same examples in an epoch, and so do a run and its
fork. The difference of two runs is the mean over pairs, with a bootstrap interval over examples (Efron and Tibshirani 1993,
chapter 13: the percentile method). Examples are resampled, as the pairs of one example are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..hooks import shown_by
from ..rewards.numbers import mean, scale_of, within_floats
from ..types import Epoch

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


__all__ = [
    "Comparison",
    "Difference",
    "compare_runs",
]


@dataclass(frozen=True)
class Difference:
    """How much better a run did than the first one, on the examples that they share."""

    run: str
    mean: float
    """Mean difference of the groups' mean rewards; NaN if there are no pairs."""
    low: float
    high: float
    """Bootstrap interval at `Comparison.confidence`."""
    pairs: int
    examples: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison of runs on the same examples; displays itself in a cell.

    `frame` has the pairs, `differences` one entry for every run but the first.
    """

    runs: Mapping[str, Sequence[Epoch]]
    differences: tuple[Difference, ...]
    """By the rewards that each run recorded."""
    confidence: float
    under: Mapping[str, tuple[Difference, ...]] = field(default_factory=dict)
    """Where the rewards differ: run -> the differences of all runs under its reward."""
    notice: str | None = None
    """Why there is nothing in `under`, where the rewards differ or may differ."""

    parents: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Of the runs that are forks: the name of the parent, and its epoch after which the fork began."""

    def with_rewards(self, under: Mapping[str, tuple[Difference, ...]], notice: str | None) -> Comparison:
        """The same comparison, with what is known of the runs' rewards.

        Args:
            under: As in `under`.
            notice: As in `notice`.
        """
        return replace(self, under=under, notice=notice)

    @property
    def frame(self) -> pd.DataFrame:
        """One row = one (epoch, example) that all runs have: columns epoch, example, then each run's mean reward."""
        return _pairs(self.runs).dropna().reset_index()

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Plot the reward per epoch of all runs, on all of their examples.

        Args:
            ax: Where to draw. Default: a new figure.
            **options: As in `plot_rewards`.

        Returns:
            The new figure, or `ax`.
        """
        return shown_by("finetune_nb.views.run_comparison:comparison_plot", self, ax=ax, **options)

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.run_comparison:comparison_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.run_comparison:comparison_html", self)


def compare_runs(
    runs: Mapping[str, Sequence[Epoch]], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compare records, given by the name of their run.

    Args:
        runs: At least two. The others are compared with the first one.
        confidence: Confidence level of the intervals, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        A comparison that displays itself in a cell.

    Raises:
        ConfigError: There are fewer than two runs, or `confidence` is out of range.
    """
    if len(runs) < 2:
        raise ConfigError(f"a comparison needs at least two runs with different names; found {len(runs)}.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected a share between 0 and 1, such as 0.95.")

    import numpy as np

    pairs = _pairs(runs)
    first, *others = runs
    differences = []
    for name in others:
        both = pairs[[first, name]].dropna()
        rewards_of_first, rewards = both.to_numpy().T
        with np.errstate(over="ignore"):
            gain = within_floats(rewards - rewards_of_first)
        examples = both.index.get_level_values("example").astype(str).to_numpy()
        low, high = _bootstrap(gain, examples, confidence, resamples, seed)
        differences.append(Difference(name, mean(gain), low, high, len(gain), len(set(examples.tolist()))))
    return Comparison(runs, tuple(differences), confidence)


def _pairs(runs: Mapping[str, Sequence[Epoch]]) -> pd.DataFrame:
    """Mean reward of each group: one column per run, indexed by (epoch, example); NaN where a run has none."""
    import numpy as np
    import pandas as pd

    columns = {}
    for name, epochs in runs.items():
        keys = [(epoch.index, example) for epoch in epochs for example in epoch.statistics.example_ids]
        means = np.concatenate([np.empty(0), *(epoch.statistics.means for epoch in epochs)])
        index = pd.MultiIndex.from_tuples(keys, names=["epoch", "example"]) if keys else _no_pairs()
        means = pd.Series(np.where(np.isfinite(means), means, np.nan), index=index, dtype=np.float64)
        columns[name] = means[~index.duplicated()]
    return pd.concat(columns, axis=1).rename_axis(["epoch", "example"])


def _no_pairs() -> pd.MultiIndex:
    import pandas as pd

    return pd.MultiIndex.from_arrays([[], []], names=["epoch", "example"])


def _bootstrap(
    gain: np.ndarray, examples: np.ndarray, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of the mean gain; whole examples are drawn with replacement. NaN if there are none."""
    import numpy as np

    # scipy.stats.bootstrap gives the same interval to within the last two digits. But scipy is 140 MB more to install and
    # takes 0.9 s to import; this takes a third to two thirds of its time, and accepts a single example.
    if not len(gain):
        return math.nan, math.nan
    _, position = np.unique(examples, return_inverse=True)
    scale = scale_of(gain)
    sums, counts = np.bincount(position, weights=gain / scale), np.bincount(position)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low * scale), float(high * scale)
