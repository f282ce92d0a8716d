"""The reward curve of a run in progress, as a small SVG.

It is drawn again after every epoch, so it has to cost nothing: about a millisecond and ten kilobytes, some hundred times less
than a plot. Colours are JupyterLab's, so it follows the theme; every line has a dash or a mark of its own beside its colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..plots.axes import validation_epoch
from ..text import cut, number, plain, trend
from ..types import Change, Epoch
from ..views.html import Html, element

__all__ = [
    "reward_curve",
]

WIDTH, HEIGHT = 640, 210
LEFT, RIGHT, TOP, BOTTOM = 40, 40, 14, 22
MOST = 240
"""Epochs drawn; of more, those that are evenly spaced, and the last one."""


def reward_curve(epochs: Sequence[Epoch], changes: Sequence[Change] = ()) -> Html:
    """Mean reward with its 10-90 % range over the groups, that of the kept groups, validation, the curriculum's
    percentile on an axis of its own, and a mark where changed settings were used first."""
    if not epochs:
        return element("div", "The reward of every epoch will be drawn here.", class_="ft-dim ft-empty")
    shown = _thinned(epochs)
    at = [epoch.index for epoch in shown]
    rewards = [epoch.metrics.mean_reward for epoch in shown]
    kept = [_kept_reward(epoch) for epoch in shown]
    ranges = [(epoch.metrics.group_quantiles[0], epoch.metrics.group_quantiles[2]) for epoch in shown]
    checks = [
        (validation_epoch(epoch, validation), validation.mean_reward)
        for epoch in epochs
        for validation in epoch.validations
    ]
    curriculum = any(epoch.curriculum.enabled for epoch in shown)

    # The axes: a validation after the newest update lies one epoch further; a single epoch needs some width.
    first = epochs[0].index
    last = max([epochs[-1].index, first + 1, *(place for place, _ in checks)])
    x = _Scale((first, last), (LEFT + 8, WIDTH - RIGHT - 8))
    values = [*rewards, *(reward for _, reward in checks)]
    for low, high in ranges:
        values += (low, high)
    y = _Scale(_rounded([value for value in values if math.isfinite(value)]), (HEIGHT - BOTTOM, TOP))

    parts: list[Any] = [_axes(x, y, curriculum), _band(at, ranges, x, y)]
    if curriculum:
        shares = _Scale((0.0, 1.0), y.pixels)
        parts.append(_line(at, _percentiles(shown), x, shares, "ft-percentile", step=True))
    parts += [_line(at, kept, x, y, "ft-kept"), _line(at, rewards, x, y, "ft-mean")]
    if len(shown) <= 60:
        parts.append(_dots(at, rewards, x, y))
    parts.append([_diamond(x(place), y(reward)) for place, reward in checks if math.isfinite(reward)])
    parts.append(_marks(changes, epochs, x))
    said = f"Mean reward per epoch, {trend(rewards, none='none yet')}"
    svg = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=said, class_="ft-curve")

    keys = [_key("ft-mean", "mean reward"), _key("ft-range", "10–90 % of groups")]
    if any(math.isfinite(reward) for reward in kept):
        keys.append(_key("ft-kept", "of kept groups"))
    if checks:
        keys.append(_key("ft-check", "validation"))
    if curriculum:
        keys.append(_key("ft-percentile", "percentile"))
    if any(change.epoch is not None for change in changes):
        keys.append(_key("ft-mark", "settings changed"))
    return element("div", svg, element("div", keys, class_="ft-keys"))


def _kept_reward(epoch: Epoch) -> float:
    """The mean reward of the kept groups; NaN where these are all."""
    metrics = epoch.metrics
    return metrics.kept_mean_reward if metrics.kept_groups < metrics.groups else math.nan


class _Scale:
    """A linear scale from values to pixels."""

    def __init__(self, values: tuple[float, float], pixels: tuple[float, float]) -> None:
        self.values, self.pixels = values, pixels

    def __call__(self, value: float) -> float:
        (low, high), (first, last) = self.values, self.pixels
        return round(first + (value - low) / (high - low) * (last - first), 1)


def _thinned(epochs: Sequence[Epoch]) -> Sequence[Epoch]:
    every = math.ceil(len(epochs) / MOST)
    return epochs if every == 1 else [*epochs[:-1:every], epochs[-1]]


def _rounded(values: Sequence[float]) -> tuple[float, float]:
    """An interval of round numbers around the values; rewards between 0 and 1 have all of that."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span)) / 2
    return math.floor(low / step) * step, math.ceil(high / step) * step or step


def _percentiles(epochs: Sequence[Epoch]) -> list[float]:
    return [epoch.curriculum.percentile if epoch.curriculum.enabled else math.nan for epoch in epochs]


def _axes(x: _Scale, y: _Scale, curriculum: bool) -> list[Html]:
    parts = []
    low, high = y.values
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        parts.append(element("path", d=f"M{LEFT} {y(value)}H{WIDTH - RIGHT}", class_="ft-grid"))
        parts.append(_text(LEFT - 6, y(value) + 4, number(value), "end"))
        if curriculum and share in (0.0, 0.5, 1.0):
            parts.append(_text(WIDTH - RIGHT + 4, y(value) + 4, f"{share:.0%}", "start"))
    first, last = x.values
    every = max(1, math.ceil((last - first) / 10))
    parts += [_text(x(place), HEIGHT - 4, str(place), "middle") for place in range(int(first), int(last) + 1, every)]
    return parts


def _band(at: Sequence[int], ranges: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> list[Html]:
    """An area for every stretch of epochs without a gap: along its upper edge, and back along the lower one."""
    bands: list[Html] = []
    upper: list[str] = []
    lower: list[str] = []
    gap = (0, (math.nan, math.nan))  # closes the last area
    for place, (low, high) in [*zip(at, ranges, strict=True), gap]:
        if math.isfinite(low) and math.isfinite(high):
            upper.append(f"{x(place)} {y(high)}")
            lower.append(f"{x(place)} {y(low)}")
        elif upper:
            bands.append(element("path", d="M" + "L".join([*upper, *reversed(lower)]) + "Z", class_="ft-range"))
            upper, lower = [], []
    return bands


def _line(at: Sequence[int], values: Sequence[float], x: _Scale, y: _Scale, kind: str, step: bool = False) -> Html:
    """A line through the values, with gaps. step: across first, then up or down."""
    way, is_drawing = [], False
    for place, value in zip(at, values, strict=True):
        if not math.isfinite(value):
            is_drawing = False
            continue
        if not is_drawing:
            way.append(f"M{x(place)} {y(value)}")
        elif step:
            way.append(f"H{x(place)}V{y(value)}")
        else:
            way.append(f"L{x(place)} {y(value)}")
        is_drawing = True
    return element("path", d="".join(way), class_=kind) if way else Html()


def _dots(at: Sequence[int], values: Sequence[float], x: _Scale, y: _Scale) -> list[Html]:
    dots = []
    for place, value in zip(at, values, strict=True):
        if math.isfinite(value):
            text = element("title", f"epoch {place}: {number(value)}")
            dots.append(element("circle", text, cx=x(place), cy=y(value), r="3", class_="ft-dot"))
    return dots


def _diamond(x: float, y: float) -> Html:
    return element("path", d=f"M{x} {y - 5}l4.5 5l-4.5 5l-4.5 -5Z", class_="ft-check")


def _marks(changes: Iterable[Change], epochs: Sequence[Epoch], x: _Scale) -> list[Html]:
    """A line and a triangle where changed settings were used first; what has changed is shown on hover."""
    first, last = x.values[0], epochs[-1].index
    texts_by_epoch: dict[int, list[str]] = {}
    for change in changes:
        if change.epoch is None or not first <= change.epoch <= last:
            continue
        new = number(change.new) if isinstance(change.new, float) else change.new
        text = f"{change.field} {plain(cut(new, 40))} ({change.source})"
        texts_by_epoch.setdefault(change.epoch, []).append(text)

    marks = []
    for epoch, texts in texts_by_epoch.items():
        text = element("title", f"from epoch {epoch} on: {', '.join(texts[:6])}")
        line = element("path", d=f"M{x(epoch)} {TOP}V{HEIGHT - BOTTOM}", class_="ft-mark-line")
        triangle = element("path", d=f"M{x(epoch) - 5} {TOP - 9}h10l-5 9Z", class_="ft-mark")
        marks.append(element("g", text, line, triangle))
    return marks


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=x, y=y, text_anchor=anchor, class_="ft-tick")


def _key(kind: str, text: str) -> Html:
    """An entry of the legend."""
    shapes = {
        "ft-range": element("rect", x="1", y="2", width="18", height="8", class_=kind),
        "ft-check": _diamond(10, 6),
        "ft-mark": element("path", d="M5 2h10l-5 9Z", class_=kind),
    }
    drawn = shapes.get(kind) or element("path", d="M0 6H20", class_=kind)
    picture = element("svg", drawn, width="20", height="12", viewBox="0 0 20 12", aria_hidden="true")
    return element("span", picture, text, class_="ft-key")
