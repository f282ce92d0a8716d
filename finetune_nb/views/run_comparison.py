"""Shows a comparison of runs as text, as HTML, and as a plot of their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..analysis.run_comparison import Comparison, Difference
from ..plots.axes import RunSeries
from ..plots.curves import plot_rewards
from ..text import number, plain
from .html import element, table, view

__all__ = [
    "comparison_html",
    "comparison_plot",
    "comparison_text",
]


def comparison_html(comparison: Comparison) -> str:
    """The comparison as HTML: a table with a row for every run but the first."""
    rows = []
    for reward, differences in _sections(comparison):
        for difference in differences:
            interval = f"{number(difference.low)} to {number(difference.high)}"
            counts = (difference.pairs, difference.examples)
            row = (difference.run, number(difference.mean), interval, *counts, _verdict(difference))
            rows.append((reward, *row) if comparison.under else row)
    better, interval = f"better than {_first(comparison)} by", f"{comparison.confidence:.0%} interval"
    headers = ["run", better, interval, "pairs", "examples", ""]
    if comparison.under:
        headers.insert(0, "by the reward of")
    notice = element("div", comparison.notice, class_="ft-dim") if comparison.notice else None
    return view(table(rows, headers), notice)


def comparison_text(comparison: Comparison) -> str:
    """The comparison as text: one line for every run but the first."""
    sentences = []
    for reward, differences in _sections(comparison):
        by = f"by the reward of {reward}, " if comparison.under else ""
        for difference in differences:
            against = f"{by}{difference.run} against {_first(comparison)}"
            if not difference.pairs:
                sentences.append(f"{against}: no example in common")
                continue
            interval = f"{comparison.confidence:.0%} interval {number(difference.low)} to {number(difference.high)}"
            where = f"{difference.pairs} pairs of {difference.examples} examples"
            sentences.append(f"{against}: {difference.mean:+.3g} ({interval}; {where}): {_verdict(difference)}")
    if comparison.notice:
        sentences.append(comparison.notice)
    return "\n".join(sentences)


def _sections(comparison: Comparison) -> list[tuple[str, Sequence[Difference]]]:
    """By whose reward -> the differences; only what was recorded, where the rewards are the same."""
    return list(comparison.under.items()) or [("", comparison.differences)]


def comparison_plot(comparison: Comparison, *, ax: Any = None, **options: Any) -> Any:
    """Plot the reward per epoch, one line per run. options: as in plot_rewards."""
    parents = comparison.parents
    runs = {name: RunSeries(plain(name), epochs, (), parents.get(name)) for name, epochs in comparison.runs.items()}
    return plot_rewards(runs, ax=ax, **options)


def _first(comparison: Comparison) -> str:
    """The name of the run that the others are compared with."""
    return next(iter(comparison.runs))


def _verdict(difference: Difference) -> str:
    if not difference.pairs:
        return "they have no example in common"
    if not difference.is_clear:
        return "no clear difference"
    return "better" if difference.mean > 0 else "worse"
