"""Records -> figures: curves of rewards, scores and training over the epochs; and the one door to all plots.

Each function takes a run, a list of runs, or epochs; it draws on the given `ax` and returns it, or makes a Figure that
shows itself. No pyplot state, no backend call, no rcParams. Missing values are gaps; failures and missing rewards are
drawn as what they are, never as 0. What is distributed is drawn in distributions.py, groups and the curriculum in
group_plots.py; what pictures have in common stands in plot_parts.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from ..text import number, plain
from ..types import Epoch
from .axes import (
    HATCHES,
    LINES,
    MARKERS,
    ThemeName,
    at_their_places,
    courses,
    draw_line,
    finish,
    label_of,
    mark_changes,
    metrics_of,
    panels,
    said_of,
    share_axis,
    span,
    stands_alone,
    start,
    step_line,
    trend_text,
    validation_epoch,
)

if TYPE_CHECKING:
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
    """Mean reward per epoch, with its 10-90 % range, the mean of the groups that were trained on where that is not all
    of them, and validation. A curriculum's percentile is a step line on an axis of its own, from 0 to 1; live changes are
    marked before the epoch that used them first.

    epochs: a run; epochs; or several runs, as a list or by name: then each is one line with its validation. baseline: a
    reward to compare with, the untrained model's say. Raises ConfigError for an unknown theme, as all of these functions
    do.
    """
    runs = courses(epochs)
    ax, figure, look = start(ax, theme, "epoch", "reward")
    several = len(runs) > 1
    for place, run in enumerate(runs):
        _reward_lines(ax, run.epochs, look, place, label_of(run.name) if several else "", several)
    if baseline is not None and math.isfinite(baseline):
        ax.axhline(baseline, color=look.ink, linewidth=1, linestyle=LINES[1], label=f"baseline {number(baseline)}")
    records = [] if several or not runs else runs[0].epochs
    if any(epoch.curriculum.enabled for epoch in records):
        share = share_axis(ax, look, "curriculum percentile")
        step_line(share, records, look, look.colours[3], "curriculum percentile")
    mark_changes(ax, runs, look)
    finish(ax, look, empty=not any(run.epochs for run in runs))
    if figure is None:
        return ax
    figure.alt_text = ". ".join(
        f"Mean reward per epoch{f', {run.name}' if several else ''}: {trend_text(metrics_of(run.epochs, 'mean_reward'))}"
        for run in runs
    ) + said_of(runs)
    return figure


def plot_scores(
    epochs: Any,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    theme: ThemeName = None,
    stacked: bool = False,
) -> Figure | Axes:
    """The mean of every evaluator per epoch, one line each; of several runs, a colour a run and a line style a score.

    names: which, in this order; None: all. stacked: as layers on top of one another, for scores that are shares of one
    whole (what kind each episode is of), of one run. Raises ConfigError for a name that no epoch has a score of.
    """
    runs = courses(epochs)
    records = [epoch for run in runs for epoch in run.epochs]
    known = list(dict.fromkeys(name for epoch in records for name in epoch.metrics.scores))
    for name in names or ():
        if records and name not in known:
            raise ConfigError(f"no epoch has a score of {name!r}. {did_you_mean(name, known)}")
    if stacked and len(runs) > 1:
        raise ConfigError(f"found {len(runs)} runs; stacked=True shows the scores of one.")
    chosen = list(known if names is None else names)
    ax, figure, look = start(ax, theme, "epoch", "mean score")
    said = []
    for place, run in enumerate(runs):
        where = span(run.epochs)
        values = ([epoch.metrics.scores.get(name, math.nan) for epoch in run.epochs] for name in chosen)
        columns = [at_their_places(where, run.epochs, column) for column in values]
        said += [(run, name, column) for name, column in zip(chosen, columns, strict=True)]
        if stacked:
            _layers(ax, where, chosen, columns, look)
            continue
        for nth, (name, column) in enumerate(zip(chosen, columns, strict=True)):
            colour = look.colour(place if len(runs) > 1 else nth)
            label = label_of(f"{run.name}: {name}" if len(runs) > 1 else name)
            draw_line(ax, where, column, colour, label, MARKERS[nth % 8], LINES[nth % 4])
    if chosen:
        mark_changes(ax, runs, look)
    finish(ax, look, empty=not chosen or not records, said="no scores" if records else "no epoch yet")
    if figure is None:
        return ax
    whose = (f"{run.name} " if len(runs) > 1 else "" for run, _, _ in said)
    text = "; ".join(f"{who}{plain(name)} {trend_text(c)}" for who, (_, name, c) in zip(whose, said, strict=True))
    figure.alt_text = f"Mean score per epoch: {text or 'no scores'}{said_of(runs)}"
    return figure


def _layers(ax: Axes, where: Any, names: Sequence[str], columns: Sequence[Any], look: Theme) -> None:
    import numpy as np

    floor = np.zeros(len(where))
    for place, (name, column) in enumerate(zip(names, columns, strict=True)):
        top = floor + np.where(np.isnan(column), 0, column)
        colour = look.colour(place)
        band = ax.fill_between(where, floor, np.where(np.isnan(column), np.nan, top), color=colour, alpha=0.8)
        band.set(label=label_of(name), hatch=HATCHES[place % len(HATCHES)], edgecolor=look.faint, linewidth=0.5)
        floor = top


TRAINING = {
    "loss": "loss",
    "kl": "KL (nats from the sampler)",
    "reference_kl": "KL (nats from the start)",
    "clip_fraction": "clipped (share of tokens)",
    "grad_norm": "gradient norm (unclipped)",
    "logprob_gap": "logprob gap (training − sampling)",
    "learning_rate": "learning rate",
}
"""What is shown without being asked for, in this order."""


def plot_training(
    epochs: Any, names: Sequence[str] | None = None, ax: Any = None, theme: ThemeName = None
) -> Figure | Any:
    """What the training backend measured, a small picture each: loss, KL, clip fraction, gradient norm, the difference of
    training's and the sampler's logprobs (large: other weights or another temperature sampled), learning rate. An epoch
    that was not trained, or whose job failed, is a gap.

    names: which metrics, in this order; None: those of TRAINING that there are, else all. ax: as many axes as metrics.
    Raises ConfigError for a name that no epoch has.
    """
    runs = courses(epochs)
    records = [epoch for run in runs for epoch in run.epochs]
    found = list(dict.fromkeys(n for e in records for n, v in e.train_metrics.items() if math.isfinite(_number(v))))
    known = list(dict.fromkeys(name for epoch in records for name in epoch.train_metrics))
    for name in names or ():
        if records and name not in known:
            raise ConfigError(f"no epoch has a training metric {name!r}. {did_you_mean(name, known)}")
    chosen = list(names) if names is not None else [name for name in TRAINING if name in found] or found or ["loss"]
    axes, figure, look = panels(ax, theme, "epoch", "", len(chosen), columns=2, share=False)
    said = []
    for each, name in zip(axes, chosen, strict=True):
        each.set_ylabel(label_of(TRAINING.get(name, name)).replace(" (", "\n("), fontsize="small")
        for place, run in enumerate(runs):
            where = span(run.epochs)
            values = at_their_places(where, run.epochs, [_number(e.train_metrics.get(name)) for e in run.epochs])
            label = label_of(run.name) if len(runs) > 1 and each is axes[0] else "_"
            draw_line(each, where, values, look.colour(place), label, MARKERS[place % 8], LINES[place % 4])
            said.append(f"{f'{run.name} ' if len(runs) > 1 else ''}{plain(name)} {trend_text(values)}")
        mark_changes(each, [run._replace(changes=()) for run in runs] if each is not axes[0] else runs, look)
        finish(each, look, empty=not records)
    if figure is None:
        return ax
    figure.alt_text = f"Training metrics per epoch: {'; '.join(said) or 'none'}{said_of(runs)}"
    return figure


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


# ── parts of a picture ───────────────────────────────────────────────────────────────────────────────────────────────


def _reward_lines(ax: Axes, epochs: Sequence[Epoch], look: Theme, place: int, name: str, several: bool) -> None:
    import numpy as np

    where = span(epochs)
    colour = look.colour(place)
    mean = at_their_places(where, epochs, metrics_of(epochs, "mean_reward"))
    if not several:
        quantiles = np.array([epoch.metrics.group_quantiles for epoch in epochs]).reshape(-1, 3)
        low, high = at_their_places(where, epochs, quantiles[:, 0]), at_their_places(where, epochs, quantiles[:, 2])
        ax.fill_between(where, low, high, color=colour, alpha=0.18, linewidth=0, label="10–90 % of groups")
        alone = stands_alone(low)  # between gaps a band has no width
        ax.vlines(where[alone], low[alone], high[alone], color=colour, alpha=0.35, linewidth=5)
    draw_line(ax, where, mean, colour, name or "mean of all trajectories", MARKERS[place % 8], LINES[place % 4])
    kept = at_their_places(where, epochs, metrics_of(epochs, "kept_mean_reward"))
    if not several and any(epoch.metrics.kept_groups < epoch.metrics.groups for epoch in epochs):
        draw_line(ax, where, kept, look.colours[1], "mean of the groups trained on", "^", LINES[1])
    checks = [validation for epoch in epochs for validation in epoch.validations]
    when = {id(check): validation_epoch(epoch, check) for epoch in epochs for check in epoch.validations}
    good = [check for check in checks if math.isfinite(check.mean_reward)]
    failed = [check for check in checks if not math.isfinite(check.mean_reward)]
    own = colour if several else look.colours[2]
    if good:
        at, reward = [when[id(check)] for check in good], [check.mean_reward for check in good]
        style = {
            "s": 52 if len(good) <= 40 else 14,
            "marker": "*",
            "color": own,
            "edgecolors": look.ink,
            "linewidths": 0.5,
            "zorder": 4,
        }
        ax.scatter(at, reward, label=None if place else "validation", **style)
    if failed:  # on the lower edge, as there is no value
        at, edge = [when[id(check)] for check in failed], [0.02] * len(failed)
        style = {"marker": "x", "color": own, "transform": ax.get_xaxis_transform(), "zorder": 4}
        ax.scatter(at, edge, label=None if place else "validation failed", **style)
