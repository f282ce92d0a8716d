"""Plots of groups: which of each epoch's groups were kept and why, and a map of mean against spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..analysis.reasons import REASONS
from ..types import GROUP_REASONS, Epoch
from .axes import (
    HATCHES,
    LINES,
    MARKERS,
    RunSeries,
    ThemeName,
    at_their_places,
    axis_label,
    changes_text,
    draw_line,
    finish,
    mark_changes,
    metrics_of,
    named,
    panels,
    series_of,
    share_axis,
    span,
    start,
    step_line,
    trend_text,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from .figure import Figure, Theme

__all__ = [
    "plot_curriculum",
    "plot_groups",
]


def plot_curriculum(epochs: Any, ax: Axes | None = None, theme: ThemeName = None) -> Figure | Axes:
    """Plot what the curriculum chose: the groups of each epoch that were kept or left out, by reason.

    Lines show how many groups can teach (their rewards differ), and the curriculum's percentile on an axis from 0 to 1.
    Live changes are marked.

    Args:
        epochs: A run; epochs; or several runs, as a list or by name: then the percentile of each run, and the share of its
            groups that was kept.
        ax: Where to draw. Default: a new figure.
        theme: "light" or "dark". Default: "light", which reads on dark pages too.

    Returns:
        The new figure, or `ax`.

    Raises:
        ConfigError: The theme is unknown.
    """
    runs = series_of(epochs)
    several = len(runs) > 1
    ax, figure, look = start(ax, theme, "epoch", "share" if several else "groups")
    said = []
    for place, run in enumerate(runs):
        if several:
            shown = _share_kept(ax, run, look, place)
            said.append(f"{run.name}: share of groups kept {trend_text(shown)}")
            continue
        _reasons_and_percentile(ax, run.epochs, look)
        teach = trend_text(metrics_of(run.epochs, "groups_with_spread"))
        said.append(f"groups whose rewards differ: {teach}")
        on = [epoch.curriculum.percentile for epoch in run.epochs if epoch.curriculum.enabled]
        said.append(f"curriculum percentile: {trend_text(on)}" if on else "the curriculum is off")
    if several:
        ax.set_ylim(-0.05, 1.05)
    mark_changes(ax, runs, look, filled=not several)
    finish(ax, look, empty=not any(run.epochs for run in runs))
    named(figure, runs, "groups")
    if figure is None:
        return ax
    figure.alt_text = f"Groups per epoch; {'; '.join(said)}{changes_text(runs)}"
    return figure


def _share_kept(ax: Axes, run: RunSeries, look: Theme, place: int) -> np.ndarray:
    """Draw one of several runs. Returns the share of its groups that was kept, per epoch."""
    where = span(run.epochs)
    colour, marker, line = look.colour(place), MARKERS[place % 8], LINES[place % 4]
    shares = []
    for epoch in run.epochs:
        metrics = epoch.metrics
        shares.append(metrics.kept_groups / metrics.groups if metrics.groups else math.nan)
    shown = at_their_places(where, run.epochs, shares)
    draw_line(ax, where, shown, colour, f"{axis_label(run.name)}: kept", marker, line)
    if any(epoch.curriculum.enabled for epoch in run.epochs):
        step_line(ax, run.epochs, look, colour, f"{axis_label(run.name)}: percentile")
    return shown


def _reasons_and_percentile(ax: Axes, epochs: Sequence[Epoch], look: Theme) -> None:
    """Draw a single run: bars by reason, a line for the groups that can teach, and the percentile."""
    import numpy as np
    from matplotlib.patheffects import withStroke

    at = [epoch.index for epoch in epochs]
    counts = np.array([np.bincount(epoch.selection.reasons, minlength=len(GROUP_REASONS)) for epoch in epochs])
    floor = np.zeros(len(at))
    for code, reason in enumerate(GROUP_REASONS):
        if not len(at) or not counts[:, code].any():
            continue
        style: dict[str, Any] = {"color": look.colour(code), "alpha": 0.5 if code else 0.9, "linewidth": 0}
        style |= {"hatch": HATCHES[code], "edgecolor": look.ink}
        ax.bar(at, counts[:, code], bottom=floor, width=0.8, label=reason.value.replace("_", " "), **style)
        floor = floor + counts[:, code]
    teach = metrics_of(epochs, "groups_with_spread")
    where = span(epochs)
    draw_line(ax, where, at_their_places(where, epochs, teach), look.ink, "rewards differ", "D", LINES[0])
    ax.lines[-1].set_path_effects([withStroke(linewidth=3.5, foreground=look.halo)])
    if any(epoch.curriculum.enabled for epoch in epochs):
        share = share_axis(ax, look, "curriculum percentile")
        step_line(share, epochs, look, look.ink, "curriculum percentile")


def plot_groups(epochs: Any, ax: Any = None, theme: ThemeName = None) -> Figure | Any:
    """Plot a map of the groups: mean reward against the spread of the rewards.

    Colour and shape of a mark show whether the group was kept, and why. The larger a mark, the more groups are at
    that point. Of groups at more than 400 points a density is drawn instead: the stronger the colour of a cell, the more groups
    it has; the colour is that of their most frequent reason. A line marks the curriculum's smallest spread, if it was on: only
    groups above it can teach. Groups without a finite mean and spread are not drawn; their number is stated.

    Args:
        epochs: A run or epochs; or several runs, for one panel per run.
        ax: One axes per panel. Default: a new figure.
        theme: "light" or "dark". Default: "light", which reads on dark pages too.

    Returns:
        The new figure, or `ax`.

    Raises:
        ConfigError: The number of axes is wrong, or the theme is unknown.
    """
    runs = series_of(epochs)
    axes, figure, look = panels(ax, theme, "mean reward of the group", "spread", max(1, len(runs)))
    said = []
    for each, run in zip(axes, runs, strict=False):
        whose = ""
        if len(runs) > 1:
            each.set_ylabel(f"{axis_label(run.name)}: spread")
            whose = f"{run.name}: "
        said.append(whose + _map(each, run, look))
        finish(each, look, empty=not run.epochs)
    named(figure, runs, "map of the groups")
    if figure is None:
        return ax
    figure.alt_text = f"Map of groups, mean reward against spread. {'. '.join(said)}"
    return figure


MARKS = 400
"""Most different points of a map that are drawn as marks."""
CELLS = (40, 20)
"""Cells of a density, across and up."""


def _density(ax: Axes, means: np.ndarray, spreads: np.ndarray, codes: np.ndarray, look: Theme) -> None:
    """Draw cells: the more groups, the stronger the colour, which is that of their most frequent reason."""
    import numpy as np
    from matplotlib.colors import to_rgb

    limits = []
    for values in (means, spreads):
        low, high = float(values.min()), float(values.max())
        limits.append((low, high if high > low else low + 1.0))
    counts = []
    for code in range(len(GROUP_REASONS)):
        of_code = codes == code
        counts.append(np.histogram2d(means[of_code], spreads[of_code], CELLS, limits)[0])
    by_reason = np.stack(counts)  # (reasons, cells across, cells up)
    colours = np.array([to_rgb(look.colour(code)) for code in range(len(GROUP_REASONS))])
    total = by_reason.sum(axis=0)
    strength = np.where(total > 0, 0.15 + 0.85 * np.sqrt(total / total.max()), 0.0)
    cells = np.concatenate([colours[by_reason.argmax(axis=0)], strength[..., None]], axis=2)
    (left, right), (bottom, top) = limits
    ax.imshow(
        cells.transpose(1, 0, 2),
        origin="lower",
        aspect="auto",
        extent=(left, right, bottom, top),
        interpolation="nearest",
        zorder=3,
    )


def _map(ax: Axes, run: RunSeries, look: Theme) -> str:
    """Draw one run's groups. Returns a description in words."""
    import numpy as np
    from matplotlib.ticker import AutoLocator

    nothing = np.empty(0)  # np.concatenate refuses an empty list
    means = np.concatenate([nothing, *(epoch.statistics.means for epoch in run.epochs)])
    spreads = np.concatenate([nothing, *(epoch.statistics.spreads for epoch in run.epochs)])
    codes = np.concatenate([nothing, *(epoch.selection.reasons for epoch in run.epochs)]).astype(int)
    placed = np.isfinite(means) & np.isfinite(spreads)
    is_dense = len(np.unique(np.round(np.stack([means[placed], spreads[placed]], 1), 6), axis=0)) > MARKS
    if is_dense:
        _density(ax, means[placed], spreads[placed], codes[placed], look)
    said = []
    for code, reason in enumerate(GROUP_REASONS):
        those = placed & (codes == code)
        if not those.any():
            continue
        name, marker = REASONS[reason].label, REASONS[reason].marker
        # Groups at the same point share one mark, whose size grows with their number.
        places = np.round(np.stack([means[those], spreads[those]], 1), 6)
        points, counts = np.unique(places, axis=0, return_counts=True)
        size = 26 * np.minimum(np.sqrt(counts), 5)
        said.append(f"{counts.sum():,} {name}")
        if is_dense:
            ax.fill_between(
                [], [], color=look.colour(code), hatch=HATCHES[code], edgecolor=look.background, label=said[-1]
            )
            continue
        ax.scatter(points[:, 0], points[:, 1], s=size, marker=marker, color=look.colour(code),
                   alpha=0.75, linewidths=1.6 if marker in "x_" else 0.6, label=said[-1], zorder=3)  # fmt: skip
    # Draw the line only if the smallest spread was the same in all epochs.
    smallest = {epoch.curriculum.min_reward_diff for epoch in run.epochs if epoch.curriculum.enabled}
    if len(smallest) == 1 and said:
        ax.axhline(
            smallest.pop(), color=look.ink, linewidth=1, linestyle=LINES[1], label="smallest spread that teaches"
        )
    ax.xaxis.set_major_locator(AutoLocator())
    if placed.any():
        widest = float(spreads[placed].max())
        margin = 0.07 * max(1e-9, widest)
        ax.set_ylim(-margin, widest + margin)
    without_place = int((~placed).sum())
    if without_place:
        said.append(f"{without_place:,} without a finite mean and spread, not in the map")
        ax.set_xlabel(f"mean reward of the group ({without_place:,} groups have none)")
    return ", ".join(said) or "no groups"
