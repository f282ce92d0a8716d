"""Values as JSON, also those that JSON does not know; and files of one record a line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import Enum
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_json, to_jsonable_python

from ..redaction import redact_text
from ..types import IntermediateStep, LLMCall
from ..user_code import contained_call
from .durable import append_line, check_plain, write_durably

__all__ = [
    "FAILED",
    "append_jsonl",
    "attempt",
    "decode",
    "decode_steps",
    "encode",
    "encode_all",
    "encode_steps",
    "finite",
    "forget_epochs",
    "is_plain",
    "masked",
    "note_replaced",
    "noting_replaced",
    "plain",
    "short_text",
    "type_name",
]


def append_jsonl(path: Path, line: Mapping[str, Any]) -> None:
    """Appends one record with its time stamp. NaN is written as null, so that every reader takes it; known secrets are
    masked. Raises OSError, and StoreError for a link in the file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"), **finite(line)}
    append_line(path, encode(record))


def forget_epochs(path: Path, first: int) -> None:
    """Takes the lines of that epoch and later ones out of a log, and a line that was cut off; others stay. Raises StoreError
    for a link in the log's place, OSError."""
    check_plain(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _epoch_of(line) < first]
    if len(kept) < len(lines):
        write_durably(path, lambda file: file.write("".join(kept).encode()))


def _epoch_of(line: str) -> float:
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return -math.inf
    return epoch if isinstance(epoch, int) else -math.inf


def finite(value: Any) -> Any:
    """The same with None for every NaN and infinity, which JSON does not know."""
    return _finite(plain(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_CALL = "llm_call"
"""The key under which a step's payload says that it was an LLMCall."""

DEEPEST = 100
"""Lists and mappings inside each other; Python's own JSON reader ends at a few hundred more."""
_LARGEST_INT = 10**600
"""Python refuses to read longer numbers where `sys.set_int_max_str_digits` is at its minimum, 640."""
_MOST_VALUES = 2_000_000
"""In one value. A list that holds another one twice, and so on sixty times, would fill any memory."""
_TOGETHER = 200
"""Values that are encoded at once: each is looked at several times, and should not have to be fetched from memory again."""
_MOST_CONVERTED = 200_000
"""Of those that JSON does not know, which take longer."""
_MOST_BYTES = 64_000_000
"""In one array, whose text would be several times as large."""
_SHORT = 200
"""Characters of the text that is stored in place of a value."""

_SIMPLE = frozenset({str, float, bool, type(None)})
_TEXT = frozenset({str})
_WHOLE = frozenset({int})
_NESTED = frozenset({dict, list, tuple})
_dumps = json.JSONEncoder(separators=(",", ":")).encode


# ── values that became a text ────────────────────────────────────────────────────────────────────────────────────────

_replaced: ContextVar[dict[str, str] | None] = ContextVar("finetune_nb_replaced_values", default=None)


@contextmanager
def noting_replaced() -> Iterator[dict[str, str]]:
    """Notes which values are replaced inside the block, as what they are has no form in JSON.

    Yields:
        By field, such as "job.metadata.digest": what it was.
    """
    found: dict[str, str] = {}
    token = _replaced.set(found)
    try:
        yield found
    finally:
        _replaced.reset(token)


def note_replaced(field: str, what: str) -> None:
    """Notes that a value of this field is stored as something less.

    Args:
        field: Its name.
        what: What it was.
    """
    found = _replaced.get()
    if found is not None and len(found) < 1000:
        found.setdefault(field, what)


# ── any value -> plain data ──────────────────────────────────────────────────────────────────────────────────────────


def _is_plain(value: Any, depth: int = 0, left: list[int] | None = None) -> bool:
    """Whether the value is what JSON knows and nothing else, so that no code but our own runs when it is encoded.

    Args:
        value: Anything.
        depth: How many lists and mappings it is in.
        left: How many more values are looked at.
    """
    kind = type(value)
    if kind in _SIMPLE:
        return True
    if kind is int:
        return -_LARGEST_INT < value < _LARGEST_INT
    if kind is not dict and kind is not list and kind is not tuple:
        return False
    left = [_MOST_VALUES] if left is None else left
    left[0] -= len(value)
    if depth == DEEPEST or left[0] < 0:
        return False
    if kind is dict:
        if not _TEXT.issuperset(map(type, value)):
            return False
        value = value.values()
    kinds = set(map(type, value))
    if kinds <= _SIMPLE:
        return True
    if kinds == _WHOLE:
        return min(value) > -_LARGEST_INT and max(value) < _LARGEST_INT
    for child in value:
        kind = type(child)
        if kind is int:
            if not -_LARGEST_INT < child < _LARGEST_INT:
                return False
        elif kind not in _SIMPLE and not _is_plain(child, depth + 1, left):
            return False
    return True


def _are_plain(values: Sequence[Any]) -> bool:
    """Whether all values are plain, seen level by level: at each, what all lists and mappings of the level before hold is looked
    at together, which takes a fraction of the time of a look at each. False also where there are too many levels or values
    to see it like that."""
    left = _MOST_VALUES
    for _ in range(DEEPEST):
        kinds = set(map(type, values))
        if int in kinds:
            whole = [value for value in values if type(value) is int]
            if not -_LARGEST_INT < min(whole) <= max(whole) < _LARGEST_INT:
                return False
        nested = kinds - _SIMPLE - _WHOLE
        if not nested:
            return True
        if not nested <= _NESTED:
            return False
        mappings = [value for value in values if type(value) is dict]
        lists = [value for value in values if type(value) is list or type(value) is tuple]
        left -= sum(map(len, mappings)) + sum(map(len, lists))
        if left < 0 or not _TEXT.issuperset(map(type, chain.from_iterable(mappings))):
            return False
        values = list(chain(chain.from_iterable(map(dict.values, mappings)), chain.from_iterable(lists)))
    return False


def is_plain(value: Any) -> bool:
    """Whether the value is what JSON knows and nothing else. Never raises."""
    try:
        return _is_plain(value)
    except Exception:  # a type of a type that cannot be compared; a dict that grows meanwhile
        return False


def _quickly(value: Any) -> bytes | None:
    """The JSON text of plain data, in a third of the time; None where it takes a closer look."""
    try:
        text = to_json(value, inf_nan_mode="constants")
    except Exception:  # half a character, say
        return None
    return text if text.isascii() else None


FAILED = object()
"""What `attempt` returns where it came to nothing."""


def attempt(make: Callable[[Any], Any], value: Any) -> Any:
    """What `make` returns; FAILED where it raises. It may be anybody's code, and raise anything."""
    try:
        return contained_call("the code of a value that is stored", make, value)
    except Exception:
        return FAILED


def type_name(value: Any) -> str:
    """The name of the value's type. Never raises."""
    name = attempt(lambda value: type(value).__name__, value)
    return name if type(name) is str else "object"


def _holds_others(value: Any) -> bool:
    kind = type(value)
    return kind is list or kind is tuple or kind is dict


class _Walk:
    """Makes plain data of any value, field by field."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._left = _MOST_CONVERTED

    def plain(self, value: Any, field: str, depth: int = 0) -> Any:
        """The value where JSON knows it, else its nearest form, else a short text, which is noted.

        Args:
            value: Anything.
            field: Its name.
            depth: How many lists and mappings it is in.
        """
        kind = type(value)
        if value is None or kind is str or kind is float or kind is bool:
            return value
        if kind is int:
            return value if -_LARGEST_INT < value < _LARGEST_INT else self._text(value, field)
        self._left -= 1
        if self._left < 0:
            return self._shorter(value, field, "of too many values")
        if depth > DEEPEST:
            return self._shorter(value, field, "nested too deep")
        if id(value) in self._open:
            return self._shorter(value, field, "inside itself")
        self._open.add(id(value))
        try:
            found = attempt(lambda value: self._nearest(value, field, depth), value)
            return self._text(value, field) if found is FAILED else found
        finally:
            self._open.discard(id(value))

    def _nearest(self, value: Any, field: str, depth: int) -> Any:
        """Raises anything where it has no form in JSON."""
        if isinstance(value, Enum):
            return self.plain(value.value, field, depth + 1)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, bool | float):
            return float.__float__(value) if isinstance(value, float) else value
        if isinstance(value, int):
            return self.plain(int.__int__(value), field, depth + 1)
        if isinstance(value, Mapping):
            return self._mapping(value, field, depth)
        if isinstance(value, BaseModel):
            return self._mapping(_fields_of_model(value), field, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
            return self._mapping(found, field, depth)
        if isinstance(value, set | frozenset):
            return sorted(self._items(value, field, depth), key=_dumps)
        if isinstance(value, list | tuple | deque):
            return self._items(value, field, depth)
        if callable(getattr(value, "tolist", None)) and not isinstance(value, type):  # numpy's scalars and arrays
            nbytes = getattr(value, "nbytes", 0)
            if isinstance(nbytes, int) and nbytes > _MOST_BYTES:
                raise ValueError("an array that is too large")
            return self.plain(value.tolist(), field, depth + 1)
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value).decode()
        if isinstance(value, Iterator):
            raise TypeError("reading it would use it up, and may never end")
        found = to_jsonable_python(value, inf_nan_mode="constants")  # dates, paths, numbers of other kinds
        if not is_plain(found):
            raise TypeError("it has no form in JSON")
        return found

    def _items(self, values: Iterable[Any], field: str, depth: int) -> list[Any]:
        items = list(islice(values, _MOST_VALUES + 1))
        if len(items) <= _MOST_VALUES and not any(map(_holds_others, items)) and is_plain(items):
            return items
        if len(items) > self._left:
            return [self._shorter(values, field, "of too many values")]
        return [self.plain(child, f"{field}[]", depth + 1) for child in items]

    def _mapping(self, value: Mapping[Any, Any], field: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        items = list(islice(value.items(), _MOST_CONVERTED + 1))
        if len(items) > self._left:
            return {"…": self._shorter(value, field, "of too many values")}
        for key, child in items:
            name = key if type(key) is str else self._key(key, field, depth)
            inside = f"{field}.{name[:60]}" if field else name[:60]
            if name in found:
                # 1 and "1" are two keys in Python. None of the values may get lost.
                note_replaced(inside, "several keys with the same text")
                number = 2
                while f"{name} ({number})" in found:
                    number += 1
                name = f"{name} ({number})"
            found[name] = self.plain(child, inside, depth + 1)
        return found

    def _key(self, key: Any, field: str, depth: int) -> str:
        found = self.plain(key, f"a key of {field}" if field else "a key", depth + 1)
        return found if type(found) is str else _dumps(found)

    def _text(self, value: Any, field: str) -> str:
        note_replaced(field, type_name(value))
        return short_text(value)

    def _shorter(self, value: Any, field: str, what: str) -> str:
        """As `_text`, of what may be endless."""
        what = f"{type_name(value)} {what}"
        note_replaced(field, what)
        return f"<{what}>"


def short_text(value: Any) -> str:
    """A short text of a value that has no form in JSON. Never raises. Values that differ have different ones, as far as
    their own texts do: an id may be among them."""
    if type(value) is int and not -_LARGEST_INT < value < _LARGEST_INT:
        data = int.to_bytes(value, value.bit_length() // 8 + 1, "big", signed=True)
        return f"<integer of {value.bit_length():,} bits, sha256 {hashlib.sha256(data).hexdigest()[:16]}>"
    text = attempt(repr, value)
    if text is FAILED:
        return f"<{type_name(value)} whose text cannot be made>"
    text = str.__str__(text)
    if len(text) <= _SHORT:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:_SHORT]} […{len(text):,} characters, sha256 {digest[:16]}]"


def _fields_of_model(model: BaseModel) -> dict[str, Any]:
    fields = type(model).model_fields
    found = {name: getattr(model, name, None) for name in fields if not fields[name].exclude}
    return {**found, **(model.model_extra or {})}


def plain(value: Any, field: str = "") -> Any:
    """Any value as data that JSON knows. Never raises.

    Args:
        value: Anything. What JSON does not know becomes its nearest form (a set a list, an array its numbers, a model its
            fields), and what has none a short text; see `noting_replaced`.
        field: The name of the field, for the note.
    """
    return value if is_plain(value) else _Walk().plain(value, field)


# ── plain data -> text ───────────────────────────────────────────────────────────────────────────────────────────────


def encode(value: Any, strict: bool = False, field: str = "") -> str:
    """The JSON text of a value.

    Args:
        value: Anything, as `plain` takes it.
        strict: Refuse what JSON does not know, instead of writing its nearest form.
        field: As `plain` takes it.

    Raises:
        ValueError: It is not plain JSON data, and that was asked for.
    """
    if not is_plain(value):
        if strict:
            raise ValueError("it is not plain JSON data")
        value = _Walk().plain(value, field)
    quick = _quickly(value)
    text = _dumps(value) if quick is None else quick.decode()
    # Only the strings may be masked: a secret made of digits can be part of a number.
    return text if redact_text(text) == text else _dumps(masked(json.loads(text)))


def encode_all(values: Sequence[Any], field: str = "") -> Sequence[str | bytes | None]:
    """The JSON text of each value, as text or as ASCII bytes; None for None. Of many small values several times as fast."""
    texts: list[str | bytes | None] = []
    for start in range(0, len(values), _TOGETHER):
        texts += _encode_some(values[start : start + _TOGETHER], field)
    return texts


def _encode_some(values: Sequence[Any], field: str) -> Sequence[str | bytes | None]:
    try:
        texts = None
        if _are_plain(values) or all(map(_is_plain, values)):
            texts = [None if value is None else to_json(value, inf_nan_mode="constants") for value in values]
    except Exception:  # as in is_plain and _quickly
        texts = None
    if texts is not None:
        together = b"\n".join(filter(None, texts))
        if together.isascii() and redact_text(whole := together.decode()) == whole:
            return texts
    return [None if value is None else encode(value, field=field) for value in values]


def masked(value: Any) -> Any:
    """Plain data with every known secret masked, in keys too."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {redact_text(key): masked(child) for key, child in value.items()}
    return [masked(child) for child in value] if isinstance(value, list) else value


def decode(text: Any, kind: type | tuple[type, ...] = object) -> Any:
    """The value. Raises ValueError where `text` is no JSON text, or encodes something other than `kind`."""
    if not isinstance(text, str):
        raise ValueError(f"{type(text).__name__} where JSON text was expected")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} where {kind} was expected")
    return value


# ── what a failed rollout had done ───────────────────────────────────────────────────────────────────────────────────


def encode_steps(steps: Sequence[IntermediateStep]) -> str:
    """Intermediate steps as JSON; model calls keep all their fields. A step that could not be read again is left out, and
    noted."""
    found = []
    for step in steps:
        made = attempt(_step, step)
        if made is FAILED or attempt(_step_from, made) is FAILED:
            note_replaced("steps", f"{type_name(step)} that could not be read again")
        else:
            found.append(made)
    return encode(found)


def _step(step: IntermediateStep) -> Any:
    data = step.data
    call = data.payload if data else None
    if data is None or not isinstance(call, LLMCall):
        return plain(step, "steps")
    without = step.payload.model_copy(update={"data": data.model_copy(update={"payload": None})})
    found = plain(step.model_copy(update={"payload": without}), "steps")
    found["payload"]["data"]["payload"] = {_CALL: plain(call, "steps.call")}
    return found


def decode_steps(text: Any) -> list[IntermediateStep]:
    """The steps. Raises ValueError where one does not fit."""
    return [_step_from(found) for found in decode(text, list)]


_call = TypeAdapter(LLMCall)


def _step_from(found: Any) -> IntermediateStep:
    step = IntermediateStep.model_validate(found)
    payload = step.data.payload if step.data else None
    if step.data and isinstance(payload, dict) and payload.keys() == {_CALL}:
        step.data.payload = _call.validate_python(payload[_CALL])
    return step
