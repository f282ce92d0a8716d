"""Shows a preview of other curriculum settings: a histogram of the groups' mean rewards, and a table of numbers.

Colour is never the only cue: the legend has numbers, and kinds of groups also differ in fill or outline. In a cell's output the
histogram is an `<img>` in literal colours, which JupyterLab shows before a notebook is trusted; in the panel, which is redrawn
with every move of a slider, it is an inline drawing in the colours of the page.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..analysis.reasons import REASONS
from ..text import duration, number
from ..training.preview import Preview
from ..types import GROUP_REASONS, GroupReason
from .html import ACCENT, Html, drawing, element, table, view

__all__ = [
    "preview_body",
    "preview_html",
    "preview_text",
]

BINS = 24
WIDTH, HEIGHT = 440, 120
ENTER = len(GROUP_REASONS)
"""Code of a group that would newly be trained on. Smaller codes are positions in GROUP_REASONS."""
LEAVE = ENTER + 1
"""Code of a group that would no longer be trained on."""
IDLE = LEAVE + 1
"""Code of a group that is kept and not trained on."""


class Look(NamedTuple):
    """How a kind of group is named in the legend and drawn in the histogram."""

    text: str
    style: str


def _looks() -> dict[int, Look]:
    """The kinds of groups, in stacking order from the bottom."""
    kept, *left_out = (
        GroupReason.KEPT,
        GroupReason.BEYOND_PERCENTILE,
        GroupReason.SUBSAMPLED,
        GroupReason.NO_REWARD_SPREAD,
        GroupReason.NO_REWARD,
        GroupReason.INFINITE_REWARD,
    )
    looks = {
        GROUP_REASONS.index(kept): Look("trained on", REASONS[kept].fill),
        IDLE: Look("kept, but their rewards do not differ", "fill:none;stroke:var(--on);stroke-width:1"),
        ENTER: Look("enter", "fill:var(--enter);stroke:var(--fg);stroke-width:1.5"),
        LEAVE: Look("leave", "fill:none;stroke:var(--leave);stroke-width:2"),
    }
    for reason in left_out:
        looks[GROUP_REASONS.index(reason)] = Look(REASONS[reason].label, REASONS[reason].fill)
    return looks


LOOKS = _looks()
_ROWS = ("then", "unchanged")


def preview_html(preview: Preview) -> str:
    """A preview as HTML."""
    return view(preview_body(preview, as_image=True))


def preview_text(preview: Preview) -> str:
    """A preview in one line."""
    groups, before = preview.groups
    enters, leaves = preview.moves
    kept = "" if preview.groups == preview.kept_groups else f", {preview.kept_groups[0]} kept"
    return (
        f"preview on the rewards of epoch {preview.basis.epoch}: {groups} of {len(preview.basis.statistics)} groups trained "
        f"on{kept} (unchanged {before}; {enters} enter, {leaves} leave), {preview.trajectories[0]} trajectories, "
        f"{preview.tokens[0]} tokens, {duration(preview.training_seconds[0])} of training"
    )


def preview_body(preview: Preview, as_image: bool = False) -> Html:
    """The content of the card, without the outermost element. as_image: whether its drawings are images."""
    # A group is drawn by its reason, unless only one of the two selections trains on it.
    codes = preview.selection.reasons.astype(np.int64)
    codes[(codes == 0) & ~preview.basis.teaches] = IDLE
    codes[preview.trained & ~preview.trained_unchanged] = ENTER
    codes[preview.trained_unchanged & ~preview.trained] = LEAVE
    counts = np.bincount(codes, minlength=IDLE + 1)
    question = "The next epoch " if preview.selection is preview.unchanged else "What if "
    return element(
        "div",
        element("div", element("strong", question), _settings(preview)),
        element("div", _histogram(preview, codes, counts, as_image), _legend(counts, as_image), style=WHAT_IF),
        _numbers(preview),
    )


def _settings(preview: Preview) -> Html:
    settings = preview.settings
    if not settings.enabled:
        said = "without a curriculum: every group is kept"
    else:
        which = "worst" if settings.sort_ascending else "best"
        said = f"the {which} {settings.percentile:.0%} of the groups that can teach"
    reweighted = ""
    if preview.weights:
        parts = " + ".join(f"{number(weight)} {name}" for name, weight in preview.weights.items())
        reweighted = f", the reward being {parts}"
    rewards = f" · on the rewards of epoch {preview.basis.epoch}{reweighted}"
    return element("span", said, element("span", rewards, class_="ft-dim"))


WHAT_IF = "display:flex;flex-wrap:wrap;gap:8px 20px;align-items:center;margin:6px 0"
_LITERAL = {"var(--on)": ACCENT, "var(--enter)": "#a65fd0", "var(--leave)": "#dd6b10", "var(--fg)": "#888"}
"""The colours of the page, for an image, which does not see them."""


def _picture(*shapes: Any, text: str, width: int, height: int, as_image: bool) -> Html:
    """SVG elements as an image, or as an inline drawing."""
    if as_image:
        markup = element("g", *shapes)
        for name, colour in _LITERAL.items():
            markup = markup.replace(name, colour)
        return drawing(
            Html(markup),
            text=text,
            width=width,
            height=height,
            style="max-width:100%;vertical-align:middle",
            color="#888",
        )
    about = {"role": "img", "aria_label": text} if text else {"aria_hidden": "true"}
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return element("svg", *shapes, style="max-width:100%;height:auto;vertical-align:middle", **size, **about)


def _histogram(preview: Preview, codes: np.ndarray, counts: np.ndarray, as_image: bool) -> Html:
    """A histogram by mean reward, stacked by kind. codes: the kind of each group; counts: groups of each kind."""
    means = preview.basis.statistics.means
    there = np.isfinite(means)
    if not there.any():
        return element("div", "no group has a finite reward", class_="ft-dim")

    # (bins, codes) groups
    low, high, many = _bins(means[there])
    bins = np.minimum(((means[there] - low) * (many / (high - low))).astype(np.int64), many - 1)
    stacks = np.bincount(bins * len(counts) + codes[there], minlength=many * len(counts)).reshape(many, len(counts))
    tallest = int(stacks.sum(axis=1).max())

    axis = element("path", d=f"M2 4V{HEIGHT}H{WIDTH}", fill="none", stroke="currentColor", stroke_opacity="0.5")
    least, most = number(float(means[there].min())), number(float(means[there].max()))
    said = ", ".join(f"{counts[code]:,} {look.text}" for code, look in LOOKS.items() if counts[code])
    text = f"Groups by mean reward, {least} to {most}: {said}"
    picture = _picture(_bars(stacks, tallest), axis, text=text, width=WIDTH, height=HEIGHT + 2, as_image=as_image)
    below = [element("span", label) for label in (least, "mean reward of the group", most)]
    return element(
        "div",
        element("div", f"{tallest:,} groups" if tallest > 1 else "1 group", style=LABELS),
        picture,
        element("div", *below, style=f"{LABELS};display:flex;justify-content:space-between"),
        style=f"width:{WIDTH}px;max-width:100%",
    )


LABELS = "font-size:11px;line-height:1.3"


def _bars(stacks: np.ndarray, tallest: int) -> list[Html]:
    """One rectangle per kind of group in a bin, stacked in the order of LOOKS."""
    up, across = (HEIGHT - 6) / tallest, (WIDTH - 8) / len(stacks)
    bars = []
    for place, stack in enumerate(stacks.tolist()):
        floor = float(HEIGHT)
        for code, look in LOOKS.items():
            if not stack[code]:
                continue
            height = stack[code] * up
            floor -= height
            box = {"x": f"{6 + place * across:.1f}", "y": f"{floor + 0.5:.1f}", "width": f"{across - 2:.1f}"}
            bars.append(element("rect", **box, height=f"{max(height - 1, 0.5):.1f}", style=look.style))
    return bars


def _bins(means: np.ndarray) -> tuple[float, float, int]:
    """Limits and number of equal bins: one bin per value if there are few distinct ones, such as means of eight 0/1 rewards."""
    low, high = float(means.min()), float(means.max())
    if high - low < 1e-9:
        half = max(0.5, abs(low) * 1e-9)  # 0.5 would vanish next to a very large number
        return low - half, high + half, 1
    if len(means) <= 5_000:
        with np.errstate(over="ignore"):  # overflows to infinity beyond 1e299
            steps = np.diff(np.unique(means.round(9)))
        steps = steps[np.isfinite(steps)]
        if len(steps) and (high - low) / steps.min() < BINS - 0.5:
            step = float(steps.min())
            return low - step / 2, high + step / 2, round((high - low) / step) + 1
    return low, high, BINS


def _legend(counts: np.ndarray, as_image: bool) -> Html:
    rows = []
    for code, look in LOOKS.items():
        if counts[code] or code in (0, ENTER, LEAVE):
            swatch = element("rect", x="1", y="1", width="12", height="10", style=look.style)
            key = _picture(swatch, text="", width=14, height=12, as_image=as_image)
            rows.append(
                element("div", key, element("strong", f" {counts[code]:,}", class_="ft-count"), f" {look.text}")
            )
    return element("div", rows, style="font-size:12px")


def _numbers(preview: Preview) -> Html:
    """A table of what would be trained on, next to what is trained on if nothing changes."""
    headers = ["trained on", "groups", "trajectories", "tokens"]
    columns: list[tuple[Any, Any]] = [_ROWS, preview.groups, preview.trajectories, preview.tokens]
    if preview.groups != preview.kept_groups:
        headers.insert(1, "groups kept")
        columns.insert(1, preview.kept_groups)
    then, unchanged = preview.training_seconds
    if math.isfinite(then):
        headers.append("training takes about")
        columns.append((duration(then), duration(unchanged)))
    rows = [list(row) for row in zip(*columns, strict=True)]
    if preview.selection is preview.unchanged:
        rows = rows[:1]
    return table(rows, headers)
