"""The reward curve of a run that is going on, as a small SVG: it is drawn again after every epoch, so it has to cost nothing
(about a millisecond and ten kilobytes; plots.plot_rewards, which is for keeping, takes some hundred times that).

Colours are JupyterLab's, so it follows the theme; every line has a dash or a mark of its own beside its colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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
    """Mean reward with its 10-90 % range over the groups, that of the groups trained on, validation, the curriculum's
    percentile on an axis of its own, and a mark where changed settings were used first."""
    if not epochs:
        return element("div", "The reward of every epoch will be drawn here.", class_="ft-dim ft-empty")
    shown = _thinned(epochs)
    rewards = [epoch.metrics.mean_reward for epoch in shown]
    ranges = [(e.metrics.group_quantiles[0], e.metrics.group_quantiles[2]) for e in shown]
    checks = [(validation_epoch(e, check), check.mean_reward) for e in epochs for check in e.validations]
    last = max([epochs[-1].index, *(place for place, _ in checks)])
    x = _Scale((epochs[0].index, max(last, epochs[0].index + 1)), (LEFT + 8, WIDTH - RIGHT - 8))
    finite = [v for v in (*rewards, *(v for pair in ranges for v in pair), *(v for _, v in checks)) if math.isfinite(v)]
    y = _Scale(_rounded(finite), (HEIGHT - BOTTOM, TOP))
    curriculum = any(epoch.curriculum.enabled for epoch in shown)
    kept = [e.metrics.kept_mean_reward if e.metrics.kept_groups < e.metrics.groups else math.nan for e in shown]
    at = [epoch.index for epoch in shown]
    parts = [
        _axes(x, y, curriculum),
        _band(at, ranges, x, y),
        _line(at, _percentiles(shown), x, _Scale((0.0, 1.0), y.pixels), "ft-percentile", step=True)
        if curriculum
        else "",
        _line(at, kept, x, y, "ft-kept"),
        _line(at, rewards, x, y, "ft-mean"),
        _dots(at, rewards, x, y) if len(shown) <= 60 else "",
        [_diamond(x(place), y(value)) for place, value in checks if math.isfinite(value)],
        _marks(changes, epochs, x),
    ]
    said = f"Mean reward per epoch, {trend(rewards, none='none yet')}"
    svg = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=said, class_="ft-curve")
    keys = [("ft-mean", "mean reward"), ("ft-range", "10–90 % of groups")]
    keys += [("ft-kept", "of groups trained on")] * any(map(math.isfinite, kept))
    keys += [("ft-check", "validation")] * bool(checks) + [("ft-percentile", "percentile")] * curriculum
    keys += [("ft-mark", "settings changed")] * any(change.epoch is not None for change in changes)
    return element("div", svg, element("div", [_key(*key) for key in keys], class_="ft-keys"))


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
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
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
    """Around runs of epochs without a gap."""
    bands, run = [], []
    for place, (low, high) in [*zip(at, ranges, strict=True), (0, (math.nan, math.nan))]:
        if math.isfinite(low) and math.isfinite(high):
            run.append((x(place), y(low), y(high)))
        elif run:
            way = [f"{px} {top}" for px, _, top in run] + [f"{px} {bottom}" for px, bottom, _ in reversed(run)]
            bands.append(element("path", d="M" + "L".join(way) + "Z", class_="ft-range"))
            run = []
    return bands


def _line(at: Sequence[int], values: Sequence[float], x: _Scale, y: _Scale, kind: str, step: bool = False) -> Html:
    way, pen = [], "M"
    for place, value in zip(at, values, strict=True):
        if math.isfinite(value):
            way.append(f"H{x(place)}V{y(value)}" if step and pen == "L" else f"{pen}{x(place)} {y(value)}")
        pen = "L" if math.isfinite(value) else "M"
    return element("path", d="".join(way), class_=kind) if way else Html()


def _dots(at: Sequence[int], values: Sequence[float], x: _Scale, y: _Scale) -> list[Html]:
    return [
        element(
            "circle",
            element("title", f"epoch {place}: {number(value)}"),
            cx=x(place),
            cy=y(value),
            r="3",
            class_="ft-dot",
        )
        for place, value in zip(at, values, strict=True)
        if math.isfinite(value)
    ]


def _diamond(x: float, y: float) -> Html:
    return element("path", d=f"M{x} {y - 5}l4.5 5l-4.5 5l-4.5 -5Z", class_="ft-check")


def _marks(changes: Iterable[Change], epochs: Sequence[Epoch], x: _Scale) -> list[Html]:
    used: dict[int, list[str]] = {}
    for change in changes:
        if change.epoch is not None and x.values[0] <= change.epoch <= epochs[-1].index:
            new = plain(cut(number(change.new) if isinstance(change.new, float) else change.new, 40))
            used.setdefault(change.epoch, []).append(f"{change.field} {new} ({change.source})")
    return [
        element(
            "g",
            element("title", f"from epoch {epoch} on: {', '.join(texts[:6])}"),
            element("path", d=f"M{x(epoch)} {TOP}V{HEIGHT - BOTTOM}", class_="ft-mark-line"),
            element("path", d=f"M{x(epoch) - 5} {TOP - 9}h10l-5 9Z", class_="ft-mark"),
        )
        for epoch, texts in used.items()
    ]


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=x, y=y, text_anchor=anchor, class_="ft-tick")


def _key(kind: str, text: str) -> Html:
    shapes = {
        "ft-range": element("rect", x="1", y="2", width="18", height="8", class_=kind),
        "ft-check": _diamond(10, 6),
        "ft-mark": element("path", d="M5 2h10l-5 9Z", class_=kind),
    }
    drawn = shapes.get(kind) or element("path", d="M0 6H20", class_=kind)
    picture = element("svg", drawn, width="20", height="12", viewBox="0 0 20 12", aria_hidden="true")
    return element("span", picture, text, class_="ft-key")
