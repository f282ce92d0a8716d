"""Shows a comparison of runs as text, as HTML, and as a plot of their rewards."""

from __future__ import annotations

from typing import Any

from ..analysis.run_comparison import Comparison, Difference
from ..plots.curves import plot_rewards
from ..text import number
from .html import table, view

__all__ = [
    "comparison_html",
    "comparison_plot",
    "comparison_text",
]


def comparison_html(comparison: Comparison) -> str:
    """The comparison as HTML: a table with a row for every run but the first."""
    rows = []
    for difference in comparison.differences:
        interval = f"{number(difference.low)} to {number(difference.high)}"
        counts = (difference.pairs, difference.examples)
        rows.append((difference.run, number(difference.mean), interval, *counts, _verdict(difference)))
    better, interval = f"better than {_first(comparison)} by", f"{comparison.confidence:.0%} interval"
    return view(table(rows, ("run", better, interval, "pairs", "examples", "")))


def comparison_text(comparison: Comparison) -> str:
    """The comparison as text: one line for every run but the first."""
    sentences = []
    for difference in comparison.differences:
        against = f"{difference.run} against {_first(comparison)}"
        if not difference.pairs:
            sentences.append(f"{against}: no example in common")
            continue
        interval = f"{comparison.confidence:.0%} interval {number(difference.low)} to {number(difference.high)}"
        where = f"{difference.pairs} pairs of {difference.examples} examples"
        sentences.append(f"{against}: {difference.mean:+.3g} ({interval}; {where}): {_verdict(difference)}")
    return "\n".join(sentences)


def comparison_plot(comparison: Comparison, *, ax: Any = None, **options: Any) -> Any:
    """Plot the reward per epoch, one line per run. options: as in plot_rewards."""
    return plot_rewards(comparison.runs, ax=ax, **options)


def _first(comparison: Comparison) -> str:
    """The name of the run that the others are compared with."""
    return next(iter(comparison.runs))


def _verdict(difference: Difference) -> str:
    if not difference.pairs:
        return "they have no example in common"
    if not difference.is_clear:
        return "no clear difference"
    return "better" if difference.mean > 0 else "worse"
