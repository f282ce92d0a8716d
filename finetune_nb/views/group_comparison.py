"""Shows a comparison of two rollouts as text, and as HTML: side by side, turn by turn, at most 200 kB."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from ..analysis.group_comparison import ComparedRollout, RolloutComparison
from ..analysis.messages import said_text
from ..text import count, number, one_line, short, signed
from ..types import MessageKey, sampled_tokens
from .conversation import (
    Setting,
    Turn,
    body_of,
    border_of,
    conversation,
    fitting,
    has_heat,
    head_of,
    tool_calls,
    tool_names,
    turn_of,
)
from .html import Html, details, element, row, table, title, view
from .tokens import PRE, heat_legend, heat_map, visible

__all__ = [
    "comparison_html",
    "comparison_text",
]

VIEW_LIMIT = 180_000
"""Bytes for the body of the view; the rest of the 200 kB is for the style sheet and the head."""
CELL_LIMIT, CELL_LEAST = 20_000, 1_200
"""Most and fewest bytes for one turn in one column; the turn where the two part may take twice that."""
SCORES = 24
"""Most scores to list."""
PLAIN = Setting(tables=False, legend=False, detail="unlikely")
CELL = "vertical-align:top;text-align:left;padding:0 14px 0 0;width:50%"
"""Inline style of a cell: JupyterLab would centre the shorter turn, and align its text at the right."""


def comparison_text(comparison: RolloutComparison) -> str:
    """The comparison as text: one line per rollout, where they diverge, and their scores."""
    lines = [" · ".join(map(one_line, _heading(comparison))), *_names(comparison), _parting(comparison)]
    for name, best, worst in _scores(comparison):
        lines.append(f"{name}: {number(best)} against {number(worst)}")
    return "\n  ".join(lines)


def comparison_html(comparison: RolloutComparison) -> str:
    """The comparison as HTML: a table of rewards, scores and lengths, where the two diverge, and their turns side by side."""
    rows = [_row("reward", [trajectory.reward for trajectory in comparison.trajectories])]
    rows.append(_row("advantage", [signed(side.advantage) for side in comparison.sides]))
    rows += [_row(name, values) for name, *values in _scores(comparison)]
    rows += _lengths(comparison)
    turns = [turn_of(item) for trajectory in comparison.trajectories for item in trajectory.episode]
    head = [
        title(*_heading(comparison)),
        table(rows, ["rollout", *_sides(comparison)]),
        element("div", element("strong", _parting(comparison))),
        heat_legend("probability", "on hover") if any(map(has_heat, turns)) else Html(),
    ]
    return view(*head, *_turns(comparison, VIEW_LIMIT - _bytes(*head)), wide=True)


def _sides(comparison: RolloutComparison) -> list[str]:
    """What the two are called."""
    return [short(side.name, 60) for side in comparison.sides]


def _row(name: str, values: Sequence[Any]) -> tuple[str, ...]:
    return name, *map(number, values)


def _heading(comparison: RolloutComparison) -> list[str]:
    """Which epochs and examples the two are of."""
    groups = [side.group for side in comparison.sides]
    epochs = list(dict.fromkeys(str(group.epoch) for group in groups))
    examples = list(dict.fromkeys(short(group.example) for group in groups))
    return [f"epoch{'s' * (len(epochs) > 1)} {' and '.join(epochs)}", f"example {' and '.join(examples)}"]


def _names(comparison: RolloutComparison) -> list[str]:
    """One line per rollout: generation, reward and advantage."""
    names = []
    for side in comparison.sides:
        generation = short(side.generation, 20)
        reward, advantage = number(side.trajectory.reward), signed(side.advantage)
        names.append(f"{short(side.name, 60)} · generation {generation} · reward {reward} · advantage {advantage}")
    return names


def _parting(comparison: RolloutComparison) -> str:
    """A sentence that says where they diverge."""
    best, worst = comparison.trajectories
    where = comparison.divergence
    if where is None:
        return "both say the same"
    if where.turn >= min(len(best.episode), len(worst.episode)):
        one, other = map(_called, comparison.sides)
        longer, shorter = (one, other) if len(best.episode) > len(worst.episode) else (other, one)
        return f"they say the same until {shorter} ends; {longer} continues at turn {where.turn}"
    turns = [turn_of(trajectory.episode[where.turn]) for trajectory in (best, worst)]
    same = f"the first {count(where.turn, 'turn')} are the same; " if where.turn > 1 else ""
    roles = " against ".join(dict.fromkeys(short(turn.role, 40) for turn in turns))
    if where.token is None:
        return f"{same}they part at turn {where.turn} ({roles}), character {where.character}"
    if _part_in_calls(where.token, *turns):
        return f"{same}they part at turn {where.turn} ({roles}), in its tool calls"
    sides = " against ".join(_choice(turn, where.token) for turn in turns)
    return f"{same}they part at turn {where.turn} ({roles}), token {where.token}: {sides}"


def _part_in_calls(token: int, best: Turn, worst: Turn) -> bool:
    """Whether all sampled tokens are the same, so that only the calls made of them differ."""
    return token >= max(len(best.tokens), len(worst.tokens))


def _called(side: ComparedRollout) -> str:
    return f"the {side.name} one" if side.name in ("best", "worst") else short(side.name, 60)


def _choice(turn: Turn, place: int) -> str:
    """The token sampled at that position, and its probability."""
    if place >= len(turn.tokens):
        return "the end"
    token = turn.tokens[place]
    chance = "" if math.isnan(token.logprob) else f" (p {number(token.probability)})"
    return f"“{visible(token.text, 40)}”{chance}"


def _scores(comparison: RolloutComparison) -> list[tuple[str, Any, Any]]:
    """(name, score of the best, score of the worst)."""
    both = []
    for trajectory in comparison.trajectories:
        scores = (trajectory.metadata or {}).get("scores")
        both.append(scores if isinstance(scores, dict) else {})
    best, worst = both
    names = list(dict.fromkeys([*best, *worst]))
    return [(short(name, 80), best.get(name), worst.get(name)) for name in names[:SCORES]]


def _lengths(comparison: RolloutComparison) -> list[tuple[str, ...]]:
    turns, tokens = [], []
    for trajectory in comparison.trajectories:
        turns.append(len(trajectory.episode))
        tokens.append(sampled_tokens(trajectory))
    return [_row("turns", turns), _row("sampled tokens", tokens)]


# ── side by side ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _turns(comparison: RolloutComparison, room: int) -> list[Html]:
    """Both conversations in `room` bytes: the shared turns once, then one row per turn, as many as fit."""
    best, worst = ([turn_of(item) for item in trajectory.episode] for trajectory in comparison.trajectories)
    called = tool_names([*best, *worst])
    divergence = comparison.divergence
    same = len(best) if divergence is None else divergence.turn
    shown: list[Html] = []
    if same:
        together = conversation(best[:same], min(30_000, room // 4), PLAIN)
        if same > 2:
            together = [details(f"the first {same:,} turns, which are the same", *together)]
        shown.append(element("div", *together))
    room -= _bytes(*shown) + 1_000

    pairs = list(zip_longest(best[same:], worst[same:]))
    if not pairs:
        return shown
    limit = max(CELL_LEAST, min(CELL_LIMIT, room // (2 * len(pairs) + 2)))
    rows: list[Html] = []
    for place, (best_turn, worst_turn) in enumerate(pairs):
        if place == 0 and best_turn and worst_turn and best_turn.role == worst_turn.role:
            cells = _cells_where_they_part(comparison, best_turn, worst_turn, 2 * limit, called)
        else:
            cells = []
            for turn, side in zip((best_turn, worst_turn), _sides(comparison), strict=True):
                cells.append(_cell(turn, limit, called, same + place, side))
        columns = []
        for turn, cell in zip((best_turn, worst_turn), cells, strict=True):
            bordered = element("div", cell, style=border_of(turn)) if turn else cell
            columns.append(element("td", bordered, style=CELL))
        line = element("tr", columns)
        room -= _bytes(line)
        if room < 0:
            left_out = f"… {len(pairs) - place:,} more turns are left out; {_calls(comparison, same + place)} …"
            rows.append(element("tr", element("td", left_out, colspan=2)))
            break
        rows.append(line)
    headers = element("tr", *(element("th", name, scope="col", style=CELL) for name in _names(comparison)))
    pair = element("table", element("thead", headers), element("tbody", *rows), class_="ft-pair", style=PAIR)
    return [*shown, pair]


PAIR = "width:100%;table-layout:fixed"


def _calls(comparison: RolloutComparison, turn: int) -> str:
    """The calls of `run.show` that show the rest."""
    calls = []
    for side in comparison.sides:
        of = f"epoch={side.group.epoch}, example={one_line(repr(side.group.example), 80)}"
        calls.append(f"run.show({of}, generation={short(side.generation, 20)}, turn={turn})")
    return f"{' and '.join(calls)} show them"


def _cell(turn: Turn | None, limit: int, called: Mapping[str, str], place: int, side: str) -> list[Html]:
    """One turn in a column, in `limit` bytes."""
    if turn is None:
        return [element("div", f"{side} · {place} · (ended)", class_="ft-dim")]
    head = head_of(turn, called, place, side)
    return [head, *body_of(turn, limit - _bytes(head), PLAIN)]


def _cells_where_they_part(
    comparison: RolloutComparison, best: Turn, worst: Turn, limit: int, called: Mapping[str, str]
) -> list[list[Html]]:
    """The first turns that differ, in `limit` bytes each: the shared beginning dimmed, a mark, the rest, and the tool calls."""
    where = comparison.divergence
    assert where is not None
    cells = []
    for turn, trajectory, side in zip((best, worst), comparison.trajectories, _sides(comparison), strict=True):
        head = head_of(turn, called, where.turn, side)
        room = limit - _bytes(head)
        if where.token is None or not has_heat(turn):
            cells.append([head, _parting_text(said_text(trajectory.episode[where.turn]), where.character, room)])
            continue
        common, rest = turn.tokens[: where.token], turn.tokens[where.token :]
        calls = tool_calls(turn.metadata.get(MessageKey.TOOL_CALLS), room // 3)
        room -= _bytes(*calls)
        body = []
        if common:
            body.append(element("div", heat_map(common, room // 3, detail="colours"), class_="ft-dim"))
        body.append(row(MARK, element("strong", " they part here")))
        if rest:
            body.append(heat_map(rest, room - _bytes(*body) - 100, detail=PLAIN.detail))
        elif not _part_in_calls(where.token, best, worst):
            body.append(row("(ends here)"))
        cells.append([head, *body, *calls])
    return cells


MARK = element("mark", "◆")


def _parting_text(text: str, place: int, room: int) -> Html:
    """A text whose tokens are not known: what is shared dimmed, and the rest emphasized."""
    common, rest = text[:place], text[place:]
    before = element("span", fitting(common, room // 3), class_="ft-dim") if common else Html()
    after = fitting(rest, room - _bytes(before) - 200) if rest else "(ends here)"
    return element("pre", before, MARK, " ", element("strong", after), dir="auto", style=PRE)


def _bytes(*pieces: Html) -> int:
    return sum(len(piece.encode()) for piece in pieces)
