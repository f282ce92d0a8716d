"""Turns -> HTML: a conversation with its roles, texts and tool calls, in a bounded number of bytes.

Works on messages of any record: the episode of a trajectory, or the calls that a failed rollout made. What stands
around a conversation is made in viewer.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .html import Html, cut, details, element, plain
from .types import DPOItem, EpisodeItem

__all__ = ["Turn", "conversation", "short", "turn_of"]

TURN_LIMIT = 6_000
"""Characters shown of one turn; fewer where there are many turns. As HTML one takes at most 9 bytes."""
SIZE_LIMIT = 130_000
"""Bytes of HTML for the turns of one conversation; leaves room for the head and the style within 200 kB."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message to show, whatever record it comes from."""

    role: str
    content: Any
    metadata: Mapping[str, Any]
    """As in EpisodeItem: tool_calls, tool_call_id, name, finish_reason, conversation."""
    note: str = ""


def turn_of(item: EpisodeItem | DPOItem) -> Turn:
    """A message of an episode, or a preference, to show."""
    if isinstance(item, DPOItem):
        prompt = item.prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{message.role}: {message.content}" for message in prompt)
        text = f"{prompt}\n\n✓ chosen: {item.chosen_response}\n\n✗ rejected: {item.rejected_response}"
        return Turn("preference", text, {})
    note = ""
    if item.role == "assistant":
        sampled = isinstance(item.logprobs, list) and len(item.logprobs)
        note = f"{sampled:,} tokens" if sampled else "" if item.logprobs else "not sampled by the policy"
    return Turn(str(item.role), item.content, item.metadata or {}, note)


def conversation(turns: Sequence[Turn]) -> Iterable[Html]:
    """The turns in SIZE_LIMIT bytes: from the beginning as many as fit, and always the last, which has the outcome."""
    if not turns:
        return
    limit = max(400, min(TURN_LIMIT, SIZE_LIMIT // (2 * len(turns))))
    called: dict[str, str] = {}
    last = len(turns) - 1
    room = SIZE_LIMIT - len(_turn(turns[-1], limit, called).encode())
    for place, turn in enumerate(turns):
        if place and turn.metadata.get("conversation", 0) != turns[place - 1].metadata.get("conversation", 0):
            yield element("div", "— a new conversation —", class_="ft-dim")
        shown = _turn(turn, limit, called)
        room -= len(shown.encode()) if place < last else 0
        if room < 0:
            yield element("p", f"… {last - place:,} of {len(turns):,} turns are left out …", class_="ft-dim")
            yield _turn(turns[-1], limit, called)
            return
        yield shown


def _turn(turn: Turn, limit: int, called: dict[str, str]) -> Html:
    """One turn: at most `limit` characters of its text, and half as many of its tool calls."""
    name = called.get(str(turn.metadata.get("tool_call_id"))) or turn.metadata.get("name")
    finish = turn.metadata.get("finish_reason")
    notes = [
        turn.note,
        finish and ("cut at the token limit" if finish == "length" else f"finish: {short(finish, 40)}"),
    ]
    label = element("strong", short(turn.role, 40), name and f" · {short(name, 80)}")
    head = element("div", label, element("span", *(f" · {note}" for note in notes if note), class_="ft-dim"))
    # dir=auto: right-to-left text is set as such, and does not reorder what stands around it
    text = turn.content if isinstance(turn.content, str) else _json(turn.content) if turn.content else ""
    body = [element("pre", cut(text, limit), dir="auto")] if text else []
    body += _tool_calls(turn.metadata.get("tool_calls"), limit // 2, called)
    if not body:
        body = [element("div", "(empty)", class_="ft-dim")]
    role = turn.role if turn.role in ("assistant", "user", "tool", "system") else "other"
    if turn.role == "system":
        head, body = details(f"system prompt, {len(text):,} characters", *body), []
    return element("div", head, *body, class_=f"ft-turn {role}")


def _tool_calls(calls: Any, limit: int, called: dict[str, str]) -> list[Html]:
    """The calls in about `limit` characters. Notes their names by id, for the results that follow."""
    if not isinstance(calls, list | tuple):
        calls = [calls] if calls else []
    shown: list[Html] = []
    for place, call in enumerate(calls):
        if limit <= 0:
            shown.append(element("div", f"… {len(calls) - place:,} more tool calls …", class_="ft-dim"))
            break
        function = call.get("function") if isinstance(call, Mapping) else None
        name, arguments = "?", call
        if isinstance(function, Mapping):
            name, arguments = short(function.get("name"), 80), function.get("arguments")
            called[str(call.get("id"))] = name
        text = cut(arguments if isinstance(arguments, str) else _json(arguments), limit)
        limit -= len(text) + 200  # the markup counts too
        shown.append(element("div", "→ calls ", element("strong", name), element("pre", text, dir="auto")))
    return shown


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return plain(value)


def short(value: Any, limit: int = 300) -> str:
    """A name, an id or a note, as text without unseen characters."""
    return plain(cut(value, limit))
