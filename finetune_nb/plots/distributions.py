"""Plots of the distributions within each epoch: rewards, advantages, lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..text import number
from ..training.metrics import advantages
from ..types import Epoch
from .axes import (
    LINES,
    MARKERS,
    ThemeName,
    axis_label,
    changes_text,
    draw_line,
    finish,
    mark_changes,
    named,
    panels,
    series_of,
    share_axis,
    share_scale,
    start,
    trend_text,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from .figure import Figure, Theme

__all__ = [
    "plot_advantages",
    "plot_lengths",
    "plot_reward_distribution",
]

VIOLINS = 24
"""Most violins in one plot, so that they can be told apart. Of more epochs, evenly spaced ones are shown."""
LENGTHS = 200
"""Most epochs whose trajectories are read for a plot of lengths. Of more epochs, evenly spaced ones are shown."""


def plot_reward_distribution(epochs: Any, ax: Any = None, theme: ThemeName = None) -> Figure | Any:
    """Plot the distribution of each epoch's rewards.

    With at most six distinct rewards: stacked bars of the share of rollouts with each reward, lowest at the bottom, then of
    rollouts without a finite reward and of failed ones. With more: one violin per epoch (width = density, all on one scale;
    the thick line is the 10-90% range, the dot the median). Of many epochs, evenly spaced ones are shown.

    Args:
        epochs: A run or epochs; or several runs, for one panel per run.
        ax: One axes per panel. Default: a new figure.
        theme: "light" or "dark". Default: "light", which reads on dark pages too.

    Returns:
        The new figure, or `ax`.

    Raises:
        ConfigError: The number of axes is wrong, or the theme is unknown.
    """
    import numpy as np

    runs = series_of(epochs)
    axes, figure, look = panels(ax, theme, "epoch", "share of rollouts", max(1, len(runs)))
    all_epochs = [epoch for run in runs for epoch in run.epochs]
    values = np.unique(_rewards(all_epochs))
    is_discrete = len(values) <= 6
    said = []
    for each, run in zip(axes, runs, strict=False):
        rewards = _rewards(run.epochs)
        whose = f"{axis_label(run.name)}: " if len(runs) > 1 else ""
        if is_discrete:
            each.set_ylabel(f"{whose}share of rollouts")
            _bars(each, run.epochs, values, look)
            told = _shares(rewards, values)
        else:
            each.set_ylabel(f"{whose}reward")
            every = _every(run.epochs)
            samples = [(epoch.index, _finite(epoch.statistics.rewards)) for epoch in run.epochs[::every]]
            limits = float(values[0]), float(values[-1])
            _violins(each, samples, limits, look, look.colours[0], every)
            if figure is not None:
                share_scale(each, limits)
            told = _middle(rewards)
        said.append(f"{f'{run.name}: ' if len(runs) > 1 else ''}{told or 'no rewards'}")
        mark_changes(each, [run], look, filled=is_discrete)
        finish(each, look, empty=not run.epochs)
    named(figure, runs, "rewards of the rollouts")
    if figure is None:
        return ax
    figure.alt_text = f"Distribution of rewards over {len(all_epochs)} epochs: {'. '.join(said)}{changes_text(runs)}"
    return figure


def plot_advantages(epochs: Any, ax: Any = None, theme: ThemeName = None) -> Figure | Any:
    """Plot the distribution of each epoch's advantages.

    Violins as in `plot_reward_distribution` show the advantages other than 0. A line on an axis from 0 to 1 shows the share
    of trajectories whose advantage is 0 because the rewards of their group do not differ: these teach nothing.

    Args:
        epochs: A run or epochs; or several runs, for one panel per run.
        ax: One axes per panel. Default: a new figure.
        theme: "light" or "dark". Default: "light", which reads on dark pages too.

    Returns:
        The new figure, or `ax`.

    Raises:
        ConfigError: The number of axes is wrong, or the theme is unknown.
    """
    import numpy as np

    runs = series_of(epochs)
    axes, figure, look = panels(ax, theme, "epoch", "advantage", max(1, len(runs)))
    said = []
    for each, run in zip(axes, runs, strict=False):
        every = _every(run.epochs)
        at, idle, samples = [], [], []
        for epoch in run.epochs[::every]:
            values = _finite(advantages(epoch.statistics))
            at.append(epoch.index)
            idle.append(float(np.mean(values == 0)) if len(values) else math.nan)
            samples.append((epoch.index, values[values != 0]))
        teaching = np.concatenate([np.empty(0), *(values for _, values in samples)])
        if len(runs) > 1:
            each.set_ylabel(f"{axis_label(run.name)}: advantage")
        if len(teaching):
            limits = float(teaching.min()), float(teaching.max())
            _violins(each, samples, limits, look, look.colours[0], every)
        if run.epochs:
            share = share_axis(each, look, "share with advantage 0")
            draw_line(share, np.array(at), np.array(idle), look.colours[1], "share with advantage 0", "s", LINES[1])
        whose = f"{run.name}: " if len(runs) > 1 else ""
        said.append(f"{whose}{_middle(teaching) or 'none'}; share with advantage 0: {trend_text(idle)}")
        mark_changes(each, [run], look)
        finish(each, look, empty=not run.epochs)
    named(figure, runs, "advantages")
    if figure is None:
        return ax
    figure.alt_text = f"Advantages that are not 0: {'. '.join(said)}{changes_text(runs)}"
    return figure


def plot_lengths(epochs: Any, ax: Axes | None = None, theme: ThemeName = None) -> Figure | Axes:
    """Plot the length of the trajectories, in tokens that the policy sampled: median and 10-90% range of each epoch.

    A line on an axis from 0 to 1 shows the share of trajectories whose last turn was cut at the token limit.

    Args:
        epochs: A run or epochs; or several runs: then one line per run with its range, without that share. Lengths are read
            from the run's files; of a long run, evenly spaced epochs are shown.
        ax: Where to draw. Default: a new figure.
        theme: "light" or "dark". Default: "light", which reads on dark pages too.

    Returns:
        The new figure, or `ax`.

    Raises:
        ConfigError: The theme is unknown.
    """
    import numpy as np

    from ..frames.trajectories import trajectories

    runs = series_of(epochs)
    ax, figure, look = start(ax, theme, "epoch", "sampled tokens per trajectory")
    several = len(runs) > 1
    said = []
    for place, run in enumerate(runs):
        every = max(1, math.ceil(len(run.epochs) / LENGTHS))
        shown = run.epochs[::every]
        frame: Any = trajectories(shown, columns=["epoch", "tokens", "finish_reason"])
        frame = frame[frame["tokens"].notna()].astype({"tokens": "float64"})
        where = np.array([epoch.index for epoch in shown])
        by_epoch: Any = frame.groupby("epoch")["tokens"]
        low, middle, high = (by_epoch.quantile(q).reindex(where).to_numpy() for q in (0.1, 0.5, 0.9))
        if len(where):
            colour, marker, line = look.colour(place), MARKERS[place % 8], LINES[place % 4]
            ax.fill_between(where, low, high, color=colour, alpha=0.18, linewidth=0, label="" if several else "10–90 %")
            draw_line(ax, where, middle, colour, axis_label(run.name) if several else "median", marker, line)
        said.append(f"{f'{run.name}: ' if several else ''}median {trend_text(middle)}")

        if not several and len(frame):
            shares: Any = (frame["finish_reason"] == "length").groupby(frame["epoch"]).mean()
            cut_off = shares.reindex(where).to_numpy()
            if np.nansum(cut_off):
                share = share_axis(ax, look, "share cut at the token limit")
                draw_line(share, where, cut_off, look.colours[1], "share cut at the token limit", "s", LINES[1])
            said.append(f"share cut at the token limit: {trend_text(cut_off)}")
        if every > 1:
            ax.set_xlabel(f"epoch (1 in {every} is shown)")
    ax.set_ylim(bottom=0)
    mark_changes(ax, runs, look)
    finish(ax, look, empty=not any(run.epochs for run in runs))
    named(figure, runs, "lengths")
    if figure is None:
        return ax
    figure.alt_text = f"Sampled tokens of a trajectory, per epoch: {'; '.join(said)}{changes_text(runs)}"
    return figure


# ── parts of a picture ───────────────────────────────────────────────────────────────────────────────────────────────


def _finite(values: np.ndarray) -> np.ndarray:
    import numpy as np

    return values[np.isfinite(values)]


def _rewards(epochs: Sequence[Epoch]) -> np.ndarray:
    """All finite rewards of the epochs."""
    import numpy as np

    return np.concatenate([np.empty(0), *(_finite(epoch.statistics.rewards) for epoch in epochs)])


def _shares(rewards: np.ndarray, values: np.ndarray) -> str:
    """In words: the share of each value among the rewards."""
    import numpy as np

    if not len(rewards):
        return ""
    return ", ".join(f"{np.mean(rewards == value):.0%} {number(float(value))}" for value in values)


def _middle(values: np.ndarray) -> str:
    """In words: the median and the 10-90% range."""
    import numpy as np

    if not len(values):
        return ""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return f"median {number(float(middle))}, 10-90 % from {number(float(low))} to {number(float(high))}"


def _every(epochs: Sequence[Epoch]) -> int:
    """The step between epochs that are shown as violins."""
    return max(1, math.ceil(len(epochs) / VIOLINS))


def _bars(ax: Axes, epochs: Sequence[Epoch], values: np.ndarray, look: Theme) -> None:
    """Draw one stacked bar per epoch: the share of its rollouts with each reward, without one, and failed."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("rewards", look.sequence)
    layers: list[tuple[str, list[Any], dict[str, Any]]] = []
    for place, value in enumerate(values):
        counts = [np.sum(epoch.statistics.rewards == value) for epoch in epochs]
        style = {"color": scale(place / max(1, len(values) - 1)), "alpha": 0.9}
        layers.append((f"reward {number(float(value))}", counts, style))
    without = [np.sum(~np.isfinite(epoch.statistics.rewards)) for epoch in epochs]
    failed = [epoch.metrics.failures for epoch in epochs]
    layers.append(("no reward", without, {"facecolor": "none", "edgecolor": look.ink, "hatch": "////"}))
    layers.append(("failed", failed, {"facecolor": "none", "edgecolor": look.colours[5], "hatch": "xxxx"}))

    at = [epoch.index for epoch in epochs]
    total = [max(1, len(epoch.statistics.rewards) + epoch.metrics.failures) for epoch in epochs]
    floor = np.zeros(len(at))
    for label, counts, style in layers:
        if not any(counts):
            continue
        height = np.divide(counts, total)
        ax.bar(at, height, bottom=floor, width=0.86, label=label, linewidth=0, **style)
        floor = floor + height
    ax.set_ylim(0, 1)


def _violins(
    ax: Axes,
    samples: Sequence[tuple[int, np.ndarray]],
    limits: tuple[float, float],
    look: Theme,
    colour: str,
    every: int,
) -> None:
    """Draw a violin for each epoch that has values: density, 10-90% range and median."""
    import numpy as np

    low, high = limits
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 65)
    middles = (edges[:-1] + edges[1:]) / 2

    # Density: a histogram smoothed by a Gaussian with a standard deviation of two bins.
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2) ** 2)
    kernel /= kernel.sum()
    shown = []
    for index, values in samples:
        if len(values):
            counts, _ = np.histogram(values, edges)
            density = np.convolve(counts / len(values), kernel, mode="same")
            shown.append((index, density, np.quantile(values, [0.1, 0.5, 0.9])))
    if not shown:
        return

    # The widest violin takes most of the width of an epoch.
    widest = max(density.max() for _, density, _ in shown)
    for index, density, (low, middle, high) in shown:
        half = 0.45 * every * density / widest
        first = index == shown[0][0]
        ax.fill_betweenx(middles, index - half, index + half, color=colour, alpha=0.4, linewidth=0,
                         label="density" if first else None)  # fmt: skip
        ax.vlines(index, low, high, color=colour, linewidth=2.5, label="10–90 %" if first else "")
        ax.plot(index, middle, "o", color=look.ink, markersize=4, label="median" if first else None)
    if every > 1:
        ax.set_xlabel(f"epoch (1 in {every} is shown)")
