"""Shared parts of the plots: their runs, lines with gaps, marks for live changes, panels, labels and texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import ConfigError
from ..text import cut, number, plain, trend
from ..types import Epoch, Validation

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from ..types import Change
    from .figure import Figure, Theme

__all__ = [
    "RunSeries",
    "HATCHES",
    "LINES",
    "MARKERS",
    "ThemeName",
    "at_their_places",
    "series_of",
    "draw_from_parent",
    "draw_line",
    "finish",
    "flat_scale",
    "axis_label",
    "mark_changes",
    "metrics_of",
    "moving_mean",
    "named",
    "panels",
    "changes_text",
    "share_axis",
    "share_scale",
    "span",
    "is_isolated",
    "start",
    "step_line",
    "trend_text",
    "validation_epoch",
]

ThemeName = Literal["light", "dark"] | None
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "--")
WRITTEN = 6
"""Most changes that are written next to their marks; more would overlap."""


class RunSeries(NamedTuple):
    """The epochs and live changes of one run."""

    name: str
    epochs: Sequence[Epoch]
    changes: Sequence[Change]
    parent: tuple[str, int] | None = None
    """Of a fork: the name of its parent, and the epoch of the parent after which it began."""


def series_of(given: Any) -> list[RunSeries]:
    """The series to draw. given: a run, a list of runs, a mapping from a run's name to a run or epochs, or just epochs."""
    if isinstance(given, Mapping):
        return [
            each if isinstance(each, RunSeries) else RunSeries(plain(name), *_records(each))
            for name, each in given.items()
        ]
    if hasattr(given, "records"):
        return [RunSeries(given.id, *_records(given))]
    given = list(given)
    if any(hasattr(each, "records") for each in given):
        return [RunSeries(run.id, *_records(run)) for run in given]
    return [RunSeries("", given, ())]


def _records(given: Any) -> tuple[Sequence[Epoch], Sequence[Change], tuple[str, int] | None]:
    if hasattr(given, "records"):
        return given.records, given.changes, getattr(given, "parent", None)
    return list(given), (), None


def mark_changes(ax: Axes, of: Sequence[RunSeries], look: Theme, filled: bool = False) -> None:
    """Mark every live change, before the first epoch that used it. If a single run has only a few, write them out.

    Args:
        ax: Where the runs have already been drawn: texts avoid their lines.
        of: The runs.
        look: The theme.
        filled: Whether the plot has coloured areas, so that a text needs a background.
    """
    label: str | None = "live change"
    for place, course in enumerate(of):
        marks = _changes_by_epoch(course)
        if not marks:
            continue
        where = [epoch - 0.5 for epoch in marks]
        colour = look.colour(place) if len(of) > 1 else look.ink
        inside = ax.get_xaxis_transform()
        ax.vlines(where, 0, 1, colors=colour, linestyles=LINES[2], linewidth=1, transform=inside, zorder=1.5)
        feet = [0.0] * len(where)
        ax.scatter(where, feet, marker="^", s=34, color=colour, transform=inside, clip_on=False, zorder=5, label=label)
        label = None  # once in the legend

        has_ground = not filled or look.background != "none"
        if len(of) == 1 and len(marks) <= WRITTEN and has_ground:
            _write_changes(ax, marks, look, filled)


def _write_changes(ax: Axes, marks: Mapping[int, Sequence[_Changed]], look: Theme, filled: bool) -> None:
    """Write at most two changes next to each mark, vertically: at the upper edge, or at the lower edge if fewer lines cross
    the text there."""
    ground = {"facecolor": look.background, "alpha": 0.8, "linewidth": 0, "pad": 1} if filled else None
    for epoch, changed in marks.items():
        x = epoch - 0.5
        texts = [axis_label(_became(name, new)) for name, _, new in changed[:2]]
        end, side = 0.98, "top"
        if not filled:
            length = 0.026 * max(len(text) for text in texts)
            if _better_below(_heights_of_lines(ax, x), length):
                end, side = 0.06, "bottom"
        ax.annotate("\n".join(texts), (x, end), (-2, 0), ax.get_xaxis_transform(), "offset points", rotation=90, ha="right",
                    va=side, fontsize="x-small", color=look.ink, bbox=ground)  # fmt: skip


def _became(name: str, new: Any) -> str:
    return f"{name} changed" if _is_digest(name) else f"{name} {_value(new)}"


def _is_digest(name: str) -> bool:
    """Whether the values of a change are digests of a function or of rows, which say nothing to a reader."""
    return name.partition(".")[0] in ("evaluator", "function", "dataset")


def _better_below(heights: Sequence[float], length: float) -> bool:
    """Whether more lines cross a text at the upper edge than one at the lower edge."""
    above = sum(0.98 - length < height < 0.98 for height in heights)
    below = sum(0.06 < height < 0.06 + length for height in heights)
    return above > below


def _heights_of_lines(ax: Axes, x: float) -> list[float]:
    """The height of each line at `x`, from 0 (lower edge) to 1, including lines on a second axis."""
    import numpy as np

    found = []
    for each in ax.get_shared_x_axes().get_siblings(ax):
        if each.bbox.bounds != ax.bbox.bounds:
            continue  # another panel
        low, high = each.get_ylim()
        for line in each.get_lines():
            at, heights = line.get_data(orig=False)
            at, heights = np.asarray(at, dtype=float), np.asarray(heights, dtype=float)
            there = np.isfinite(heights)
            if there.any() and at.min() <= x <= at.max():
                height = np.interp(x, at[there], heights[there])
                found.append(float((height - low) / (high - low)))
    return found


_Changed = tuple[str, Any, Any]
"""The name of a setting, its old value and its new value."""


def _changes_by_epoch(course: RunSeries) -> dict[int, list[_Changed]]:
    """The changes by the first epoch that used them, if that epoch is shown."""
    shown = {epoch.index for epoch in course.epochs}
    marks: dict[int, list[_Changed]] = {}
    for change in course.changes:
        if change.epoch is not None and change.epoch in shown:
            marks.setdefault(change.epoch, []).append((change.field, change.old, change.new))
    return marks


def _value(value: Any) -> str:
    """A setting's value, shortened."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return plain(cut(value, 24))


def changes_text(of: Sequence[RunSeries]) -> str:
    """The live changes in words, for the alternative text."""
    said = []
    for course in of:
        whose = f"{course.name}, " if len(of) > 1 else ""
        for epoch, changed in _changes_by_epoch(course).items():
            for name, old, new in changed:
                before = "" if _is_digest(name) else f"{_value(old)} to "
                said.append(
                    f"{whose}epoch {epoch}: {plain(name)} {before}{'changed' if _is_digest(name) else _value(new)}"
                )
    if not said:
        return ""
    more = f"; and {len(said) - 8} more" if len(said) > 8 else ""
    return f". Live changes: {'; '.join(said[:8])}{more}"


# ── frame ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def start(ax: Axes | None, theme: ThemeName, x: str, y: str) -> tuple[Axes, Figure | None, Theme]:
    """The axes to draw on, the new figure if no `ax` is given, and the theme. A given `ax` keeps its look."""
    from matplotlib.ticker import MaxNLocator

    from .figure import Figure, theme_named

    look = theme_named(theme)
    figure = Figure(theme=look) if ax is None else None
    ax = figure.add_axes_of_theme() if figure is not None else ax
    assert ax is not None
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return ax, figure, look


def panels(
    ax: Any, theme: ThemeName, x: str, y: str, count: int, columns: int = 1, share: bool = True
) -> tuple[list[Axes], Figure | None, Theme]:
    """The axes of several panels: those that are given, or those of a new figure.

    Args:
        ax: One Axes, several, or None for a new figure.
        theme: Name of the theme.
        x: Label of the horizontal axes.
        y: Label of the vertical axes.
        count: Number of panels.
        columns: Panels per row of a new figure.
        share: Whether all panels share one vertical axis.

    Returns:
        `count` axes, the new figure if no `ax` is given, and the theme.

    Raises:
        ConfigError: The number of given axes is wrong, or the theme is unknown.
    """
    from .figure import Figure, styled, theme_named

    given: list[Axes] = []
    if isinstance(ax, Iterable):
        given = list(getattr(ax, "flat", ax))  # a grid of axes is a two-dimensional array
    elif ax is not None:
        given = [ax]
    if count == 1:
        only, figure, look = start(given[0] if given else None, theme, x, y)
        return [only], figure, look
    if ax is not None:
        if len(given) != count:
            raise ConfigError(
                f"found {len(given)} axes for {count} pictures. Pass {count} as ax=, or omit ax= for a new figure."
            )
        return [start(each, theme, x, y)[0] for each in given], None, theme_named(theme)
    look = theme_named(theme)
    rows = math.ceil(count / columns)
    figure = Figure(height=0.6 + 1.9 * rows, theme=look)
    grid: Any = figure.subplots(rows, columns, sharex=True, sharey=share, squeeze=False)
    for each in grid.flat[count:]:
        each.remove()
    axes = [start(styled(each, look), theme, x, y)[0] for each in grid.flat[:count]]
    for place, each in enumerate(axes):
        if place + columns < count:
            each.set_xlabel("")
        else:
            each.tick_params(labelbottom=True)
    return axes, figure, look


def named(figure: Figure | None, runs: Sequence[RunSeries], what: str) -> None:
    """Give a new figure its title: the run, or how many there are, and what is shown."""
    if figure is not None:
        whose = (
            axis_label(runs[0].name)
            if len(runs) == 1 and runs[0].name
            else f"{len(runs)} runs"
            if len(runs) > 1
            else ""
        )
        figure.suptitle(
            " · ".join(filter(None, (whose, what))), x=0.01, ha="left", fontsize="medium", color=figure.theme.ink
        )


def share_scale(ax: Axes, values: Iterable[float]) -> bool:
    """Let the axis go from 0 to 1 if all values lie there: pictures of rewards can then be compared. Returns whether it does."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) < 0 or max(finite) > 1:
        return False
    ax.set_ylim(-0.05, 1.05)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    return True


def flat_scale(ax: Axes, values: Iterable[float]) -> None:
    """Of values that are all the same, show that one alone: matplotlib would invent digits around it."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and max(finite) - min(finite) <= 1e-9 * max(map(abs, finite)):
        value = finite[0]
        margin = abs(value) / 2 or 1.0
        ax.set_ylim(value - margin, value + margin)
        ax.set_yticks([value], [number(value)])


def draw_from_parent(
    ax: Axes,
    runs: Sequence[RunSeries],
    run: RunSeries,
    where: np.ndarray,
    values: np.ndarray,
    value_of: Callable[[Epoch], float],
    colour: str,
) -> None:
    """Draw a fork from the point of its parent where it began, if the parent is shown too.

    Args:
        ax: Where to draw.
        runs: All runs that are shown.
        run: One of them.
        where: Its epochs.
        values: Its values there.
        value_of: The value of an epoch of the parent.
        colour: The fork's colour.
    """
    import numpy as np

    if run.parent is None:
        return
    name, last = run.parent
    known = np.flatnonzero(np.isfinite(values))
    for parent in runs:
        for epoch in parent.epochs:
            if parent.name == name and epoch.index == last and len(known):
                at, value = [last, where[known[0]]], [value_of(epoch), values[known[0]]]
                ax.plot(at, value, color=colour, linewidth=1.2, linestyle=LINES[2], label="_")


def finish(ax: Axes, look: Theme, empty: bool, said: str = "no epoch yet") -> None:
    """Add the legend; or, if nothing was drawn, a text that says so."""
    from .figure import legend_above

    if empty:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, said, ha="center", va="center", transform=ax.transAxes, color=look.ink)
    else:
        legend_above(ax, look)


def span(epochs: Sequence[Epoch]) -> np.ndarray:
    """All epoch numbers from the first to the last, including missing ones, where a line has a gap."""
    import numpy as np

    at = [epoch.index for epoch in epochs]
    return np.arange(min(at), max(at) + 1) if at else np.empty(0, dtype=int)


def at_their_places(where: np.ndarray, epochs: Sequence[Epoch], values: Any) -> np.ndarray:
    """The epochs' values at their positions in `where`, NaN elsewhere."""
    import numpy as np

    out = np.full(len(where), math.nan)
    if len(where):
        out[np.array([epoch.index for epoch in epochs]) - where[0]] = values
    out[np.isinf(out)] = math.nan
    return out


def is_isolated(values: np.ndarray) -> np.ndarray:
    """Where a value has no neighbours."""
    import numpy as np

    there = np.pad(~np.isnan(values), 1)
    return there[1:-1] & ~there[:-2] & ~there[2:]


def validation_epoch(epoch: Epoch, validation: Validation) -> int:
    """The position of a validation on the axis of epochs.

    An epoch's rewards come from the policy before its update, so a validation of the policy after the update belongs at the
    next epoch.

    Args:
        epoch: The epoch that recorded the validation.
        validation: One of its validations.

    Returns:
        The number of the epoch whose rollouts are sampled from the validated policy.
    """
    before, after = epoch.policy_versions
    lag = epoch.metrics.version_lag or 0  # so much older were the weights that sampled, than those that were trained
    is_updated = after is not None and (before is None or after != before + lag)
    if is_updated and validation.policy_version == after:
        return epoch.index + 1
    return epoch.index


def metrics_of(epochs: Sequence[Epoch], name: str) -> list[float]:
    return [float(getattr(epoch.metrics, name)) for epoch in epochs]


def axis_label(name: Any) -> str:
    """A name that matplotlib shows literally: a "$" would start a formula, and a leading "_" hide it from the legend. Characters
    that no font here has are named by their number."""
    from .figure import drawable

    text = drawable(" ".join(plain(cut(name, 40)).split())).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text or "(no name)"


def trend_text(values: Iterable[float]) -> str:
    """The course of a line in words, for the alternative text."""
    return trend(values, lowest="lowest", highest="highest")


def draw_line(ax: Axes, where: np.ndarray, values: np.ndarray, colour: str, label: str, marker: str, line: Any) -> None:
    """Draw a line with gaps. Markers are drawn while they can be told apart, and always for a value without neighbours. Of many
    values the line is their moving mean, over a faint one of the values themselves."""
    import numpy as np

    marked = list(range(len(where))) if len(where) <= 40 else np.flatnonzero(is_isolated(values)).tolist()
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5, "markevery": marked}
    if np.isfinite(values).sum() <= SMOOTHED:
        ax.plot(where, values, label=label, linewidth=1.7, linestyle=line, **style)
        return
    window = 2 * (len(values) // 40) + 3
    ax.plot(where, values, label="_", linewidth=0.8, alpha=0.35, **style)
    ax.plot(where, moving_mean(values, window), color=colour, label=label, linewidth=1.9, linestyle=line)
    if ax.get_xlabel().startswith("epoch"):
        ax.set_xlabel(f"epoch (bold: mean of {window} epochs)")


SMOOTHED = 60
"""Most values of a line that is drawn as it is."""


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values in a centred window, which is cut off at both ends; NaN where the value itself is missing."""
    import numpy as np

    ones, there = np.ones(window), np.isfinite(values)
    sums = np.convolve(np.where(there, values, 0.0), ones, mode="same")
    counts = np.convolve(there.astype(float), ones, mode="same")
    return np.where(there, sums / np.maximum(counts, 1.0), math.nan)


def step_line(ax: Axes, epochs: Sequence[Epoch], look: Theme, colour: str, label: str) -> None:
    """Draw the curriculum's percentile, one step per epoch, where the curriculum was on."""
    where = span(epochs)
    used = [epoch.curriculum.percentile if epoch.curriculum.enabled else math.nan for epoch in epochs]
    shown = at_their_places(where, epochs, used)
    single = is_isolated(shown).nonzero()[0].tolist()
    style: dict[str, Any] = {"color": colour, "linewidth": 1.2, "linestyle": LINES[2]}
    style |= {"marker": "_" if single else "", "markersize": 12, "markevery": single}
    ax.step(where, shown, where="mid", label=label, **style)


def share_axis(ax: Axes, look: Theme, label: str) -> Axes:
    """Add a second axis for shares on the right, from 0 to 1 with a margin."""
    from .figure import styled

    share = ax.twinx()
    share.set(ylim=(-0.05, 1.05), ylabel=label)
    styled(share, look).grid(False)
    share.spines["right"].set_visible(True)
    for side in ("left", "bottom"):
        share.spines[side].set_visible(False)
    return share
