"""Renders sampled tokens as HTML of bounded size: a heat map of how likely each one was, and a table.

Colour is not the only cue: unlikely tokens are also underlined, tokens show their numbers on hover, and a folded table lists
them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

from ..analysis.messages import Token
from ..errors import ConfigError
from ..text import count, cut, number, plain, signed
from .html import Html, details, element, escape, table

__all__ = [
    "Detail",
    "Heat",
    "PRE",
    "check_heat",
    "heat_legend",
    "heat_map",
    "summary",
    "token_table",
    "visible",
]

Heat = Literal["probability", "entropy", "change"]
"""Which quantity colours a token: how likely it was, the entropy of the choice, or how its logprob has changed under other
weights."""

_BOUNDS = {
    "probability": (0.9, 0.6, 0.3, 0.1, 0.02),
    "entropy": (0.1, 0.4, 0.8, 1.4, 2.0),
    "change": (0.1, 0.3, 0.7, 1.5, 3.0),
}
"""Limits of the colour levels: below that probability, above that many nats, or beyond that many in either direction."""
TINTS = (
    None,
    "background:#d602",
    "background:#d604",
    "background:#d606",
    "background:#d608",
    "background:#d60a;border-bottom:2px solid",
)
"""Inline styles of the colour levels: translucent, so that they are seen on light and dark pages."""
MORE_LIKELY = (
    None,
    "background:#07c2",
    "background:#07c4",
    "background:#07c6",
    "background:#07c8",
    "background:#07ca;border-bottom:2px dotted",
)
"""The same for levels below 0: the token has become more likely."""
UNDERLINED = 4
"""The first level that is underlined too."""
PRE = "white-space:pre-wrap;word-break:normal"
"""Inline style of a text: JupyterLab would break its lines inside of words."""
Detail = Literal["every", "unlikely", "colours"]
"""Which tokens show their numbers on hover: every one, those with a colour, or none."""
DETAILS: tuple[Detail, ...] = get_args(Detail)
TEXT_LIMIT = 200
"""Most characters shown of one token."""
ROW_LIMIT = 20
"""Most rows of a table of tokens."""
AROUND = 8
"""Tokens shown before and after an unlikely one, where not all can be."""
TINT_BYTES, NOTE_BYTES = 46, 100
"""About what a colour takes, and a note that tokens are left out."""


def check_heat(heat: str) -> None:
    """Raise ConfigError unless `heat` is one of the names of Heat."""
    if heat not in get_args(Heat):
        raise ConfigError(f"found heat={heat!r}; expected 'probability', 'entropy' or 'change'.")


def heat_map(tokens: Sequence[Token], room: int, heat: Heat = "probability", detail: Detail = "every") -> Html:
    """The tokens as coloured text, with numbers on hover.

    Args:
        tokens: The tokens, in order.
        room: Bytes that the result may take. Where they are few, first the numbers go, then faint colours, and then the middle
            of the text; around its least likely tokens it stays.
        heat: Which quantity colours them.
        detail: Which tokens have numbers, where there is room for all.
    """
    room = max(200, room - 90)  # without the element around them
    levels = [_level(token, heat) for token in tokens]
    texts = [_shown(token) for token in tokens]
    everything = range(len(tokens))
    for each in DETAILS[DETAILS.index(detail) :]:
        pieces = _pieces(tokens, texts, levels, everything, each)
        if sum(map(_bytes, pieces)) <= room:
            return _heated(pieces)

    # The text comes before faint colours.
    room -= _bytes(FAINT_LEFT_OUT)
    for faint in (1, 2, 3):
        levels = [level if abs(level) > faint else 0 for level in levels]
        pieces = _pieces(tokens, texts, levels, everything, "colours")
        if sum(map(_bytes, pieces)) <= room:
            return _heated([*pieces, FAINT_LEFT_OUT])
    pieces = []
    end = 0
    for part in _kept(tokens, texts, levels, room):
        if part.start > end:
            pieces.append(_left_out(part.start - end, len(tokens)))
        pieces += _pieces(tokens, texts, levels, part, "colours")
        end = part.stop
    if end < len(tokens):
        pieces.append(_left_out(len(tokens) - end, len(tokens)))
    return _heated([*pieces, FAINT_LEFT_OUT])


FAINT_LEFT_OUT = element("span", " […faint colours left out…] ", class_="ft-dim")


def _heated(pieces: Sequence[Html]) -> Html:
    return element("pre", list(pieces), dir="auto", class_="ft-heat", style=PRE)


def _left_out(number_: int, total: int) -> Html:
    return element("span", f" […{number_:,} of {total:,} tokens left out…] ", class_="ft-dim")


def _pieces(
    tokens: Sequence[Token], texts: Sequence[str], levels: Sequence[int], places: range, detail: Detail
) -> list[Html]:
    """The tokens at those places as HTML. Neighbours that look alike share an element, unless they have numbers of their own."""
    pieces: list[Html] = []
    start = places.start
    while start < places.stop:
        level, stop = levels[start], start + 1
        if detail == "every" or (detail == "unlikely" and level):
            title = _numbers(tokens[start])
        else:
            title = None
            while stop < places.stop and levels[stop] == level:
                stop += 1
        text = "".join(texts[start:stop])
        pieces.append(_coloured(text, level, title))
        start = stop
    return pieces


def _coloured(text: str, level: int, title: str | None = None) -> Html:
    """A text in the colour of that level. The least likely are also underlined."""
    if not level and title is None:
        return escape(text)
    style = TINTS[level] if level >= 0 else MORE_LIKELY[-level]
    return element("u" if level >= UNDERLINED else "span", text, title=title, style=style)


def _kept(tokens: Sequence[Token], texts: Sequence[str], levels: Sequence[int], room: int) -> list[range]:
    """Which tokens to show in `room` bytes: half of it for the beginning, a quarter for the end, and the rest for the least
    likely ones between these, with their surroundings."""
    sizes = [_bytes(escape(text)) + (TINT_BYTES if level else 0) for text, level in zip(texts, levels, strict=True)]
    ends = list(accumulate(sizes, initial=0))
    head = bisect_right(ends, room // 2) - 1
    tail = max(head, bisect_left(ends, ends[-1] - room // 4))
    kept = bytearray(len(tokens))
    kept[:head] = b"\1" * head
    kept[tail:] = b"\1" * (len(tokens) - tail)
    left = room - room // 2 - room // 4
    for place in sorted(range(head, tail), key=lambda place: _order(tokens[place])):
        if left < NOTE_BYTES:
            break
        near = [at for at in range(max(head, place - AROUND), min(tail, place + AROUND + 1)) if not kept[at]]
        cost = sum(sizes[at] for at in near) + NOTE_BYTES
        if near and cost <= left:
            left -= cost
            for at in near:
                kept[at] = 1

    parts: list[range] = []
    for place in range(len(tokens)):
        if kept[place]:
            begins = parts.pop().start if parts and parts[-1].stop == place else place
            parts.append(range(begins, place + 1))
    return parts


def _shown(token: Token) -> str:
    text = cut(token.text or "", TEXT_LIMIT)
    if text and not text.strip(" \n"):
        text = text.replace("\n", "↵\n")  # otherwise its colour would have no width
    return text


def _level(token: Token, heat: Heat) -> int:
    """Its colour level, from 1 to 5 (least likely, or much less likely than it was); 0 for no colour; down to -5 for one that has
    become more likely."""
    bounds = _BOUNDS[heat]
    if heat == "change":
        level = sum(abs(token.change) > bound for bound in bounds)
        return -level if token.change > 0 else level
    if heat == "probability":
        return sum(token.probability < bound for bound in bounds)
    return sum(token.entropy > bound for bound in bounds)


def _numbers(token: Token) -> str:
    parts = [f"p {number(token.probability)}, logprob {number(token.logprob)}"]
    if not math.isnan(token.change):
        parts.append(f"changed by {signed(token.change)}")
    if not math.isnan(token.entropy):
        parts.append(f"entropy {number(token.entropy)}")
    if token.alternatives:
        parts.append(f"instead {_alternatives(token, 3)}")
    return ", ".join(parts)


def _alternatives(token: Token, most: int) -> str:
    """The likely alternatives, with their probabilities."""
    said = []
    for text, logprob in token.alternatives[:most]:
        probability = math.exp(min(logprob, 0.0))
        said.append(f"{visible(text, 40)} {number(probability, 2)}")
    return " · ".join(said)


def token_table(tokens: Sequence[Token], room: int) -> Html:
    """A fold with one row per token: index, text, probability, logprob, and, if they are known, the change, the entropy and the
    likely alternatives. Of many tokens, the least likely that fit into `room` bytes; of those with a change, the most changed."""
    has_change = any(not math.isnan(token.change) for token in tokens)
    has_entropy = any(not math.isnan(token.entropy) for token in tokens)
    headers = ["#", "token", "probability", "logprob"]
    if has_change:
        headers.append("change")
    if has_entropy:
        headers.append("entropy")
    has_alternatives = any(token.alternatives for token in tokens)
    if has_alternatives:
        headers.append("instead")
    first = sorted(range(len(tokens)), key=lambda place: _order(tokens[place]))[:ROW_LIMIT]
    rows = {place: _row(place, tokens[place], has_change, has_entropy, has_alternatives) for place in first}

    # If the rows are too large, show as many as would fit if all had the same size.
    size = _bytes(table(rows.values(), headers))
    shown = first
    if size > room - 100:
        shown = first[: len(rows) * max(0, room - 500) // size]
    if not shown:
        return Html()
    title = f"{len(tokens):,} tokens as a table"
    if len(shown) < len(tokens):
        which = "most changed" if has_change else "least likely"
        title = f"the {len(shown):,} {which} of {len(tokens):,} tokens"
    return details(title, table([rows[place] for place in sorted(shown)], headers))


def _row(place: int, token: Token, has_change: bool, has_entropy: bool, has_alternatives: bool) -> list[Any]:
    row = [place, element("code", visible(token.text, 60)), token.probability, token.logprob]
    if has_change:
        row.append(signed(token.change))
    if has_entropy:
        row.append(token.entropy)
    if has_alternatives:
        row.append(_alternatives(token, 3))
    return row


def _order(token: Token) -> float:
    """Sort key: the most changed first or, where nobody has asked for changes, the least likely; unknown logprobs last."""
    if not math.isnan(token.change):
        return -abs(token.change)
    return math.inf if math.isnan(token.logprob) else token.logprob


def heat_legend(heat: Heat, numbers: str = "on hover, and in the tables") -> Html:
    """One line that explains the colours. numbers: where the tokens' numbers stand."""
    bounds = _BOUNDS[heat]
    if heat == "change":
        less = [_coloured(f" -{bound:g} ", level) for level, bound in enumerate(bounds, 1)]
        more = [_coloured(f" +{bound:g} ", -level) for level, bound in enumerate(bounds, 1)]
        said = "change of the log probability, in nats: less likely"
        return element("div", f"{said} ", *less, ", more likely ", *more, f" · numbers {numbers}", class_="ft-heat")
    sign = "below" if heat == "probability" else "above"
    what = "probability of the sampled token" if heat == "probability" else "entropy in nats"
    marks = [_coloured(f" {sign} {bound:g} ", level) for level, bound in enumerate(bounds, 1)]
    return element("div", f"{what}: ", *marks, f" · numbers {numbers}", class_="ft-heat")


def summary(tokens: Sequence[Token]) -> str:
    """The tokens in short: "12 tokens, mean logprob -0.31"."""
    said = count(len(tokens), "token")
    known = [token.logprob for token in tokens if math.isfinite(token.logprob)]
    if not known:
        return said
    said += f", mean logprob {number(math.fsum(known) / len(known))}"
    changes = [token.change for token in tokens if math.isfinite(token.change)]
    return f"{said}, changed by {signed(math.fsum(changes) / len(changes))}" if changes else said


def visible(text: str | None, limit: int) -> str:
    """A token's text with visible whitespace."""
    if text is None:
        return "–"
    text = plain(cut(text, limit)).replace("\n", "↵").replace("\t", "⇥")
    if not text.strip(" "):
        return "␣" * len(text)
    leading, trailing = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return "␣" * leading + text.strip(" ") + "␣" * trailing


def _bytes(markup: str) -> int:
    return len(markup.encode())
