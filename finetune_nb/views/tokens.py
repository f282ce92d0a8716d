"""Renders sampled tokens as HTML of bounded size: a heat map of how likely each one was, and a table.

Colour is not the only cue: unlikely tokens are also underlined, each token shows its numbers on hover, and a folded table
lists them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

from ..analysis.messages import Token
from ..errors import ConfigError
from ..text import count, cut, number, plain
from .html import Html, details, element, table

__all__ = [
    "Heat",
    "check_heat",
    "heat_legend",
    "heat_map",
    "summary",
    "token_table",
    "visible",
]

Heat = Literal["probability", "entropy"]
"""Which quantity colours a token: how likely it was, or the entropy of the choice."""

_BOUNDS = {"probability": (0.9, 0.6, 0.3, 0.1, 0.02), "entropy": (0.1, 0.4, 0.8, 1.4, 2.0)}
"""Limits of the colour levels: below that probability, or above that many nats."""
TEXT_LIMIT = 200
"""Most characters shown of one token."""
ROW_LIMIT = 60
"""Most rows of a table of tokens."""


def check_heat(heat: str) -> None:
    """Raise ConfigError unless `heat` is one of the names of Heat."""
    if heat not in get_args(Heat):
        raise ConfigError(f"found heat={heat!r}; expected 'probability' or 'entropy'.")


def heat_map(tokens: Sequence[Token], room: int, heat: Heat = "probability") -> Html:
    """The tokens as coloured text, with the numbers of each on hover. If they need more than `room` bytes, the middle is
    left out."""
    spans = [_span(token, heat) for token in tokens[: room // 30]]  # a span has at least 30 bytes
    room -= 120
    if len(spans) < len(tokens) or sum(map(_bytes, spans)) > room:
        # Three quarters of the room are for the beginning, one quarter for the end.
        ends = [_span(token, heat) for token in tokens[-max(1, room // 120) :]]
        head = _how_many_fit(spans, room * 3 // 4)
        tail = _how_many_fit(ends[::-1], room // 4)
        left_out = len(tokens) - head - tail
        note = element("span", f" […{left_out:,} of {len(tokens):,} tokens left out…] ", class_="ft-dim")
        spans = [*spans[:head], note, *ends[len(ends) - tail :]]
    return element("pre", spans, dir="auto", class_="ft-heat")


def _how_many_fit(pieces: Sequence[Html], room: int) -> int:
    """How many of the first pieces fit into `room` bytes."""
    return sum(size <= room for size in accumulate(map(_bytes, pieces)))


def _span(token: Token, heat: Heat) -> Html:
    text = cut(token.text or "", TEXT_LIMIT)
    if text and not text.strip(" \n"):
        text = text.replace("\n", "↵\n")  # otherwise its colour would have no width
    return element("span", text, title=_numbers(token), class_=_tint(token, heat))


def _tint(token: Token, heat: Heat) -> str | None:
    """The CSS class of its colour level, from t1 to t5 (least likely); None for no colour."""
    bounds = _BOUNDS[heat]
    if heat == "probability":
        level = sum(token.probability < bound for bound in bounds)
    else:
        level = sum(token.entropy > bound for bound in bounds)
    return f"t{level}" if level else None


def _numbers(token: Token) -> str:
    parts = [f"p {number(token.probability)}, logprob {number(token.logprob)}"]
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
    """A fold with one row per token: index, text, probability, logprob, and, if they were recorded, the entropy and the likely
    alternatives. Of many tokens, the least likely that fit into `room` bytes."""
    has_entropy = any(not math.isnan(token.entropy) for token in tokens)
    headers = ["#", "token", "probability", "logprob"]
    if has_entropy:
        headers.append("entropy")
    has_alternatives = any(token.alternatives for token in tokens)
    if has_alternatives:
        headers.append("instead")
    least_likely = sorted(range(len(tokens)), key=lambda place: _order(tokens[place].logprob))[:ROW_LIMIT]
    rows = {place: _row(place, tokens[place], has_entropy, has_alternatives) for place in least_likely}

    # If the rows are too large, show as many as would fit if all had the same size.
    size = _bytes(table(rows.values(), headers))
    shown = least_likely
    if size > room - 100:
        shown = least_likely[: len(rows) * max(0, room - 500) // size]
    if not shown:
        return Html()
    title = f"{len(tokens):,} tokens as a table"
    if len(shown) < len(tokens):
        title = f"the {len(shown):,} least likely of {len(tokens):,} tokens"
    return details(title, table([rows[place] for place in sorted(shown)], headers))


def _row(place: int, token: Token, has_entropy: bool, has_alternatives: bool) -> list[Any]:
    row = [place, element("code", visible(token.text, 60)), token.probability, token.logprob]
    if has_entropy:
        row.append(token.entropy)
    if has_alternatives:
        row.append(_alternatives(token, 3))
    return row


def _order(logprob: float) -> float:
    """Sort key: unknown logprobs last."""
    return math.inf if math.isnan(logprob) else logprob


def heat_legend(heat: Heat) -> Html:
    """One line that explains the colours."""
    bounds = _BOUNDS[heat]
    sign = "below" if heat == "probability" else "above"
    what = "probability of the sampled token" if heat == "probability" else "entropy in nats"
    marks = [element("span", f" {sign} {bound:g} ", class_=f"t{level}") for level, bound in enumerate(bounds, 1)]
    return element("div", f"{what}: ", *marks, " · numbers on hover, and in the tables", class_="ft-heat")


def summary(tokens: Sequence[Token]) -> str:
    """The tokens in short: "12 tokens, mean logprob -0.31"."""
    said = count(len(tokens), "token")
    known = [token.logprob for token in tokens if math.isfinite(token.logprob)]
    if not known:
        return said
    return f"{said}, mean logprob {number(math.fsum(known) / len(known))}"


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
