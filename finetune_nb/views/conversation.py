"""Renders a conversation as HTML of bounded size, with its roles, texts, tokens and tool calls.

Works on messages from any record: the episode of a trajectory, or the model calls of a failed rollout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from numbers import Real
from typing import Any

from ..analysis.messages import Token, preference_text, tokens_of
from ..llms.chat_messages import content_text
from ..text import as_json, beginning, count, cut, duration, short
from ..types import DPOItem, EpisodeItem, EpisodeItemRole, MessageKey
from .html import ACCENT, FAINT, Html, details, element, escape
from .tokens import PRE, Detail, Heat, heat_legend, heat_map, summary, token_table

__all__ = [
    "SIZE_LIMIT",
    "Setting",
    "Turn",
    "body_of",
    "border_of",
    "conversation",
    "fair_shares",
    "fitting",
    "head_of",
    "missing_entropy",
    "tool_calls",
    "tool_names",
    "turn_of",
]

SIZE_LIMIT = 130_000
"""Bytes of HTML for the turns of one conversation; leaves room for the head and the style sheet within 200 kB."""
LEAST = 600
"""Fewest bytes for a turn, enough for its head and a line of text. Of a conversation with more turns than fit so, the middle is
left out."""
HINT_LIMIT = 600
"""Bytes for the line that says where the rest of a long conversation is shown."""
LEFT_OUT_LIMIT = 400
"""Bytes for the line that counts turns that are left out, and for lines where a new conversation begins."""
FOLDED = 1_500
"""Characters from which a text that the policy did not write is folded."""
NUMBERED = 200
"""Tokens of a conversation up to which every one shows its numbers on hover; of more, those that were unlikely."""

_THINKING = re.compile(r"\A\s*(?:<think(?:ing)?>)?(.*?)</think(?:ing)?>\s*|\A\s*<think(?:ing)?>(.*)\Z", re.DOTALL)
"""Thinking before the answer. Some chat templates open it in the prompt: then only the closing tag is in the reply."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How sampled tokens are displayed."""

    heat: Heat = "probability"
    """Which quantity colours them."""
    tables: bool = True
    """Whether to add a table of their numbers."""
    legend: bool = True
    """Whether to explain the colours at the top."""
    detail: Detail = "every"
    """Which tokens show their numbers on hover."""
    more: str = ""
    """Where the rest is shown, if a text is cut."""
    first: int = 0
    """The number of the first turn."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message to show, from any kind of record."""

    role: str
    content: Any
    metadata: Mapping[str, Any]
    """As in EpisodeItem, by MessageKey; or a chat message in OpenAI's format, which has the same keys."""
    note: str = ""
    tokens: Sequence[Token] = field(default=(), repr=False)
    """The tokens that the policy sampled."""

    def with_changes(self, changes: Sequence[float]) -> Turn:
        """The same with what the logprob of each token has changed by."""
        if len(changes) != len(self.tokens):
            return self
        tokens = [token._replace(change=change) for token, change in zip(self.tokens, changes, strict=True)]
        return replace(self, tokens=tokens, note=summary(tokens))


def turn_of(item: EpisodeItem | DPOItem) -> Turn:
    """The turn to show for a message of an episode, or for a preference."""
    if isinstance(item, DPOItem):
        return Turn("preference", preference_text(item), {})
    if item.role != EpisodeItemRole.ASSISTANT:
        return Turn(str(item.role), item.content, item.metadata or {})
    tokens = tokens_of(item)
    note = ""
    if tokens:
        note = summary(tokens)
    elif not item.logprobs:
        note = "not sampled by the policy"
    return Turn(str(item.role), item.content, item.metadata or {}, note, tokens)


# ── a conversation ───────────────────────────────────────────────────────────────────────────────────────────────────


def conversation(turns: Sequence[Turn], room: int = SIZE_LIMIT, setting: Setting = Setting()) -> list[Html]:
    """Render a conversation: every turn, numbered, and the last one in any case, which has the outcome.

    Short turns stay whole. Long ones are cut, what the policy did not write first; of their tokens the unlikely ones stay.

    Args:
        turns: All turns of the conversation.
        room: Bytes that they may take.
        setting: How sampled tokens are displayed.

    Returns:
        Pieces of HTML, in order.
    """
    if not turns:
        return []
    head: list[Html] = []
    if setting.legend and any(has_heat(turn) for turn in turns):
        head.append(heat_legend(setting.heat))
    missing = missing_entropy(turns) if setting.heat == "entropy" else ""
    if setting.legend and missing:
        head.append(element("div", element("strong", missing), class_="ft-bad"))
    room -= sum(map(_bytes, head)) + HINT_LIMIT + LEFT_OUT_LIMIT
    if setting.detail == "every" and sum(len(turn.tokens) for turn in turns) > NUMBERED:
        setting = replace(setting, detail="unlikely")

    # Render every turn whole, unless it is too long to be read.
    called = tool_names(turns)
    limit = max(LEAST, min(room, 4 * room // len(turns)))
    whole = [_turn(turn, limit, called, setting, setting.first + place) for place, turn in enumerate(turns)]
    sizes = [_bytes(shown) for shown in whole]

    # Count how many from the beginning fit along with the last one, if each were cut to the fewest bytes for a turn.
    last = len(turns) - 1
    least = min(sizes[last], LEAST)
    shown = 0
    while shown < last and least + min(sizes[shown], LEAST) <= room:
        least += min(sizes[shown], LEAST)
        shown += 1

    # These share the room. Cut each turn that needs more than its share.
    places = [*range(shown), last]
    shares = _shares([turns[place] for place in places], [sizes[place] for place in places], room)
    for place, share in zip(places, shares, strict=True):
        if sizes[place] > share:
            whole[place] = _turn(turns[place], share, called, setting, setting.first + place)

    # A cut turn may still exceed its share: leave out turns that do not fit after all.
    room += LEFT_OUT_LIMIT - _bytes(whole[last]) - 100
    body: list[Html] = []
    for place in range(shown):
        begins = _break(turns, place)
        room -= _bytes(begins) + _bytes(whole[place])
        if room < 0:
            shown = place
            break
        body += [begins, whole[place]]
    if shown < last:
        left_out = f"… {last - shown:,} of {count(len(turns), 'turn')} are left out …"
        body.append(element("p", left_out, class_="ft-dim"))
    body += [_break(turns, last), whole[last]]
    if setting.more and (shown < last or any(CUT in piece for piece in body)):
        head.append(element("p", f"Long texts are cut here. {setting.more}", class_="ft-dim"))
    return [*head, *body]


CUT = " left out…] "
"""What a cut text has at the cut."""


def _shares(turns: Sequence[Turn], sizes: Sequence[int], room: int) -> list[int]:
    """Divide the room between turns of these sizes. Where it is too small for all, what the policy did not write gets at most a
    quarter of it."""
    if sum(sizes) <= room:
        return list(sizes)
    others = [place for place, turn in enumerate(turns) if turn.role != "assistant"]
    own = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    all_own = sum(sizes[place] for place in own)
    least_own = sum(min(sizes[place], LEAST) for place in own)
    for_others = min(max(room // 4, room - all_own), room - least_own)

    shares = [0] * len(turns)
    for place, share in zip(others, fair_shares([sizes[place] for place in others], for_others), strict=True):
        shares[place] = share
    for_own = room - sum(shares)
    for place, share in zip(own, fair_shares([sizes[place] for place in own], for_own), strict=True):
        shares[place] = share
    return shares


def _break(turns: Sequence[Turn], place: int) -> Html:
    """A line where a new conversation begins, else nothing."""
    if place and _conversation(turns[place]) != _conversation(turns[place - 1]):
        return element("div", "— a new conversation —", class_="ft-dim")
    return Html()


def _conversation(turn: Turn) -> Any:
    return turn.metadata.get(MessageKey.CONVERSATION, 0)


def fair_shares(needs: Sequence[int], room: int) -> list[int]:
    """Divide `room`: a need below an equal share is met in full, and the others share the rest equally."""
    shares = [0] * len(needs)
    left = len(needs)
    for place in sorted(range(len(needs)), key=needs.__getitem__):
        shares[place] = min(needs[place], max(0, room) // left)
        room -= shares[place]
        left -= 1
    return shares


def missing_entropy(turns: Sequence[Turn]) -> str:
    """Says that turns have no entropy, and why; "" if every sampled turn has one."""
    sampled = [turn for turn in turns if turn.tokens]
    without = [turn for turn in sampled if all(math.isnan(token.entropy) for token in turn.tokens)]
    if sampled and not without:
        return ""
    where = "no turn" if len(without) == len(sampled) else f"{len(without):,} of {len(sampled):,} sampled turns"
    has = "has an entropy" if where == "no turn" else "have no entropy"
    return (
        f"{where} {has}: neither the entropy nor the likely alternatives of the tokens were recorded. Sample with local_grpo "
        "(record_entropy: true, its default), or with an llm that returns alternatives, such as one of type 'openai' with "
        "top_logprobs: 5."
    )


def has_heat(turn: Turn) -> bool:
    """Whether the texts of its tokens are known, so that they can be coloured."""
    return any(token.text is not None for token in turn.tokens)


# ── one turn ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tool_names(turns: Sequence[Turn]) -> dict[str, str]:
    """Names of the called tools by call id, as a tool's result only has the id."""
    names = {}
    for turn in turns:
        for call in _listed(turn.metadata.get(MessageKey.TOOL_CALLS)):
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, Mapping):
                names[str(call.get("id"))] = short(function.get("name"), 80)
    return names


def _turn(turn: Turn, room: int, called: Mapping[str, str], setting: Setting, place: int) -> Html:
    head = head_of(turn, called, place)
    body = body_of(turn, room - _bytes(head) - 250, setting)
    role = turn.role if turn.role in ("assistant", "user", "tool", "system") else "other"
    if turn.role == "system":
        title = f"{place} · system prompt, {len(content_text(turn.content)):,} characters"
        head, body = details(title, *body), []
    return element("div", head, *body, class_=f"ft-turn {role}", style=border_of(turn))


def border_of(turn: Turn) -> str:
    """The inline style of a turn: a line at its left, coloured where the policy speaks."""
    colour = ACCENT if turn.role == "assistant" else FAINT
    return f"border-left:4px solid {colour};padding-left:10px;margin:8px 0"


def head_of(turn: Turn, called: Mapping[str, str], place: int, side: str = "") -> Html:
    """The head of a turn: its number, role and notes.

    Args:
        turn: The turn.
        called: Names of the called tools by call id.
        place: Its number, from 0.
        side: Which of several conversations it belongs to.
    """
    name = called.get(str(turn.metadata.get(MessageKey.TOOL_CALL_ID))) or turn.metadata.get(MessageKey.NAME)
    finish, seconds = turn.metadata.get(MessageKey.FINISH_REASON), turn.metadata.get(MessageKey.SECONDS)
    notes = []
    if turn.note:
        notes.append(f" · {turn.note}")
    if isinstance(seconds, Real) and math.isfinite(seconds):
        notes.append(f" · {duration(float(seconds))}")
    if finish == "length":
        notes.append(" · cut at the token limit")
    elif finish:
        notes.append(f" · finish: {short(finish, 40)}")
    label = element(
        "strong", side and f"{side} · ", f"{place} · {short(turn.role, 40)}", name and f" · {short(name, 80)}"
    )
    return element("div", label, element("span", *notes, class_="ft-dim"))


def body_of(turn: Turn, room: int, setting: Setting = Setting()) -> list[Html]:
    """The body of a turn in about `room` bytes: thinking (folded), then text or tokens, then tool calls."""
    text, calls = content_text(turn.content), _listed(turn.metadata.get(MessageKey.TOOL_CALLS))
    # Servers use two names for it; episodes made here only use the first.
    thought = turn.metadata.get(MessageKey.REASONING_CONTENT) or turn.metadata.get("reasoning")
    # Reserve what the calls may need, but at most a third: a character takes up to 9 bytes as HTML.
    calls_room = 0
    if calls:
        calls_room = min(room // 3, 200 + 9 * sum(len(as_json(call)) for call in calls[:40]))
    room -= calls_room
    body: list[Html] = []
    if isinstance(thought, str) and thought:
        body.append(_thinking(len(thought), [_text(thought, room // 3)], open=not text.strip() and not calls))
        room -= _bytes(body[-1])
    sampled = "".join(token.text or "" for token in turn.tokens)
    if not has_heat(turn):
        body += _written(text, room, turn.role, bool(calls))
    elif text.strip() in sampled:
        # The tokens contain the whole text, and show it as it was sampled.
        body += _sampled(turn.tokens, sampled, room, setting, bool(calls))
    else:
        tokens_room = room // 2
        body += _written(text, room - tokens_room, turn.role, bool(calls))
        if tokens_room:
            body.append(details("as it was sampled", *_sampled(turn.tokens, sampled, tokens_room, setting, True)))
    body += tool_calls(calls, calls_room)
    return body or [element("div", "(empty)", class_="ft-dim")]


def _written(text: str, room: int, role: str, has_calls: bool) -> list[Html]:
    """A text: of the assistant with its thinking folded; of others folded whole if it is long."""
    if not text:
        return []
    if role != "assistant":
        made = _text(text, room - 250)
        if role == "system" or len(text) <= FOLDED or room < FOLDED:
            return [made]
        return [details(f"{beginning(text, 90)} · {len(text):,} characters", made)]
    thinking = _THINKING.match(text)
    if not thinking:
        return [_text(text, room)]
    if thinking[2] is not None:
        return [UNCLOSED, _text(text, room - _bytes(UNCLOSED))]
    answer = text[thinking.end() :]
    shown = [_thinking(len(thinking[1]), [_text(thinking[1], room // 2)], open=not answer and not has_calls)]
    return [*shown, _text(answer, room - _bytes(shown[0]))] if answer else shown


def _sampled(tokens: Sequence[Token], text: str, room: int, setting: Setting, has_calls: bool) -> list[Html]:
    """The tokens as a heat map, with thinking folded, and as a table."""
    numbers = token_table(tokens, min(3_000, room // 8)) if setting.tables else Html()
    heat, detail = setting.heat, setting.detail
    room -= _bytes(numbers)
    thinking = _THINKING.match(text)  # only assistants have tokens
    if not thinking:
        return [heat_map(tokens, room, heat, detail), numbers]
    if thinking[2] is not None:
        return [UNCLOSED, heat_map(tokens, room - _bytes(UNCLOSED), heat, detail), numbers]
    ends = list(accumulate(len(token.text or "") for token in tokens))
    thought = sum(end <= thinking.end() for end in ends)
    is_all = not has_calls and not text[thinking.end() :].strip()
    inside = heat_map(tokens[:thought], room if is_all else room // 2, heat, detail)
    shown = [_thinking(len(thinking[1]), [inside], open=is_all)]
    if thought < len(tokens):
        shown.append(heat_map(tokens[thought:], room - _bytes(shown[0]), heat, detail))
    return [*shown, numbers]


UNCLOSED = element("div", "thinking that never ends:", class_="ft-dim")
"""Before a reply without an answer: it is not folded, as there is nothing else to read."""


def _thinking(characters: int, body: Sequence[Html], open: bool) -> Html:
    """A thought, folded unless it is all that was said."""
    return details(f"thinking, {characters:,} characters", *body, open=open)


def tool_calls(calls: Any, room: int) -> list[Html]:
    """The tool calls of a message, as it has them, in about `room` bytes."""
    shown: list[Html] = []
    calls = _listed(calls)
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name, arguments = "?", call
        if isinstance(function, Mapping):
            name, arguments = short(function.get("name"), 80), function.get("arguments")
        text = _text(arguments if isinstance(arguments, str) else as_json(arguments), max(300, room - 300))
        if shown and len(text.encode()) + 300 > room:
            shown.append(element("div", f"… {len(calls) - place:,} more tool calls …", class_="ft-dim"))
            break
        shown.append(element("div", "→ calls ", element("strong", name), text))
        room -= len(shown[-1].encode())
    return shown


def _text(text: str, room: int) -> Html:
    # dir=auto: right-to-left text is displayed as such, and does not reorder its surroundings.
    return element("pre", fitting(text, room - 80), dir="auto", style=PRE)


def fitting(text: str, room: int) -> str:
    """Cut a text so that it takes about `room` bytes as HTML, but to no fewer than 100 characters.

    The size depends on the characters: "<" takes 4 bytes, an invisible character up to 9.
    """
    limit = max(100, room)
    shown = cut(text, limit)
    while limit > 100 and (size := len(escape(shown).encode())) > room:
        limit = max(100, min(limit - 1, limit * max(room, 0) // size))
        shown = cut(text, limit)
    return shown


def _listed(calls: Any) -> list[Any]:
    """Tool calls as a list: third-party records may have a single call, or none."""
    if isinstance(calls, list | tuple):
        return list(calls)
    return [calls] if calls else []


def _bytes(markup: str) -> int:
    return len(markup.encode())
