"""Shows recorded rollouts under another reward, as text and HTML: what changes, and the rollouts that moved most."""

from __future__ import annotations

import math

from ..analysis.rescoring import MOVED, Rescoring
from ..rewards.numbers import mean
from ..text import count, number, one_line, signed
from ..training.metrics import advantages
from .conversation import conversation, turn_of
from .html import Html, details, element, table, title, view

__all__ = [
    "rescoring_html",
    "rescoring_text",
]

EPOCHS = 20
"""Most epochs in the table; the last ones count."""
CONVERSATION_LIMIT = 12_000
"""Bytes of a conversation."""


def rescoring_text(rescoring: Rescoring) -> str:
    """The rescoring as text: a headline, then one line an epoch."""
    lines = [_headline(rescoring)]
    for epoch, before, after, gained, lost, flips in _numbers(rescoring):
        lines.append(
            f"epoch {epoch}: mean reward {number(before)} -> {number(after)}, spread gained in {count(gained, 'group')}, lost in "
            f"{lost:,}, {count(flips, 'pair')} of rollouts in another order"
        )
    return "\n".join(lines)


def rescoring_html(rescoring: Rescoring) -> str:
    """The rescoring as HTML: a row an epoch, and the rollouts whose advantage changed most with their conversations."""
    found = _numbers(rescoring)
    rows = []
    for epoch, before, after, gained, lost, flips in found[-EPOCHS:]:
        rows.append((epoch, number(before), number(after), f"{gained:,}", f"{lost:,}", f"{flips:,}"))
    head = ("epoch", "mean reward", "new", "groups that gain spread", "that lose it", "pairs in another order")
    body: list[Html] = [title(f"{one_line(rescoring.run, 60)}, scored anew", _headline(rescoring)), table(rows, head)]
    if len(found) > EPOCHS:
        body.append(element("div", f"{len(found) - EPOCHS:,} earlier epochs are not shown.", class_="ft-dim"))
    body += _moved(rescoring)
    return view(*body)


def _headline(rescoring: Rescoring) -> str:
    rollouts = sum(len(epoch.after.rewards) for epoch in rescoring.epochs)
    before, after = rescoring.rewards_missing
    facts = [
        count(rollouts, "rollout"),
        f"spread gained in {count(rescoring.gained, 'group')}, lost in {rescoring.lost:,}",
    ]
    if before or after:
        facts.append(f"rewards missing {before:,} -> {after:,}")
    return "; ".join(facts)


def _numbers(rescoring: Rescoring) -> list[tuple[int, float, float, int, int, int]]:
    """Of each epoch: its number, the mean reward before and after, groups that gain and lose spread, pairs that flip."""
    found = []
    for epoch in rescoring.epochs:
        old = [value for value in epoch.before.rewards.tolist() if math.isfinite(value)]
        new = [value for value in epoch.after.rewards.tolist() if math.isfinite(value)]
        before, after = epoch.teaches
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        found.append((epoch.index, mean(old), mean(new), gained, lost, int(epoch.flips.sum())))
    return found


def _moved(rescoring: Rescoring) -> list[Html]:
    moved = rescoring.most_moved(MOVED)
    if not moved:
        return [element("div", "No rollout's advantage changes.", class_="ft-dim")]
    parts = [title("moved most", "the rollouts whose advantage changes most")]
    for epoch, place in moved:
        before, after = (float(each.rewards[place]) for each in (epoch.before, epoch.after))
        was, will_be = (float(advantages(each)[place]) for each in (epoch.before, epoch.after))
        summary = [
            element("strong", one_line(epoch.names[place], 60)),
            f" reward {_reward(before)} → {_reward(after)}, advantage {_advantage(was)} → {_advantage(will_be)}",
        ]
        trajectory = rescoring.trajectory(epoch.index, place)
        turns = [turn_of(item) for item in trajectory.episode]
        parts.append(details(summary, *conversation(turns, CONVERSATION_LIMIT)))
    return parts


def _reward(value: float) -> str:
    return "none" if math.isnan(value) else number(value)


def _advantage(value: float) -> str:
    return "none" if math.isnan(value) else signed(value)
