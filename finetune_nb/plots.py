"""Records -> figures: rewards, their distribution, scores and groups over the epochs.

Each function draws on the given `ax` and returns it, or makes a Figure that shows itself. No pyplot state, no backend
call, no rcParams. Missing values are gaps; failures and missing rewards are drawn as what they are, never as 0. The
figure itself and the themes are in figure.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError, did_you_mean
from .html import cut, number, plain
from .types import GROUP_REASONS, Epoch, Validation

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from .figure import Figure, Theme

__all__ = ["plot_groups", "plot_reward_distribution", "plot_rewards", "plot_scores"]

ThemeName = Literal["light", "dark"] | None
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "--")


def plot_rewards(
    epochs: Sequence[Epoch] | Mapping[str, Sequence[Epoch]],
    ax: Axes | None = None,
    theme: ThemeName = None,
    baseline: float | None = None,
) -> Figure | Axes:
    """Mean reward per epoch, with its 10-90 % range, the mean of the groups that were trained on where that is not all
    of them, and validation. A curriculum's percentile is a step line on an axis of its own, from 0 to 1.

    epochs: of one run, or several runs by name: then each is one line with its validation. baseline: a reward to
    compare with, the untrained model's say. Raises ConfigError for an unknown theme, as all of these functions do.
    """
    runs = epochs if isinstance(epochs, Mapping) else {"": epochs}
    ax, figure, look = _start(ax, theme, "epoch", "reward")
    several = len(runs) > 1
    for place, (name, records) in enumerate(runs.items()):
        _reward_lines(ax, records, look, place if several else 0, _label(name) if name else "", several)
    if baseline is not None and math.isfinite(baseline):
        ax.axhline(baseline, color=look.ink, linewidth=1, linestyle=LINES[1], label=f"baseline {number(baseline)}")
    records = [] if several else next(iter(runs.values()), [])
    if any(epoch.curriculum.enabled for epoch in records):
        _percentile_line(ax, records, look)
    _finish(ax, look, empty=not any(runs.values()))
    if figure is None:
        return ax
    figure.alt_text = ". ".join(
        f"Mean reward per epoch{f', {plain(name)}' if name else ''}: {_course(_of(records, 'mean_reward'))}"
        for name, records in runs.items()
    )
    return figure


def plot_reward_distribution(epochs: Sequence[Epoch], ax: Axes | None = None, theme: ThemeName = None) -> Figure | Axes:
    """How each epoch's rewards are distributed.

    At most six different values: stacked bars, the share of the rollouts with each of them, lowest at the bottom, then
    those without a finite reward and those that failed. More: a violin an epoch (width = density, on one scale; the
    thick line is the 10-90 % range, the dot the median); of many epochs, evenly spaced ones.
    """
    import numpy as np

    ax, figure, look = _start(ax, theme, "epoch", "share of rollouts")
    rewards = [epoch.statistics.rewards for epoch in epochs]
    finite = np.concatenate([np.empty(0), *(r[np.isfinite(r)] for r in rewards)])
    values = np.unique(finite)
    if len(values) <= 6:
        _reward_bars(ax, epochs, values, look)
        said = ", ".join(f"{np.mean(finite == value):.0%} {number(float(value))}" for value in values)
    else:
        ax.set_ylabel("reward")
        _reward_violins(ax, epochs, (float(values[0]), float(values[-1])), look)
        low, middle, high = np.quantile(finite, [0.1, 0.5, 0.9])
        said = f"median {number(float(middle))}, 10-90 % from {number(float(low))} to {number(float(high))}"
    _finish(ax, look, empty=not epochs)
    if figure is None:
        return ax
    figure.alt_text = f"Distribution of rewards over {len(epochs)} epochs: {said or 'no rewards'}"
    return figure


def plot_scores(
    epochs: Sequence[Epoch],
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    theme: ThemeName = None,
    stacked: bool = False,
) -> Figure | Axes:
    """The mean of every evaluator per epoch, one line each.

    names: which, in this order; None: all. stacked: as layers on top of one another, for scores that are shares of one
    whole (what kind each episode is of). Raises ConfigError for a name that no epoch has a score of.
    """
    import numpy as np

    known = list(dict.fromkeys(name for epoch in epochs for name in epoch.metrics.scores))
    for name in names or ():
        if epochs and name not in known:
            raise ConfigError(f"no epoch has a score of {name!r}. {did_you_mean(name, known)}")
    chosen = list(known if names is None else names)
    ax, figure, look = _start(ax, theme, "epoch", "mean score")
    where = _span(epochs)
    columns = [_at(where, epochs, [epoch.metrics.scores.get(name, math.nan) for epoch in epochs]) for name in chosen]
    floor = np.zeros(len(where))
    for place, (name, column) in enumerate(zip(chosen, columns, strict=True)):
        colour, label = look.colours[place % len(look.colours)], _label(name)
        if stacked:
            top = floor + np.where(np.isnan(column), 0, column)
            band = ax.fill_between(where, floor, np.where(np.isnan(column), np.nan, top), color=colour, alpha=0.8)
            band.set(label=label, hatch=HATCHES[place % len(HATCHES)], edgecolor=look.faint, linewidth=0.5)
            floor = top
        else:
            _line(ax, where, column, colour, label, MARKERS[place % 8], LINES[place % 4])
    _finish(ax, look, empty=not epochs)
    if figure is None:
        return ax
    said = "; ".join(f"{plain(name)} {_course(column)}" for name, column in zip(chosen, columns, strict=True))
    figure.alt_text = f"Mean score per epoch: {said or 'no scores'}"
    return figure


def plot_groups(epochs: Sequence[Epoch], ax: Axes | None = None, theme: ThemeName = None) -> Figure | Axes:
    """What became of each epoch's groups: trained on or left out, by reason; and, as a line, how many can teach (their
    rewards differ)."""
    import numpy as np
    from matplotlib.patheffects import withStroke

    ax, figure, look = _start(ax, theme, "epoch", "groups")
    at = [epoch.index for epoch in epochs]
    counts = np.array([np.bincount(epoch.selection.reasons, minlength=len(GROUP_REASONS)) for epoch in epochs])
    floor = np.zeros(len(at))
    for code, reason in enumerate(GROUP_REASONS):
        if not len(at) or not counts[:, code].any():
            continue
        style: dict[str, Any] = {"color": look.colours[code], "alpha": 0.5 if code else 0.9, "linewidth": 0}
        style |= {"hatch": HATCHES[code], "edgecolor": look.ink}
        ax.bar(at, counts[:, code], bottom=floor, width=0.8, label=reason.value.replace("_", " "), **style)
        floor = floor + counts[:, code]
    teach = _of(epochs, "groups_with_spread")
    where = _span(epochs)
    _line(ax, where, _at(where, epochs, teach), look.ink, "rewards differ", "D", LINES[0])
    ax.lines[-1].set_path_effects([withStroke(linewidth=3.5, foreground=look.halo)])
    _finish(ax, look, empty=not epochs)
    if figure is None:
        return ax
    figure.alt_text = f"Groups per epoch; those whose rewards differ: {_course(teach)}"
    return figure


# ── parts of a picture ───────────────────────────────────────────────────────────────────────────────────────────────


def _reward_lines(ax: Axes, epochs: Sequence[Epoch], look: Theme, place: int, name: str, several: bool) -> None:
    import numpy as np

    where = _span(epochs)
    colour = look.colours[place % len(look.colours)]
    mean = _at(where, epochs, _of(epochs, "mean_reward"))
    if not several:
        quantiles = np.array([epoch.metrics.group_quantiles for epoch in epochs]).reshape(-1, 3)
        low, high = _at(where, epochs, quantiles[:, 0]), _at(where, epochs, quantiles[:, 2])
        ax.fill_between(where, low, high, color=colour, alpha=0.18, linewidth=0, label="10–90 % of groups")
        alone = _alone(low)  # between gaps a band has no width
        ax.vlines(where[alone], low[alone], high[alone], color=colour, alpha=0.35, linewidth=5)
    _line(ax, where, mean, colour, name or "mean of all trajectories", MARKERS[place % 8], LINES[place % 4])
    kept = _at(where, epochs, _of(epochs, "kept_mean_reward"))
    if not several and any(epoch.metrics.kept_groups < epoch.metrics.groups for epoch in epochs):
        _line(ax, where, kept, look.colours[1], "mean of the groups trained on", "^", LINES[1])
    checks = [validation for epoch in epochs for validation in epoch.validations]
    when = {id(check): _place_of(check, epoch) for epoch in epochs for check in epoch.validations}
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


def _place_of(check: Validation, epoch: Epoch) -> int:
    """An epoch's rewards are those before its update: a validation after it stands where the next epoch would."""
    before, after = epoch.policy_versions
    return epoch.index + (after is not None and after != before and check.policy_version == after)


def _percentile_line(ax: Axes, epochs: Sequence[Epoch], look: Theme) -> None:
    from .figure import styled

    where = _span(epochs)
    used = [epoch.curriculum.percentile if epoch.curriculum.enabled else math.nan for epoch in epochs]
    share = ax.twinx()
    shown = _at(where, epochs, used)
    alone = _alone(shown).nonzero()[0].tolist()
    style: dict[str, Any] = {"color": look.colours[3], "linewidth": 1.2, "linestyle": LINES[2]}
    style |= {"marker": "_" if alone else "", "markersize": 12, "markevery": alone}
    share.step(where, shown, where="mid", label="curriculum percentile", **style)
    share.set(ylim=(-0.05, 1.05), ylabel="curriculum percentile")  # the margins of rewards from 0 to 1
    styled(share, look).grid(False)
    share.spines["right"].set_visible(True)
    for side in ("left", "bottom"):
        share.spines[side].set_visible(False)


def _reward_bars(ax: Axes, epochs: Sequence[Epoch], values: np.ndarray, look: Theme) -> None:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("rewards", look.sequence)
    at = [epoch.index for epoch in epochs]
    total = [max(1, len(epoch.statistics.rewards) + epoch.metrics.failures) for epoch in epochs]
    layers = [(f"reward {number(float(v))}", [np.sum(e.statistics.rewards == v) for e in epochs], {}) for v in values]
    for place, (_, _, style) in enumerate(layers):
        style |= {"color": scale(place / max(1, len(values) - 1)), "alpha": 0.9}
    without = [np.sum(~np.isfinite(epoch.statistics.rewards)) for epoch in epochs]
    failed = [epoch.metrics.failures for epoch in epochs]
    layers.append(("no reward", without, {"facecolor": "none", "edgecolor": look.ink, "hatch": "////"}))
    layers.append(("failed", failed, {"facecolor": "none", "edgecolor": look.colours[5], "hatch": "xxxx"}))
    floor = np.zeros(len(at))
    for label, counts, style in layers:
        if not any(counts):
            continue
        height = np.divide(counts, total)
        ax.bar(at, height, bottom=floor, width=0.86, label=label, linewidth=0, **style)
        floor = floor + height
    ax.set_ylim(0, 1)


def _reward_violins(ax: Axes, epochs: Sequence[Epoch], limits: tuple[float, float], look: Theme) -> None:
    import numpy as np

    every = math.ceil(len(epochs) / 24)  # more violins could not be told apart
    edges = np.linspace(*limits, 65)
    middles = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2) ** 2)
    shown = []
    for epoch in epochs[::every]:
        rewards = epoch.statistics.rewards[np.isfinite(epoch.statistics.rewards)]
        if len(rewards):
            density = np.convolve(np.histogram(rewards, edges)[0] / len(rewards), kernel / kernel.sum(), mode="same")
            shown.append((epoch.index, density, np.quantile(rewards, [0.1, 0.5, 0.9])))
    widest = max(density.max() for _, density, _ in shown)
    for index, density, (low, middle, high) in shown:
        half = 0.45 * every * density / widest
        first = index == shown[0][0]
        ax.fill_betweenx(middles, index - half, index + half, color=look.colours[0], alpha=0.4, linewidth=0,
                         label="density" if first else None)  # fmt: skip
        ax.vlines(index, low, high, color=look.colours[0], linewidth=2.5, label="10–90 %" if first else "")
        ax.plot(index, middle, "o", color=look.ink, markersize=4, label="median" if first else None)
    if every > 1:
        ax.set_xlabel(f"epoch (1 in {every} is shown)")


def _line(ax: Axes, where: np.ndarray, values: np.ndarray, colour: str, label: str, marker: str, line: Any) -> None:
    """A line with gaps; markers as long as they can be told apart, and always where a value stands alone."""
    import numpy as np

    marked = list(range(len(where))) if len(where) <= 40 else np.flatnonzero(_alone(values)).tolist()
    ax.plot(where, values, color=colour, label=label, linewidth=1.7, linestyle=line, marker=marker, markersize=4.5,
            markevery=marked)  # fmt: skip


# ── frame and data ───────────────────────────────────────────────────────────────────────────────────────────────────


def _start(ax: Axes | None, theme: ThemeName, x: str, y: str) -> tuple[Axes, Figure | None, Theme]:
    """The axes to draw on, the new figure if there was none, and the theme. A given `ax` keeps its own look."""
    from matplotlib.ticker import MaxNLocator

    from .figure import Figure, theme_named

    look = theme_named(theme)
    figure = Figure(theme=look) if ax is None else None
    ax = figure.add_axes_of_theme() if figure is not None else ax
    assert ax is not None
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return ax, figure, look


def _finish(ax: Axes, look: Theme, empty: bool) -> None:
    from .figure import legend_above

    if empty:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "no epoch yet", ha="center", va="center", transform=ax.transAxes, color=look.ink)
    else:
        legend_above(ax, look)


def _span(epochs: Sequence[Epoch]) -> np.ndarray:
    """All epoch numbers from the first to the last, also those that are missing: a line has a gap there."""
    import numpy as np

    at = [epoch.index for epoch in epochs]
    return np.arange(min(at), max(at) + 1) if at else np.empty(0, dtype=int)


def _at(where: np.ndarray, epochs: Sequence[Epoch], values: Any) -> np.ndarray:
    """The epochs' values at their places in `where`, NaN elsewhere."""
    import numpy as np

    out = np.full(len(where), math.nan)
    if len(where):
        out[np.array([epoch.index for epoch in epochs]) - where[0]] = values
    out[np.isinf(out)] = math.nan
    return out


def _alone(values: np.ndarray) -> np.ndarray:
    """Where a value has none beside it."""
    import numpy as np

    there = np.pad(~np.isnan(values), 1)
    return there[1:-1] & ~there[:-2] & ~there[2:]


def _of(epochs: Sequence[Epoch], name: str) -> list[float]:
    return [float(getattr(epoch.metrics, name)) for epoch in epochs]


def _label(name: Any) -> str:
    """A name as matplotlib shows it literally: a "$" would begin a formula, a leading "_" hide it from the legend."""
    text = " ".join(plain(cut(name, 40)).split()).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text or "(no name)"


def _course(values: Sequence[float] | np.ndarray) -> str:
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        return "no values"
    if len(finite) == 1:
        return number(finite[0])
    return (
        f"from {number(finite[0])} to {number(finite[-1])}, lowest {number(min(finite))}, highest {number(max(finite))}"
    )
