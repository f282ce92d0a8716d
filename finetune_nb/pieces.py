"""What the views of records have in common: titles, facts, scores, lists of examples, and every reason in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .conversation import short
from .html import Html, cut, element, number, plain, table
from .types import EpochMetrics, GroupReason

__all__ = [
    "ERROR_LIMIT",
    "REASONS",
    "SHORT",
    "bad",
    "count",
    "drifted",
    "facts",
    "line",
    "one_line",
    "scores",
    "signed",
    "some",
    "title",
]

ERROR_LIMIT = 2_000
"""Characters shown of an error."""
SHORT = 300
"""Characters shown of an id or a note."""

REASONS = {
    GroupReason.KEPT: "kept",
    GroupReason.NO_REWARD_SPREAD: "left out: their rewards hardly differ",
    GroupReason.BEYOND_PERCENTILE: "left out: beyond the curriculum's percentile",
    GroupReason.SUBSAMPLED: "left out: not drawn in the random subsample",
    GroupReason.NO_REWARD: "left out: no trajectory has a reward",
    GroupReason.INFINITE_REWARD: "left out: a reward is infinite",
    GroupReason.UNDECIDED: "undecided: the epoch ended before groups were chosen",
    GroupReason.NOT_SUBMITTED: "left out by the trainer",
}
"""Every reason in words; they go on from a number of groups."""


def title(*parts: str) -> Html:
    return element("div", element("strong", " · ".join(part for part in parts if part)), class_="ft-title")


def facts(rows: Iterable[tuple[str, Any]]) -> Html:
    """A table of what there is: rows without a value are left out; 0 is a value."""
    given = [row for row in rows if row[1] or (row[1] == 0 and row[1] is not False)]
    return table(given) if given else Html()


def scores(found: Any) -> str:
    """Numbers by name: "correct 1 · length 0.4"."""
    if not isinstance(found, Mapping):
        return ""
    shown = [f"{short(name, 80)} {number(value)}" for name, value in list(found.items())[:24]]
    return " · ".join(shown) + (f" · and {len(found) - 24:,} more" if len(found) > 24 else "")


def some(examples: Sequence[Any], most: int = 5) -> Html:
    """The first of some examples, in brackets."""
    ids = ", ".join(short(example, 40) for example in examples[:most])
    return element("span", f" ({ids}{', …' if len(examples) > most else ''})", class_="ft-dim")


def line(*parts: Any) -> Html:
    return element("div", *parts)


def bad(label: str, text: str) -> Html:
    return element("div", element("strong", label, class_="ft-bad"), element("pre", text, dir="auto"))


def one_line(text: Any, limit: int = SHORT) -> str:
    return " ".join(plain(cut(text, limit)).split())


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def drifted(metrics: EpochMetrics) -> str:
    """How many turns were rendered anew, in words; nothing where none was, or nobody counted."""
    if not metrics.drifted_turns:
        return ""
    of = f"{metrics.drifted_turns:,} of {metrics.continued_turns or 0:,} turns that carry a conversation on"
    return f"{of} were rendered anew instead of behind the sampled ids: each is trained on by itself"


def signed(value: float) -> str:
    """A number with its sign, as an advantage is written."""
    return f"+{number(value)}" if value > 0 else number(value)
