"""Values as an Arrow array, and an array as values: numbers in the narrowest type that holds them, texts without secrets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from ..redaction import redact_texts
from .json import encode_all
from .nearest import all_of, is_whole, stored_text

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "array_of",
    "arrow_type",
    "counts_of",
    "is_utf8",
    "json_of",
    "lists_of",
    "of_doubles_or_longs",
    "offsets_of",
    "texts_of",
    "to_python",
]


def arrow_type(name: str) -> Any:
    """The type that Arrow calls that: "list<int64>"."""
    import pyarrow as pa

    if name.startswith("list<"):
        return pa.list_(arrow_type(name.removeprefix("list<").removesuffix(">")))
    return pa.type_for_alias(name)


def array_of(values: Sequence[Any], type: str) -> pa.Array:
    """The values as an array of the type that `arrow_type` knows by that name."""
    import pyarrow as pa

    return pa.array(values, arrow_type(type))


def lists_of(values: Sequence[Any], kind: type, narrowest: str = "float32") -> tuple[list[Any], pa.Array]:
    """The values that are lists of `kind` and nothing else (None for all others), and the column of them. narrowest: the type
    for floats that it holds exactly."""
    import numpy as np
    import pyarrow as pa

    lists = [value if type(value) is list else None for value in values]
    try:
        flat = _flat(lists, kind, narrowest)
    except (TypeError, OverflowError, UnicodeError):
        # Some list has an entry that does not fit: find out which ones.
        lists = [value if value is not None and _fits(value, kind) else None for value in lists]
        flat = _flat(lists, kind, narrowest)
    absent = np.fromiter((value is None for value in lists), bool, len(lists))
    offsets = offsets_of([len(value or ()) for value in lists])
    return lists, pa.ListArray.from_arrays(offsets, flat, mask=pa.array(absent))


def _fits(value: list[Any], kind: type) -> bool:
    try:
        _flat([value], kind)
    except (TypeError, OverflowError, UnicodeError):
        return False
    return True


def _flat(lists: Sequence[list[Any] | None], kind: type, narrowest: str = "float32") -> pa.Array:
    """All entries, one list after another, in the narrowest type that holds them exactly."""
    import numpy as np
    import pyarrow as pa

    entries = list(chain.from_iterable(filter(None, lists)))
    if not {kind}.issuperset(map(type, entries)):
        raise TypeError
    if kind is str:
        return pa.array(entries, pa.string())
    if kind is int:
        whole = np.fromiter(entries, np.int64, len(entries))
        narrow = whole.astype(np.int32)
    else:
        whole = np.fromiter(entries, np.float64, len(entries))
        with np.errstate(over="ignore"):
            narrow = whole.astype(narrowest)
    exact = np.array_equal(narrow, whole, equal_nan=kind is float)
    return pa.array(narrow if exact else whole, from_pandas=False)


def offsets_of(sizes: Sequence[int]) -> pa.Array:
    """Where lists of these sizes begin, and where the last one ends."""
    import numpy as np
    import pyarrow as pa

    return pa.array(np.cumsum([0, *sizes], dtype=np.int64), pa.int32())


def counts_of(values: Sequence[Any]) -> pa.Array:
    """Whole numbers; None for what is none, or does not fit into 64 bits."""
    known = values
    if not all_of({int, type(None)}, values):
        known = [int(value) if is_whole(value) else None for value in values]
    try:
        return array_of(known, "int64")
    except OverflowError:
        return array_of([None if value is None or abs(value) >= 2**63 else value for value in known], "int64")


def json_of(values: Sequence[Any], field: str) -> pa.Array:
    """Each value as JSON. field: what they are, for the note on one that has none."""
    return array_of(encode_all(values, field), "string")


def texts_of(values: Sequence[Any]) -> pa.Array:
    """Texts to read and to group by. What UTF-8 cannot say is written as an escape."""
    if all_of({str, type(None)}, values):
        texts = redact_texts(values)
    else:
        texts = [None if value is None else stored_text(value) for value in values]
    try:
        return array_of(texts, "string")
    except UnicodeError:
        return array_of([text and text.encode("utf-8", "backslashreplace").decode() for text in texts], "string")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can say it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def of_doubles_or_longs(array: pa.Array) -> pa.Array:
    """The same numbers, in lists or not, in 64 bits."""
    import pyarrow as pa

    if pa.types.is_list(array.type):
        offsets = pa.array(array.offsets.to_numpy())  # of a slice, they cannot be taken as they are
        return pa.ListArray.from_arrays(offsets, of_doubles_or_longs(array.values), mask=array.is_null())
    return pa.array(array.to_numpy().astype("int64" if pa.types.is_integer(array.type) else "float64"))


def to_python(array: pa.Array) -> list[Any]:
    """Like `to_pylist`, which makes an object of Arrow's for every token on the way."""
    import pyarrow as pa

    if pa.types.is_list(array.type):
        entries = to_python(array.values)
        parts: list[Any] = [entries[start:stop] for start, stop in pairwise(array.offsets.to_pylist())]
        if array.null_count:
            for place, there in enumerate(array.is_valid().to_pylist()):
                if not there:
                    parts[place] = None
        return parts
    if array.null_count == 0 and (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        return array.to_numpy().tolist()
    if array.null_count == len(array):
        return [None] * len(array)
    return array.to_pylist()
