"""Means and deviations of rewards that cannot overflow.

The sum of two finite floats may be infinite, and the square of 1e200 is. So values are divided by a power of two before they are
added or squared. Such a division is exact, and ordinary rewards are divided by 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = [
    "group_scales",
    "in_order",
    "mean",
    "scale_of",
    "within_floats",
]

_ORDINARY = 2.0**300
"""Squares of smaller values can be added without an overflow, however many they are."""


def scale_of(values: Sequence[float] | np.ndarray) -> float:
    """A power of two to divide values by before they are added or squared.

    Args:
        values: The values. Those that are not finite do not count.

    Returns:
        1.0 for ordinary values; the largest is below 2 in magnitude after the division otherwise.
    """
    found = np.abs(np.asarray(values, dtype=np.float64))
    return float(_scales(np.max(found, initial=0.0, where=np.isfinite(found))))


def group_scales(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """`scale_of` each group, so that one group's huge rewards take nothing from the digits of another.

    Args:
        values: (N,) float64.
        offsets: (G+1,) group g is `values[offsets[g]:offsets[g + 1]]`.

    Returns:
        (G,) float64.
    """
    largest = np.zeros(len(offsets) - 1)
    filled = np.diff(offsets) > 0  # reduceat has no notion of an empty slice
    if filled.any():
        found = np.where(np.isfinite(values), np.abs(values), 0.0)
        largest[filled] = np.maximum.reduceat(found, offsets[:-1][filled])
    return _scales(largest)


def _scales(largest: np.ndarray) -> np.ndarray:
    _, exponents = np.frexp(largest)
    return np.where(largest > _ORDINARY, np.ldexp(1.0, exponents - 1), 1.0)


def mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of values; NaN of no values, which have none."""
    if not len(values):
        return math.nan
    scale = scale_of(values)
    return float(np.mean(np.asarray(values, dtype=np.float64) / scale) * scale)


def in_order(values: Iterable[float]) -> float:
    """The sum, added from the first value to the last: so it equals that of columns of an array, to the last digit. Python's own
    `sum` keeps what rounding loses, from 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total


def within_floats(values: np.ndarray) -> np.ndarray:
    """Values of which the finite parts are known to be finite: where their difference overflowed, the largest float."""
    largest = np.finfo(np.float64).max
    return np.clip(values, -largest, largest)
