"""The trajectory browser without its widget: the groups of an epoch as a table that reads well wherever a notebook is shown.

Viewers strip style sheets and drawings, and some strip styles as well. So the drawings are characters, every look is an inline
style with literal colours that suit light and dark, and nothing is said by either alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..analysis.browse_index import FAILED, SIGNAL_NAMES, BrowseIndex, group_order
from ..text import count, number, one_line, plain, short
from ..types import Epoch
from ..views.html import Html, element

__all__ = [
    "browser_html",
    "browser_text",
]

ROWS = 30
"""Most groups in the table."""
DOTS = 16
"""Most rollouts of a group that are shown one by one."""
BARS = 60
"""Most epochs in the strip of mean rewards."""
BLOCKS = "▁▂▃▄▅▆▇█"
_RED = "#d0533f"
_BLOCKS = "color:#3b82c4;font-family:monospace;letter-spacing:1px;white-space:nowrap"
_CELL = "padding:2px 12px 2px 0;text-align:left;vertical-align:middle;border:0;background:transparent"
_NUMBER = _CELL.replace("left", "right", 1) + ";font-variant-numeric:tabular-nums"


def browser_text(name: str, epochs: Sequence[Epoch], shown: int | None) -> str:
    """The browser in one line."""
    if shown is None:
        return plain(f"Trajectory browser of {short(name, 80)}: no epoch yet")
    record = next(epoch for epoch in epochs if epoch.index == shown)
    metrics = record.metrics
    parts = [f"epoch {shown} of {count(len(epochs), 'epoch')}", count(metrics.groups, "group")]
    parts.append(f"{count(metrics.trajectories, 'rollout')}, {metrics.failures:,} failed")
    return plain(f"Trajectory browser of {short(name, 80)}: {', '.join(parts)}")


def browser_html(name: str, epochs: Sequence[Epoch], index: BrowseIndex | None, line: str | None = None) -> Html:
    """What a notebook shows of a browser when no kernel answers.

    Args:
        name: The run's name.
        epochs: Its epochs.
        index: Of the epoch to show; None: there is none yet.
        line: The Python that opens the browser again. None: it is in a page without a kernel.

    Returns:
        The mean rewards by epoch, and the groups whose rewards differ most.
    """
    title = element("div", element("strong", f"Trajectories of {short(name, 80)}"))
    where = "In JupyterLab, with a running kernel, this is a browser: run the cell again, or "
    again = element(
        "div",
        "A static summary. ",
        [where, element("code", line)] if line else "Where scripts run, this is a browser of the rollouts.",
        style="opacity:.8;font-size:12px;margin-top:4px",
    )
    if index is None:
        return element("div", title, element("div", "No epoch has ended yet."), again)
    order = group_order(index, np.ones(len(index), dtype=bool), "spread")
    failed = int((index.flags & FAILED).astype(bool).sum())
    facts = [f"epoch {index.epoch}", count(len(index.examples), "example"), count(len(index), "rollout")]
    facts.append(f"{failed:,} failed")
    rows = [_row(index, int(group)) for group in order[:ROWS]]
    head = element("tr", *(element("th", text, scope="col", style=_CELL) for text in _HEADERS))
    more = len(order) - len(rows)
    table = element(
        "table",
        element("thead", head),
        element("tbody", *rows),
        style="border-collapse:collapse;font-size:13px;margin:4px 0",
    )
    return element(
        "div",
        title,
        _strip(epochs, index.epoch),
        element("div", " · ".join(facts)),
        table,
        element("div", f"and {count(more, 'more example')}") if more > 0 else Html(),
        again,
        class_="mathjax_ignore tex2jax_ignore",
        style="max-width:100%;overflow-x:auto;line-height:1.5",
    )


_HEADERS = ("example", "rewards, by generation", "mean", "spread", "what it teaches")


def _row(index: BrowseIndex, group: int) -> Html:
    """One group: a block for each reward, as high as that is; × where a rollout failed, ○ where it has no reward."""
    start, stop = int(index.starts[group]), int(index.starts[group + 1])
    rewards = [float(each) for each in index.rewards[start:stop]]
    failed = [bool(flag & FAILED) for flag in index.flags[start:stop].tolist()]
    known = [reward for reward in rewards if math.isfinite(reward)]
    low, high = min([0.0, *known]), max([1.0, *known])
    marks = ""
    for reward, lost in zip(rewards[:DOTS], failed, strict=False):
        marks += "×" if lost else _block(reward, low, high)
    if stop - start > DOTS:
        marks += f" +{stop - start - DOTS:,}"
    said = ", ".join("failed" if lost else number(reward) for reward, lost in zip(rewards[:DOTS], failed, strict=False))
    signal = SIGNAL_NAMES[int(index.signals[group])].replace("_", " ")
    return element(
        "tr",
        element("td", one_line(index.examples[group], 60), style=f"{_CELL};font-family:monospace"),
        element("td", marks, title=said, style=f"{_CELL};{_BLOCKS}"),
        element("td", number(float(index.means[group])), style=_NUMBER),
        element("td", number(float(index.spreads[group])), style=_NUMBER),
        element("td", signal, style=_CELL),
    )


def _block(value: float, low: float, high: float) -> str:
    """A character that is as high as the value is between the two; ○ where it is missing."""
    if not math.isfinite(value):
        return "○"
    return BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))]


def _strip(epochs: Sequence[Epoch], shown: int) -> Html:
    """The mean reward of each epoch as a block, and how it went in words."""
    every = max(1, math.ceil(len(epochs) / BARS))
    means = [epoch.metrics.mean_reward for epoch in epochs if math.isfinite(epoch.metrics.mean_reward)]
    if len(means) < 2:
        return Html()
    low, high = min([0.0, *means]), max([1.0, *means])
    blocks = []
    for epoch in epochs[::every]:
        block = _block(epoch.metrics.mean_reward, low, high)
        blocks.append(element("span", block, style=f"color:{_RED}") if epoch.index == shown else block)
    words = f" mean reward by epoch, from {number(means[0])} to {number(means[-1])}"
    return element("div", element("span", *blocks, style=_BLOCKS), words)
