"""Curves over the epochs: rewards, scores and training metrics.

Each function takes a run, a list of runs, or epochs. It draws on the given `ax` and returns it, or makes a Figure that
displays itself. No pyplot state, no backend call, no rcParams. Missing values are gaps, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from ..text import number, plain
from ..types import Epoch, as_float
from .axes import (
    HATCHES,
    LINES,
    MARKERS,
    RunSeries,
    ThemeName,
    at_their_places,
    axis_label,
    changes_text,
    draw_from_parent,
    draw_line,
    finish,
    flat_scale,
    is_isolated,
    mark_changes,
    metrics_of,
    named,
    panels,
    series_of,
    share_axis,
    share_scale,
    span,
    start,
    step_line,
    trend_text,
    validation_epoch,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from .figure import Figure, Theme

__all__ = [
    "plot_rewards",
    "plot_scores",
    "plot_training",
]


def plot_rewards(
    epochs: Any, ax: Axes | None = None, theme: ThemeName = None, baseline: float | None = None
) -> Figure | Axes:
    """Plot the mean reward per epoch with its 10-90% range, and the validation rewards.

    If not all groups were kept, the mean of those that were is a second line. The curriculum's percentile is a step
    line with its own axis, from 0 to 1. Live changes are marked before the first epoch that used them.

    Args:
        epochs: A run; epochs; or several runs, as a list or by name: then one line per run, with its validation.
        ax: Where to draw. Default: a new figure.
        theme: "light" or "dark". Default: "light", which reads on dark pages too.
        baseline: A reward to compare with, such as the untrained model's.

    Returns:
        The new figure, or `ax`.

    Raises:
        ConfigError: The theme is unknown.
    """
    runs = series_of(epochs)
    ax, figure, look = start(ax, theme, "epoch", "reward")
    several = len(runs) > 1
    for place, run in enumerate(runs):
        mean = _reward_lines(ax, run.epochs, look, place, axis_label(run.name) if several else "", several)
        _validation_points(ax, run.epochs, look, place, several)
        draw_from_parent(
            ax, runs, run, span(run.epochs), mean, lambda epoch: epoch.metrics.mean_reward, look.colour(place)
        )
    if baseline is not None and math.isfinite(baseline):
        ax.axhline(baseline, color=look.ink, linewidth=1, linestyle=LINES[1], label=f"baseline {number(baseline)}")
    records = runs[0].epochs if len(runs) == 1 else []
    if any(epoch.curriculum.enabled for epoch in records):
        share = share_axis(ax, look, "curriculum percentile")
        step_line(share, records, look, look.colours[3], "curriculum percentile")
    if figure is not None and share_scale(ax, _shown_rewards(runs, several, baseline)) and _are_binary(runs):
        ax.set_ylabel("reward (share with 1)")
    mark_changes(ax, runs, look)
    named(figure, runs, "mean reward")
    finish(ax, look, empty=not any(run.epochs for run in runs))
    if figure is None:
        return ax

    said = []
    for run in runs:
        whose = f", {run.name}" if several else ""
        said.append(f"Mean reward per epoch{whose}: {trend_text(metrics_of(run.epochs, 'mean_reward'))}")
    figure.alt_text = ". ".join(said) + changes_text(runs)
    return figure


def _shown_rewards(runs: Sequence[RunSeries], several: bool, baseline: float | None) -> list[float]:
    """All rewards in the picture."""
    found = [] if baseline is None else [baseline]
    for run in runs:
        for epoch in run.epochs:
            found += [epoch.metrics.mean_reward, *(validation.mean_reward for validation in epoch.validations)]
            if not several:
                found += epoch.metrics.group_quantiles
    return found


def _are_binary(runs: Sequence[RunSeries]) -> bool:
    """Whether every rollout was rewarded with 0 or 1, so that a mean is a share of them."""
    import numpy as np

    for run in runs:
        for epoch in run.epochs:
            rewards = epoch.statistics.rewards
            if not np.isin(rewards[np.isfinite(rewards)], (0.0, 1.0)).all():
                return False
    return True


def plot_scores(
    epochs: Any,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    theme: ThemeName = None,
    stacked: bool = False,
) -> Figure | Axes:
    """Plot the mean score of every evaluator per epoch, one line each. For several runs: one colour per run, one line style
    per score.

    Args:
        epochs: As in `plot_rewards`.
        names: Which scores, in this order. Default: all.
        ax: Where to draw. Default: a new figure.
        theme: "light" or "dark". Default: "light", which reads on dark pages too.
        stacked: Whether to stack the scores, if they are shares of a whole (such as kinds of episode). Only for one run.

    Returns:
        The new figure, or `ax`.

    Raises:
        ConfigError: No epoch has a score of that name, `stacked` with several runs, or the theme is unknown.
    """
    runs = series_of(epochs)
    several = len(runs) > 1
    records = [epoch for run in runs for epoch in run.epochs]
    known = list(dict.fromkeys(name for epoch in records for name in epoch.metrics.scores))
    for name in names or ():
        if records and name not in known:
            raise ConfigError(f"no epoch has a score of {name!r}. {did_you_mean(name, known)}")
    if stacked and several:
        raise ConfigError(f"found {len(runs)} runs; stacked=True can only show the scores of one run.")
    chosen = list(known if names is None else names)
    ax, figure, look = start(ax, theme, "epoch", "mean score")
    said = []
    for place, run in enumerate(runs):
        where = span(run.epochs)
        columns = []
        for name in chosen:
            values = [epoch.metrics.scores.get(name, math.nan) for epoch in run.epochs]
            columns.append(at_their_places(where, run.epochs, values))
            said.append(f"{f'{run.name} ' if several else ''}{plain(name)} {trend_text(columns[-1])}")
        if stacked:
            _layers(ax, where, chosen, columns, look)
            continue
        for nth, (name, column) in enumerate(zip(chosen, columns, strict=True)):
            colour = look.colour(place if several else nth)
            label = "_" if several else axis_label(name)
            draw_line(ax, where, column, colour, label, MARKERS[nth % 8], LINES[nth % 4])
            draw_from_parent(
                ax, runs, run, where, column, lambda epoch, name=name: epoch.metrics.scores.get(name, math.nan), colour
            )
    if several:
        _keys(ax, runs, chosen, look)
    if figure is not None and chosen and not stacked:
        drawn = [value for epoch in records for name, value in epoch.metrics.scores.items() if name in chosen]
        if not share_scale(ax, drawn):
            flat_scale(ax, drawn)
    if chosen:
        mark_changes(ax, runs, look)
    named(figure, runs, "mean score")
    finish(ax, look, empty=not chosen or not records, said="no scores" if records else "no epoch yet")
    if figure is None:
        return ax
    figure.alt_text = f"Mean score per epoch: {'; '.join(said) or 'no scores'}{changes_text(runs)}"
    return figure


def _keys(ax: Axes, runs: Sequence[RunSeries], names: Sequence[str], look: Theme) -> None:
    """Entries for the legend: a colour for each run, and a line for each score."""
    for place, run in enumerate(runs):
        ax.plot([], [], color=look.colour(place), linewidth=6, label=axis_label(run.name))
    for nth, name in enumerate(names):
        ax.plot(
            [],
            [],
            color=look.ink,
            linewidth=1.7,
            linestyle=LINES[nth % 4],
            marker=MARKERS[nth % 8],
            label=axis_label(name),
        )


def _layers(ax: Axes, where: Any, names: Sequence[str], columns: Sequence[Any], look: Theme) -> None:
    import numpy as np

    floor = np.zeros(len(where))
    for place, (name, column) in enumerate(zip(names, columns, strict=True)):
        # A missing score is a gap in its own layer, and adds nothing to the layers above.
        top = floor + np.nan_to_num(column)
        edge = np.where(np.isnan(column), np.nan, top)
        band = ax.fill_between(where, floor, edge, color=look.colour(place), alpha=0.8)
        band.set(label=axis_label(name), hatch=HATCHES[place % len(HATCHES)], edgecolor=look.faint, linewidth=0.5)
        floor = top


TRAINING = {
    "loss": "loss",
    "kl": "KL (nats from the sampler)",
    "reference_kl": "KL (nats from the start)",
    "clip_fraction": "clipped (share of tokens)",
    "grad_norm": "gradient norm (unclipped)",
    "logprob_gap": "logprob gap (training − sampling)",
    "effective_samples": "effective samples (share)",
    "importance_bounded": "importance ratio bounded (share of tokens)",
    "learning_rate": "learning rate",
    "entropy": "entropy (nats a token)",
}
"""The metrics shown by default, in this order, with their labels."""


def plot_training(
    epochs: Any, names: Sequence[str] | None = None, ax: Any = None, theme: ThemeName = None
) -> Figure | Any:
    """Plot what the training backend measured, one small panel per metric.

    By default: loss, KL, clip fraction, gradient norm, the gap between the logprobs in training and in sampling (large: the
    tokens were sampled with other weights or another temperature), learning rate, and, where it was recorded, the policy's
    entropy in sampling ("entropy"). An epoch that was not trained on, or whose training job failed, is a gap.

    Args:
        epochs: As in `plot_rewards`.
        names: Which metrics, in this order. Default: those above that were measured, else all.
        ax: One axes per metric. Default: a new figure.
        theme: "light" or "dark". Default: "light", which reads on dark pages too.

    Returns:
        The new figure, or `ax`.

    Raises:
        ConfigError: No epoch has a metric of that name, the number of axes is wrong, or the theme is unknown.
    """
    runs = series_of(epochs)
    several = len(runs) > 1
    records = [epoch for run in runs for epoch in run.epochs]
    known = list(dict.fromkeys(name for epoch in records for name in _training_metrics(epoch)))
    for name in names or ():
        if records and name not in known:
            raise ConfigError(f"no epoch has a training metric {name!r}. {did_you_mean(name, known)}")
    chosen = _measured(records) if names is None else list(names)
    axes, figure, look = panels(ax, theme, "epoch", "", len(chosen), columns=2, share=False)
    said = []
    for each, name in zip(axes, chosen, strict=True):
        is_first = each is axes[0]
        each.set_ylabel(axis_label(TRAINING.get(name, name)).replace(" (", "\n("), fontsize="small")
        for place, run in enumerate(runs):
            where = span(run.epochs)
            values = at_their_places(where, run.epochs, [as_float(_training_metrics(e).get(name)) for e in run.epochs])
            label = axis_label(run.name) if several and is_first else "_"
            draw_line(each, where, values, look.colour(place), label, MARKERS[place % 8], LINES[place % 4])
            draw_from_parent(
                each,
                runs,
                run,
                where,
                values,
                lambda epoch, name=name: as_float(_training_metrics(epoch).get(name)),
                look.colour(place),
            )
            said.append(f"{f'{run.name} ' if several else ''}{plain(name)} {trend_text(values)}")
        if figure is not None:
            flat_scale(each, [as_float(_training_metrics(epoch).get(name)) for epoch in records])
        # Only the first panel shows the changes.
        mark_changes(each, runs if is_first else [run._replace(changes=()) for run in runs], look)
        finish(each, look, empty=not records)
    named(figure, runs, "training")
    if figure is None:
        return ax
    figure.alt_text = f"Training metrics per epoch: {'; '.join(said) or 'none'}{changes_text(runs)}"
    return figure


def _training_metrics(epoch: Epoch) -> Mapping[str, Any]:
    """What the backend measured and, unless it has its own, the entropy of what was sampled."""
    entropy, measured = epoch.metrics.mean_entropy, epoch.train_metrics
    if entropy is None or math.isfinite(as_float(measured.get("entropy"))):
        return measured
    return {**measured, "entropy": entropy}


def _measured(epochs: Sequence[Epoch]) -> list[str]:
    """The metrics of TRAINING that were measured; else all that were; else one, for an empty panel."""
    found: list[str] = []
    for epoch in epochs:
        for name, value in _training_metrics(epoch).items():
            if name not in found and math.isfinite(as_float(value)):
                found.append(name)
    return [name for name in TRAINING if name in found] or found or ["loss"]


# ── parts of a picture ───────────────────────────────────────────────────────────────────────────────────────────────


def _reward_lines(ax: Axes, epochs: Sequence[Epoch], look: Theme, place: int, name: str, several: bool) -> np.ndarray:
    """Draw the mean reward of one run; if it is the only one, with its range and the mean of the kept groups. Returns it."""
    import numpy as np

    where = span(epochs)
    colour = look.colour(place)
    mean = at_their_places(where, epochs, metrics_of(epochs, "mean_reward"))
    if not several:
        quantiles = np.array([epoch.metrics.group_quantiles for epoch in epochs]).reshape(-1, 3)
        low, high = at_their_places(where, epochs, quantiles[:, 0]), at_their_places(where, epochs, quantiles[:, 2])
        ax.fill_between(where, low, high, color=colour, alpha=0.18, linewidth=0, label="10–90 % of groups")
        alone = is_isolated(low)  # a band between two gaps has no width
        ax.vlines(where[alone], low[alone], high[alone], color=colour, alpha=0.35, linewidth=5)
    draw_line(ax, where, mean, colour, name or "mean of all trajectories", MARKERS[place % 8], LINES[place % 4])
    if not several and any(epoch.metrics.kept_groups < epoch.metrics.groups for epoch in epochs):
        kept = at_their_places(where, epochs, metrics_of(epochs, "kept_mean_reward"))
        draw_line(ax, where, kept, look.colours[1], "mean of the kept groups", "^", LINES[1])
    return mean


def _validation_points(ax: Axes, epochs: Sequence[Epoch], look: Theme, place: int, several: bool) -> None:
    """Draw a star for each validation. A failed one has no value: it is a cross on the lower edge."""
    at, rewards, failed_at = [], [], []
    for epoch in epochs:
        for validation in epoch.validations:
            if math.isfinite(validation.mean_reward):
                at.append(validation_epoch(epoch, validation))
                rewards.append(validation.mean_reward)
            else:
                failed_at.append(validation_epoch(epoch, validation))

    colour = look.colour(place) if several else look.colours[2]
    if at:
        size = 52 if len(at) <= 40 else 14
        ax.scatter(at, rewards, label=None if place else "validation", s=size, marker="*", color=colour,
                   edgecolors=look.ink, linewidths=0.5, zorder=4)  # fmt: skip
    if failed_at:
        edge = [0.02] * len(failed_at)
        ax.scatter(failed_at, edge, label=None if place else "validation failed", marker="x", color=colour,
                   transform=ax.get_xaxis_transform(), zorder=4)  # fmt: skip
