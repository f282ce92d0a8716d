"""Demonstrations: conversations read from rows, which somebody else has written. A row that is none becomes an error with its
number, and the others are read all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import FinetuneError
from ..redaction import redact_text
from ..text import cut, short
from ..types import Demonstration, Demonstrations, RowError
from .datasets import read_rows

__all__ = [
    "read_demonstrations",
    "row_error",
]

ERROR_LIMIT = 300
"""Most characters of what is wrong with a row."""
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


class NoDemonstration(FinetuneError):
    """A row is no conversation that can be learned."""


def read_demonstrations(source: Any, held_out: bool = False) -> Demonstrations:
    """Read conversations.

    Args:
        source: Rows with `messages` and, where there are any, `tools`: a list of dicts or of lists of messages, a DataFrame, a
            Dataset of Hugging Face, or a JSON, JSONL or Parquet file.
        held_out: Whether they are held out, for the errors.

    Returns:
        What could be read, and what is wrong with the rest.

    Raises:
        DatasetError: It is nothing of the kind, or a file that cannot be read.
    """
    if isinstance(source, Iterator):
        source = list(source)
    rows = source if isinstance(source, list | tuple) else read_rows(source)
    found: list[Demonstration] = []
    errors: list[RowError] = []
    for place, row in enumerate(rows):
        try:
            found.append(_demonstration(place, row))
        except NoDemonstration as error:
            errors.append(row_error(place, error, held_out))
    return Demonstrations(found, errors)


def row_error(row: int, error: Exception, held_out: bool = False) -> RowError:
    """What is wrong with a row. Its texts are somebody else's: they are cut, and have no secrets."""
    return RowError(row, cut(redact_text(str(error)), ERROR_LIMIT), held_out)


def _demonstration(place: int, row: Any) -> Demonstration:
    """Raises NoDemonstration."""
    tools = None
    if isinstance(row, Mapping):
        if "messages" not in row:
            raise NoDemonstration(f"the row has no messages; it has {short(sorted(map(str, row)), 80)}")
        row, tools = row["messages"], _listed(row.get("tools"), "tools")
    messages = [_message(number, each) for number, each in enumerate(_listed(row, "messages") or ())]
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise NoDemonstration("no message of the assistant is to be learned")
    return Demonstration(place, messages, tools or None)


def _listed(value: Any, what: str) -> list[Any] | None:
    """A list, also where it comes as an array of a table or as JSON text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None if not value.strip() else value
    if value is None or isinstance(value, list | tuple):
        return None if value is None else list(value)
    raise NoDemonstration(f"{what} is a {type(value).__name__}; expected a list")


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message without the empty fields that tables give it. Raises NoDemonstration."""
    if not isinstance(message, Mapping):
        raise NoDemonstration(
            f"message {number} is a {type(message).__name__}; expected an object with role and content"
        )
    found = {str(key): value for key, value in message.items() if value is not None}
    if "tool_calls" in found:
        found["tool_calls"] = _listed(found["tool_calls"], f"tool_calls of message {number}")
        if not found["tool_calls"]:
            del found["tool_calls"]
    if found.get("role") not in ROLES:
        raise NoDemonstration(
            f"message {number} has the role {short(found.get('role'), 40)}; expected one of {', '.join(sorted(ROLES))}"
        )
    if "content" not in found and "tool_calls" not in found:
        raise NoDemonstration(f"message {number} has neither content nor tool_calls")
    found.setdefault("content", None)
    if found.get("weight", 1) not in (0, 1):
        raise NoDemonstration(f"message {number} has the weight {short(found['weight'], 40)}; expected 0 or 1")
    return found
