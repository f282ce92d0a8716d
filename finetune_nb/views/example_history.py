"""Shows one example over the epochs, as text and HTML: its rewards, and what the best and the worst rollout replied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..analysis.example_history import ExampleHistory
from ..text import count, number, one_line, short, trend
from .html import Html, details, element, sparkline, table, title, view

__all__ = [
    "history_html",
    "history_text",
]

EPOCHS = 200
"""Most epochs shown; the last ones count."""
REPLY = 300
"""Characters of a reply."""


def history_text(history: ExampleHistory) -> str:
    """The history as text: one line an epoch."""
    lines = [f"example {one_line(history.example, 80)}: {_headline(history)}"]
    for epoch, group, best, _ in list(_rows(history))[-EPOCHS:]:
        reply = "" if best is None else f"  {best['trajectory']}: {one_line(_reply(best), 80)}"
        lines.append(f"  epoch {epoch}: {_rewards(group)}{reply}")
    return "\n".join(lines)


def history_html(history: ExampleHistory) -> str:
    """The history as HTML: the course of its mean reward, and a row an epoch."""
    means = history.groups["mean"].tolist()
    body: list[Html] = [title(f"example {short(history.example)}", _headline(history))]
    if len(means) > 1:
        body.append(sparkline(means, f"mean reward over {count(len(means), 'epoch')}: {trend(means)}"))
    rows = []
    for epoch, group, best, worst in list(_rows(history))[-EPOCHS:]:
        kept = "yes" if group["kept"] else "no"
        rows.append((str(epoch), _rewards(group), number(group["spread"]), kept, _cell(best), _cell(worst)))
    body.append(table(rows, ("epoch", "rewards", "spread", "kept", "best reply", "worst reply")))
    if len(means) > EPOCHS:
        body.append(element("div", f"{len(means) - EPOCHS:,} earlier epochs are not shown.", class_="ft-dim"))
    return view(*body)


def _headline(history: ExampleHistory) -> str:
    drawn = count(len(history), "epoch")
    return f"drawn in {drawn}, mean reward {trend(history.groups['mean'].tolist(), none='missing')}"


def _rows(
    history: ExampleHistory,
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]]:
    """Of each epoch: its number, its group, its best and its worst rollout; None if no rollout finished, or just one."""
    by_epoch: dict[int, list[dict[str, Any]]] = {}
    for rollout in history.rollouts.to_dict("records"):
        if not math.isnan(rollout["reward"]):
            by_epoch.setdefault(rollout["epoch"], []).append(rollout)
    for group in history.groups.to_dict("records"):
        ranked = sorted(by_epoch.get(group["epoch"], []), key=lambda rollout: -rollout["reward"])
        best, worst = (ranked[0] if ranked else None), (ranked[-1] if len(ranked) > 1 else None)
        yield group["epoch"], group, best, worst


def _rewards(group: dict[str, Any]) -> str:
    """ "mean 0.5 of 8, 0 to 1, 2 failed"."""
    text = f"mean {number(group['mean'])} of {count(group['trajectories'], 'rollout')}"
    if group["min"] < group["max"]:
        text += f", {number(group['min'])} to {number(group['max'])}"
    return f"{text}, {group['failures']:,} failed" if group["failures"] else text


def _reply(rollout: dict[str, Any]) -> str:
    output = rollout["output"]
    return output if isinstance(output, str) else ""


def _cell(rollout: dict[str, Any] | None) -> Html:
    """A rollout's name, reward and reply; a long reply is folded."""
    if rollout is None:
        return Html()
    name = element("span", f"{short(rollout['trajectory'], 60)} · {number(rollout['reward'])}", class_="ft-dim")
    reply = _reply(rollout)
    if len(reply) <= REPLY:
        return element("div", name, element("div", short(reply, REPLY), dir="auto"))
    return element("div", name, details(short(reply, REPLY // 3), element("pre", short(reply, 10 * REPLY), dir="auto")))
