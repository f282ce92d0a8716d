"""The best and the worst rollout of one example side by side, turn by turn, with the place where they part.

Up to there they are the same, so what follows is why one was rewarded and the other was not. Among equal rewards, those
two are taken that stay together longest: the later they part, the more it tells. Pure functions of a RolloutGroup, and one
piece of HTML of at most 200 kB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import Any

from ..errors import RunError
from ..text import count, number, one_line, short, signed
from ..types import DPOItem, EpisodeItem, Trajectory
from ..views.conversation import Setting, Turn, body_of, conversation, fitting, head_of, tool_names, turn_of
from ..views.html import Html, details, element, table, title, view
from ..views.rollout import RolloutGroup
from ..views.tokens import visible

__all__ = [
    "Divergence",
    "GroupComparison",
    "compare_group",
    "first_divergence",
]

VIEW_LIMIT = 180_000
"""Bytes of a whole view; the rest of the 200 kB is for the style sheet and the head."""
CELL_LIMIT, CELL_LEAST = 20_000, 1_200
"""Bytes of one turn in one column, at most and at least."""
CANDIDATES = 16
"""Of the best and of the worst rollouts, how many are tried for the pair that stays together longest."""


@dataclass(frozen=True)
class Divergence:
    """Where two rollouts part."""

    turn: int
    """The first message that is not the same, from 0; where one of them has ended, the other's next one."""
    character: int
    """The first character of it that differs, from 0."""
    token: int | None
    """The first sampled token of it that differs, from 0; None where that is not known."""


@dataclass(frozen=True, eq=False)
class GroupComparison:
    """Two rollouts of one example, to be shown in a cell."""

    group: RolloutGroup
    best: int
    worst: int
    """Places in the group."""
    divergence: Divergence | None
    """None where both say the same."""

    @property
    def trajectories(self) -> tuple[Trajectory, Trajectory]:
        """The best and the worst."""
        return self.group.trajectories[self.best], self.group.trajectories[self.worst]

    def _names(self) -> list[str]:
        return [
            f"{label} · generation {short(self.group.generation(place), 20)} · reward "
            f"{number(self.group.trajectories[place].reward)} · advantage {signed(self.group.advantages[place])}"
            for label, place in (("best", self.best), ("worst", self.worst))
        ]

    def _parting(self) -> str:
        """In a sentence, where they part."""
        best, worst = self.trajectories
        where = self.divergence
        if where is None:
            return "both say the same"
        if where.turn >= min(len(best.episode), len(worst.episode)):
            longer, shorter = ("best", "worst") if len(best.episode) > len(worst.episode) else ("worst", "best")
            return f"they say the same until the {shorter} one ends; the {longer} one goes on at turn {where.turn}"
        turns = [turn_of(trajectory.episode[where.turn]) for trajectory in (best, worst)]
        same = f"the first {count(where.turn, 'turn')} are the same; " if where.turn > 1 else ""
        roles = " against ".join(dict.fromkeys(short(turn.role, 40) for turn in turns))
        if where.token is None:
            return f"{same}they part at turn {where.turn} ({roles}), character {where.character}"
        sides = " against ".join(_choice(turn, where.token) for turn in turns)
        return f"{same}they part at turn {where.turn} ({roles}), token {where.token}: {sides}"

    def __repr__(self) -> str:
        lines = [f"epoch {self.group.epoch} · example {one_line(self.group.example)}", *self._names(), self._parting()]
        lines += [f"{name}: {number(best)} against {number(worst)}" for name, best, worst in self._scores()]
        return "\n  ".join(lines)

    def _scores(self) -> list[tuple[str, Any, Any]]:
        """What the rewards are made of, side by side."""
        found = [(trajectory.metadata or {}).get("scores") for trajectory in self.trajectories]
        best, worst = (scores if isinstance(scores, dict) else {} for scores in found)
        return [
            (short(name, 80), best.get(name), worst.get(name)) for name in list(dict.fromkeys([*best, *worst]))[:24]
        ]

    def _repr_html_(self) -> str:
        names = self._names()
        rewards = [trajectory.reward for trajectory in self.trajectories]
        gained = [signed(self.group.advantages[place]) for place in (self.best, self.worst)]
        rows = [("reward", *rewards), ("advantage", *gained), *self._scores(), *self._lengths()]
        head = [
            title(f"epoch {self.group.epoch}", f"example {short(self.group.example)}"),
            table([(name, number(best), number(worst)) for name, best, worst in rows], ["", "best", "worst"]),
            element("div", element("strong", self._parting())),
        ]
        return view(*head, *self._turns(names, VIEW_LIMIT - sum(len(piece.encode()) for piece in head)))

    def _lengths(self) -> list[tuple[str, Any, Any]]:
        best, worst = ([turn_of(item) for item in trajectory.episode] for trajectory in self.trajectories)
        tokens_best, tokens_worst = (sum(len(turn.tokens) for turn in turns) for turns in (best, worst))
        return [("turns", len(best), len(worst)), ("sampled tokens", tokens_best, tokens_worst)]

    def _turns(self, names: Sequence[str], room: int) -> list[Html]:
        best, worst = ([turn_of(item) for item in trajectory.episode] for trajectory in self.trajectories)
        called = tool_names([*best, *worst])
        same = min(len(best), len(worst)) if self.divergence is None else self.divergence.turn
        shown: list[Html] = []
        if same:
            together = list(conversation(best[:same], min(30_000, room // 4), Setting(tables=False)))
            folded = same > 2
            body = details(f"the first {same:,} turns, which are the same", *together) if folded else together
            shown.append(element("div", body))
        room -= sum(len(piece.encode()) for piece in shown) + 1_000
        pairs = list(zip_longest(best[same:], worst[same:]))
        if not pairs:
            return shown
        limit = max(CELL_LEAST, min(CELL_LIMIT, room // (2 * len(pairs))))
        rows: list[Html] = []
        for place, pair in enumerate(pairs):
            cells = [element("td", self._cell(turn, other, place, limit, called)) for turn, other in (pair, pair[::-1])]
            row = element("tr", *cells)
            room -= len(row.encode())
            if room < 0:
                rows.append(
                    element("tr", element("td", f"… {len(pairs) - place:,} more turns are left out …", colspan=2))
                )
                break
            rows.append(row)
        headers = element("tr", *(element("th", name, scope="col") for name in names))
        return [*shown, element("table", element("thead", headers), element("tbody", *rows), class_="ft-pair")]

    def _cell(self, turn: Turn | None, other: Turn | None, place: int, limit: int, called: dict[str, str]) -> list[Any]:
        """One turn in its column; the first one of each with the part that the other one shares set apart."""
        if turn is None:
            return [element("div", "(ended)", class_="ft-dim")]
        head = head_of(turn, called)
        if place or other is None or turn.role != other.role:
            return [head, *body_of(turn, limit - len(head.encode()), Setting(tables=False))]
        text, otherwise = _said(turn), _said(other)
        shared = _shared(text, otherwise)
        common, rest = text[:shared], text[shared:]
        before = element("span", fitting(common, limit // 3), class_="ft-dim") if common else Html()
        after = fitting(rest, limit - len(before.encode()) - len(head.encode()) - 100) if rest else "(ends here)"
        return [head, element("pre", before, element("mark", "◆"), " ", element("strong", after), dir="auto")]


def compare_group(group: RolloutGroup) -> GroupComparison:
    """The best against the worst of a group, by reward; rollouts without a reward count only where there are no two that
    have one. Raises RunError for a group of fewer than two trajectories."""
    places = group.best_first()
    if len(places) < 2:
        raise RunError(
            f"example {short(group.example, 80)} has {count(len(places), 'trajectory that finished')} in epoch "
            f"{group.epoch}; a comparison needs two. run.show(epoch={group.epoch}, example=...) shows what there is."
        )
    rewards = [trajectory.reward for trajectory in group.trajectories]
    known = [place for place in places if not math.isnan(rewards[place])]
    places = known if len(known) > 1 else places
    high, low = rewards[places[0]], rewards[places[-1]]
    best = list(takewhile(lambda place: _equal(rewards[place], high), places))[:CANDIDATES]
    worst = list(takewhile(lambda place: _equal(rewards[place], low), reversed(places)))[:CANDIDATES]
    pairs = [(a, b) for a in best for b in sorted(worst) if a != b] or [(places[0], places[1])]
    found = {pair: first_divergence(*(group.trajectories[place] for place in pair)) for pair in pairs}

    def togetherness(pair: tuple[int, int]) -> tuple[int, int]:
        where = found[pair]
        return (-1, 0) if where is None else (where.turn, where.character)  # twins tell nothing

    a, b = max(pairs, key=togetherness)
    return GroupComparison(group, a, b, found[a, b])


def first_divergence(a: Trajectory, b: Trajectory) -> Divergence | None:
    """Where two rollouts of one example part: the first turn whose role, text or tool calls differ, and where in it. None
    where they say the same."""
    for place, (one, other) in enumerate(zip(a.episode, b.episode, strict=False)):
        if _essence(one) == _essence(other):
            continue
        x, y = turn_of(one), turn_of(other)
        token = None
        if x.tokens and y.tokens and x.tokens[0].text is not None:
            token = sum(1 for _ in takewhile(lambda pair: pair[0].text == pair[1].text, zip(x.tokens, y.tokens)))  # noqa: B905
        return Divergence(place, _shared(_said(x), _said(y)), token)
    shorter = min(len(a.episode), len(b.episode))
    return None if len(a.episode) == len(b.episode) else Divergence(shorter, 0, None)


def _essence(item: EpisodeItem | DPOItem) -> tuple[Any, ...]:
    if isinstance(item, DPOItem):
        return item.chosen_response, item.rejected_response
    calls = (item.metadata or {}).get("tool_calls") or []
    return str(item.role), item.content, [_named(call) for call in calls] if isinstance(calls, list) else calls


def _named(call: Any) -> Any:
    """A tool call without its id, which differs in every rollout."""
    return call.get("function", call) if isinstance(call, dict) else call


def _said(turn: Turn) -> str:
    """All that a turn says as one text: as it was sampled, where that is known."""
    if turn.tokens and turn.tokens[0].text is not None:
        return "".join(token.text or "" for token in turn.tokens)
    text = turn.content if isinstance(turn.content, str) else ""
    calls = turn.metadata.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return text
    return text + "\n→ calls " + json.dumps([_named(call) for call in calls], ensure_ascii=False, default=str)


def _shared(a: str, b: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # halving: comparing slices is quick, comparing letters in Python is not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _choice(turn: Turn, place: int) -> str:
    if place >= len(turn.tokens):
        return "the end"
    token = turn.tokens[place]
    chance = "" if math.isnan(token.logprob) else f" (p {number(token.probability)})"
    return f"“{visible(token.text, 40)}”{chance}"


def _equal(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= 1e-9 or (math.isnan(a) and math.isnan(b))
