"""Any value as text: plain, cut, numbers, durations."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

__all__ = [
    "SHORT",
    "as_json",
    "beginning",
    "count",
    "cut",
    "duration",
    "kinds_of_errors",
    "most_frequent_error",
    "number",
    "one_line",
    "plain",
    "same_error",
    "short",
    "signed",
    "text_of",
    "told_once",
    "trend",
]


# ── values to text ───────────────────────────────────────────────────────────────────────────────────────────────────

# Characters that are unseen, that reorder or hide their neighbours, or that are no characters at all. Joiners (U+200C,
# U+200D) and variation selectors of emoji stay: scripts and emoji need them. Tag characters (U+E00xx) do not: they are
# a way to hide text from the reader and not from a model.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)


def plain(value: Any) -> str:
    """Any value as one text that can be printed and encoded: control characters as their pictures (␀, ␛), other unseen
    ones, bidi controls and lone surrogates as [U+202E]. Never raises; line breaks and tabs stay."""
    return _UNSEEN.sub(_visible, text_of(value).replace("\r\n", "\n"))


def text_of(value: Any) -> str:
    """Any value as text, as `str` makes it.

    Args:
        value: The value; its `__str__` may be anybody's code.

    Returns:
        Its text. Never raises: if the text cannot be made, it says so.
    """
    try:
        return value if isinstance(value, str) else str(value)
    except BaseException as error:  # SystemExit too: a text must not end a run
        return f"<{type(value).__name__} whose text cannot be made: {type(error).__name__}>"


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"[U+{code:04X}]"


def as_json(value: Any) -> str:
    """Any value as JSON in one line; what JSON has no form for as its text. Never raises."""
    try:
        return json.dumps(value, ensure_ascii=False, default=text_of)
    except (TypeError, ValueError, RecursionError):
        return plain(value)


def cut(value: Any, limit: int) -> str:
    """A text of at most `limit` characters of the value: its beginning and, as the end is often the outcome, its end.
    The note between them says how much is left out and comes on top of the limit."""
    text = text_of(value)
    if len(text) <= limit:
        return text
    tail = limit // 4
    note = f" […{len(text) - limit:,} of {len(text):,} characters left out…] "
    return text[: limit - tail] + note + text[len(text) - tail :]


def number(value: Any, digits: int = 3) -> str:
    """A number to `digits` significant digits; "–" where it is missing (None or NaN)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return "–" if value is None else plain(cut(value, 40))
    if isinstance(value, Integral):
        return f"{int(value):,}" if abs(int(value)) < 10**15 else "beyond ±10¹⁵"
    value = float(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}g}" if abs(value) < 10**digits or abs(value) >= 1e15 else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as "0.52 s", "1 min 05 s" or "2 h 03 min"; "–" where they are missing."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def trend(values: Iterable[float], *, none: str = "no values", lowest: str = "", highest: str = "") -> str:
    """How a series went, from its first value to its last: "from 0.3 to 0.9, highest 1".

    Args:
        values: The series. What is not finite is left out.
        none: The text where nothing is left.
        lowest: The words before the smallest value. Default: it is not named.
        highest: The words before the largest value. Default: it is not named.

    Returns:
        One phrase; of a single value, the value alone.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        return none
    if len(finite) == 1:
        return number(finite[0])
    text = f"from {number(finite[0])} to {number(finite[-1])}"
    if lowest:
        text += f", {lowest} {number(min(finite))}"
    if highest:
        text += f", {highest} {number(max(finite))}"
    return text


SHORT = 300
"""Characters shown of an id or a note."""


def one_line(text: Any, limit: int = SHORT) -> str:
    return " ".join(plain(cut(text, limit)).split())


def beginning(text: Any, limit: int) -> str:
    """The beginning of a text on one line, with "…" if there is more."""
    found = text_of(text)
    line = " ".join(plain(found[: 4 * limit]).split())
    return line if len(line) <= limit and len(found) <= 4 * limit else line[: limit - 1] + "…"


def most_frequent_error(errors: Iterable[Any]) -> str | None:
    """The most frequent of these errors, on one line; None if none is known.

    Errors of one type count together, as each may name its own item; the most frequent of that type is returned.
    """
    kinds: dict[str, Counter[str]] = {}
    for error in errors:
        text = "" if error is None else one_line(error)
        if text:
            kinds.setdefault(text.partition(":")[0], Counter())[text] += 1
    if not kinds:
        return None
    largest = max(kinds.values(), key=lambda found: found.total())
    return largest.most_common(1)[0][0]


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def signed(value: float) -> str:
    """A number with its sign, as an advantage is written."""
    return f"+{number(value)}" if value > 0 else number(value)


def short(value: Any, limit: int = 300) -> str:
    """A name, an id or a note, as text without unseen characters."""
    return plain(cut(value, limit))


# ── errors that are one ──────────────────────────────────────────────────────────────────────────────────────────────

_NUMBER = r"(?<![\d,_])\d[\d,_]{0,20}(?:\.\d{1,20})?(?:e[+-]?\d{1,4})?"
_UNIT = (
    r"(?:[nmuµ]?s|secs?|seconds?|milliseconds?|microseconds?|m|mins?|minutes?|h|hrs?|hours?|days?"
    r"|B|[kKMGT]i?B|[bB]ytes?|(?:kilo|mega|giga)bytes?)(?![A-Za-z])"
)
_VARIES = re.compile(
    "|".join(
        [
            r"\b0x[0-9a-fA-F]+\b",  # an object's address
            r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b",  # a UUID
            r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?",  # a date
            r"\b\d{1,2}:\d\d:\d\d(?:[.,]\d+)?",  # a time of day
            r"\b1[5-9]\d{8}(?:\.\d+)?\b",  # seconds since 1970
            r"\b(?:req|request|run|call|chatcmpl|cmpl|resp|msg|trace|span|session|sess)[_-](?=\w*\d)[A-Za-z0-9_-]{4,}",
            r"(?i:\b(?:request|trace|span|session|correlation|cf-ray)[ _-]?(?:id)?['\"]?\s*[:=#]\s*['\"]?[\w.-]*\d[\w.-]*)",
            r"(?i:\b(?:request|trace|session|correlation)[ _-]id ['\"]?[\w.-]*\d[\w.-]*)",
            r"\b(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{16,}\b",  # any other long id
            r"\b[0-9a-f]*(?:\d[a-f]|[a-f]\d)[0-9a-f]{6,}\b",  # hexadecimal digits
            r"\b\d{12,}\b",  # id(object)
            r"\btmp[a-z0-9_]{8}\b",  # a temporary file's name
            r"\b(?:Task|Thread)-\d+\b",
            r"(?i:\b(?:pid|process)\s*[=:]?\s*\d+)",
            r"(?i:\b(?:time|timeout|elapsed|took|duration|seconds|bytes|size)\s*[=:]\s*" + _NUMBER + ")",
            rf"\b{_NUMBER}(?:\s*(?:of|/|to|-|–)\s*{_NUMBER})?\s*(?:more |expected |total )?{_UNIT}(?:{_NUMBER}{_UNIT})*",
            rf"\b(?:{_NUMBER}[hm])+{_NUMBER}m?s\b",  # 6m30s
            rf"\b{_NUMBER}(?= more expected)",
        ]
    )
)
"""What differs between two texts of one error: addresses, ids, times and numbers of bytes."""
_COMPARED = 4000
"""Characters of an error that are compared."""


def same_error(text: str) -> str:
    """What two texts of one error have in common.

    Args:
        text: An error's text.

    Returns:
        Its beginning without addresses, request ids, UUIDs, times and numbers of bytes. Equal for texts that differ by these
        alone; other numbers, such as a status code, count.
    """
    return _VARIES.sub("…", text[:_COMPARED])


def kinds_of_errors(errors: Iterable[str]) -> list[tuple[str, list[int]]]:
    """Group errors that are one but for an address, an id, a time or a number of bytes.

    Args:
        errors: The errors' texts.

    Returns:
        For each kind the text that came first, and the places of all its errors. The most frequent kind comes first, equally
        frequent ones as they came.
    """
    kinds: dict[str, tuple[str, list[int]]] = {}
    for place, error in enumerate(errors):
        kinds.setdefault(same_error(error), (error, []))[1].append(place)
    return sorted(kinds.values(), key=lambda kind: -len(kind[1]))


def told_once(errors: Iterable[str], most: int = 3) -> str:
    """Each kind of error once, to follow how many there were.

    Args:
        errors: The errors' texts.
        most: How many kinds are named.

    Returns:
        "the first: A" where they are of one kind; else "9 times A; once B; and 2 other errors". Empty without errors.
    """
    kinds = kinds_of_errors(errors)
    if len(kinds) == 1:
        return f"the first: {kinds[0][0]}"
    named = []
    for error, places in kinds[:most]:
        times = "once" if len(places) == 1 else f"{len(places):,} times"
        named.append(f"{times} {error}")
    if len(kinds) > most:
        named.append(f"and {count(len(kinds) - most, 'other error')}")
    return "; ".join(named)
