"""Values as JSON, also those that JSON does not know; and files of one record a line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_json, to_jsonable_python

from ..redaction import redact_text
from ..types import IntermediateStep, LLMCall
from .durable import append_line, check_plain, write_durably

__all__ = [
    "append_jsonl",
    "decode",
    "decode_steps",
    "encode",
    "encode_all",
    "encode_steps",
    "finite",
    "forget_epochs",
    "masked",
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
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_CALL = "llm_call"
"""The key under which a step's payload says that it was an LLMCall."""


def _nearest(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    tolist = getattr(value, "tolist", None)  # numpy's scalars and arrays
    return tolist() if callable(tolist) else to_jsonable_python(value, fallback=repr, inf_nan_mode="constants")


_lenient = json.JSONEncoder(default=_nearest, separators=(",", ":"))
_strict = json.JSONEncoder(separators=(",", ":"))


def encode(value: Any, strict: bool = False) -> str:
    """JSON text. strict: raises ValueError for what JSON does not know, instead of writing its nearest form."""
    try:
        text = _strict.encode(value) if strict else _quickly(value) or _lenient.encode(value)
    except (TypeError, ValueError, RecursionError) as error:  # a key that is a tuple, a value inside itself
        if strict:
            raise ValueError(f"it is not plain JSON data ({type(error).__name__}: {error})") from None
        text = _lenient.encode(repr(value))
    # Only the strings may be masked: a secret made of digits can be part of a number.
    return text if redact_text(text) == text else _lenient.encode(masked(json.loads(text)))


def encode_all(values: Sequence[Any]) -> Sequence[str | bytes | None]:
    """The JSON text of each value, as text or as ASCII bytes; None for None. Of many small values several times as fast."""
    try:
        texts = [None if value is None else to_json(value, inf_nan_mode="constants") for value in values]
    except (TypeError, ValueError, RecursionError):
        return [None if value is None else encode(value) for value in values]
    together = b"\n".join(filter(None, texts))
    if not together.isascii() or redact_text(whole := together.decode()) != whole:
        return [None if value is None else encode(value) for value in values]
    return texts


def _quickly(value: Any) -> str | None:
    """The same text where that is plain to see, in a third of the time; None where Python's json has to look."""
    try:
        text = to_json(value, inf_nan_mode="constants")
    except (TypeError, ValueError, RecursionError):
        return None
    return text.decode() if text.isascii() else None


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
    """Intermediate steps as JSON; model calls keep all their fields."""
    return encode([_step(step) for step in steps])


def _step(step: IntermediateStep) -> Any:
    plain = to_jsonable_python(step, fallback=repr, inf_nan_mode="constants", serialize_unknown=True)
    call = step.data.payload if step.data else None
    if isinstance(call, LLMCall):
        fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
        plain["payload"]["data"]["payload"] = {_CALL: {**fields, "sampling": dataclasses.asdict(call.sampling)}}
    return plain


def decode_steps(text: Any) -> list[IntermediateStep]:
    """The steps. Raises ValueError where one does not fit."""
    steps = [IntermediateStep.model_validate(plain) for plain in decode(text, list)]
    for step in steps:
        payload = step.data.payload if step.data else None
        if step.data and isinstance(payload, dict) and payload.keys() == {_CALL}:
            step.data.payload = TypeAdapter(LLMCall).validate_python(payload[_CALL])
    return steps
