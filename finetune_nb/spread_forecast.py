"""How many groups would have different rewards if they had 2, 4, 8, ... rollouts: an estimate from the observed rewards.

A group teaches only if its rewards differ. With g generations an example of success rate p has a group without any
difference with probability p^g + (1-p)^g, so rare successes need large groups. Pure functions of numbers; what an answer
costs, and what to do with it, is said in learning_signal.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["chance_of_spread"]

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
