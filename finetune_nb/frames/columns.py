"""Declares the columns of the frames, and makes them from lists of arbitrary values.

Missing is distinct from zero: NaN, or <NA> in integer columns. Values come from models, datasets and third-party
components: a count may not be a number, and a text may hold a lone surrogate, which Arrow refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from ..text import plain

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "Column",
    "asked_for",
    "categories",
    "column_of",
    "columns_of",
    "counts",
    "flatten",
    "floats",
    "framed",
    "join",
    "objects",
    "repeated",
    "sources_of",
    "texts",
    "wide",
]


@dataclass(frozen=True)
class Column:
    """The declaration of one column of a frame."""

    name: str
    """"score_<name>" is one column per name in the values, which are then mappings."""
    dtype: str
    """As in the frame's docstring: "int64", "Int64" (if some may be missing), "float64", "str", "category", ..."""
    source: str | None = None
    """Where its values come from: a column of the trajectories' file or an attribute of a record, such as
    "metrics.failures". None: from several of them."""
    key: str | None = None
    """Which value of the JSON object in `source`. None: the whole object."""
    make: Callable[..., Any] | None = None
    """Converts the values of the source. None: they are used as they are."""
    only: str | None = None
    """Only messages of this role have a value. None: all do."""
    categories: tuple[str, ...] | None = None
    """All values that a category can have, if known. The column's values are then positions in it, -1 for missing."""

    @property
    def prefix(self) -> str | None:
        """ "score_" for "score_<name>"; None for a single column."""
        start, mark, _ = self.name.partition("<")
        return start if mark else None


def sources_of(columns: Iterable[Column]) -> list[str]:
    """The sources of the columns, each once."""
    sources = [column.source for column in columns if column.source is not None]
    return list(dict.fromkeys(sources))


def asked_for(
    columns: Sequence[str] | str | None, known: Iterable[str], prefixes: Iterable[str] = ()
) -> list[str] | None:
    """Check the columns that were asked for.

    Args:
        columns: Their names; None for all.
        known: The columns that the frame always has.
        prefixes: Prefixes of the columns that depend on the data ("score_").

    Returns:
        The names in the order asked for; None for all.

    Raises:
        ConfigError: The frame never has one of them.
    """
    if columns is None:
        return None
    names, known = [columns] if isinstance(columns, str) else list(columns), list(known)
    for name in names:
        if name not in known and not str(name).startswith(tuple(prefixes)):
            raise ConfigError(f"there is no column {name!r}. {did_you_mean(name, known)}")
    return names


def framed(found: Mapping[str, Any], columns: Sequence[str] | None) -> pd.DataFrame:
    """Make a frame of the columns that were asked for.

    Args:
        found: All columns, by name.
        columns: The wanted ones, in this order; None for all. If there are no rows yet, a column that depends on the data
            (a score) is empty.

    Raises:
        ConfigError: There are rows, but no such column.
    """
    import pandas as pd

    if columns is not None:
        rows = len(next(iter(found.values()))) if found else 0
        if absent := [name for name in columns if name not in found and rows]:
            raise ConfigError(f"no epoch has {absent[0]!r}. {did_you_mean(absent[0], found)}")
        found = {name: found[name] if name in found else floats([]) for name in columns}
    return pd.DataFrame(dict(found), copy=False)


def column_of(column: Column, parts: Iterable[Any]) -> Any:
    """Make a column of its declared type.

    Args:
        column: Its declaration.
        parts: The values of each epoch: a list or, if none is missing, an array.
    """
    import numpy as np
    import pandas as pd

    if column.categories is not None:
        return pd.Categorical.from_codes(join(parts, "int8"), categories=list(column.categories))
    if column.dtype in ("int64", "bool"):
        return join(parts, column.dtype)
    if column.dtype == "float64":
        return join(map(floats, parts), "float64")
    parts = list(parts)
    if column.dtype == "Int64" and parts and all(isinstance(part, np.ndarray) for part in parts):
        values = join(parts, "int64")
        return pd.arrays.IntegerArray(values, np.zeros(len(values), dtype=bool))
    lists = [part.tolist() if isinstance(part, np.ndarray) else part for part in parts]
    return _MAKE[column.dtype](flatten(lists))


def columns_of(column: Column, values: Sequence[Any]) -> dict[str, Any]:
    """Make a column from all of its values, or all the columns of a declaration with a prefix."""
    if column.prefix is None:
        return {column.name: column_of(column, [values])}
    return {f"{column.prefix}{name}": found for name, found in wide(values).items()}


def flatten(parts: Iterable[list[Any]]) -> list[Any]:
    """Concatenate lists."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))


def join(parts: Iterable[Any], dtype: Any) -> np.ndarray:
    """Concatenate arrays, as one of that dtype."""
    import numpy as np

    return np.concatenate([np.empty(0, dtype=dtype), *parts]).astype(dtype, copy=False)


def objects(values: Any) -> pd.Series:
    """Values as they are. By default numpy and pandas would turn ids into text, and lists into rows."""
    import numpy as np
    import pandas as pd

    column = np.fromiter(values, dtype=object, count=len(values))
    return pd.Series(column, dtype=object, copy=False)


def counts(values: Sequence[Any]) -> Any:
    """Integers; <NA> for a value that is missing, is not an integer, or does not fit into 64 bits."""
    import numpy as np
    import pandas as pd

    kinds = set(map(type, values))
    try:
        if kinds <= {int}:
            return pd.arrays.IntegerArray(np.array(values, dtype=np.int64), np.zeros(len(values), dtype=bool))
        if kinds <= {int, type(None)}:
            missing = np.array([value is None for value in values], dtype=bool)
            whole = np.array([0 if value is None else value for value in values], dtype=np.int64)
            return pd.arrays.IntegerArray(whole, missing)
    except OverflowError:
        pass  # some value is too large
    fits = [_is_count(value) for value in values]
    known = [value if fit else 0 for value, fit in zip(values, fits, strict=True)]
    return pd.arrays.IntegerArray(np.array(known, dtype=np.int64), ~np.array(fits, dtype=bool))


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63


def texts(values: list[Any]) -> Any:
    """Texts: of pandas' string type from pandas 3 on, as objects before that. NaN if missing."""
    import pandas as pd
    import pyarrow as pa

    if int(pd.__version__.partition(".")[0]) < 3:
        return objects([math.nan if value is None else plain(value) for value in values])
    try:
        found = pa.array(values, pa.string(), from_pandas=True)
    except (UnicodeEncodeError, TypeError, ValueError):  # a lone surrogate, or a value that is not text
        found = pa.array([value if value is None else plain(value) for value in values], pa.string())
    return pd.array(found, dtype="str")


def categories(values: list[Any]) -> Any:
    """A categorical of texts with few distinct values, in order of first appearance; None becomes NaN."""
    import numpy as np
    import pandas as pd

    if not {str, type(None)}.issuperset(map(type, values)):
        values = [value if value is None else plain(value) for value in values]
    codes, found = pd.factorize(objects(values))
    names = [plain(name) for name in found]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}  # two names may be equal once plain
    codes = np.array([*(places[name] for name in names), -1])[codes]
    return pd.Categorical.from_codes(codes, categories=texts(list(places)))


def repeated(values: Sequence[str], times: Any) -> Any:
    """A categorical of repeated texts: a name that thousands of rows share is stored once."""
    import numpy as np
    import pandas as pd

    names = [plain(value) for value in values]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    codes = np.repeat(np.array([places[name] for name in names], dtype=np.int64), times)
    return pd.Categorical.from_codes(codes, categories=texts(list(places)))


def wide(records: Sequence[Mapping[Any, Any] | None]) -> dict[str, np.ndarray]:
    """Mappings -> one column of floats per name, in order of first appearance; NaN for a value that is not a number."""
    found = [record if isinstance(record, (dict, Mapping)) else {} for record in records]
    columns = {}
    for name in dict.fromkeys(chain.from_iterable(found)):
        columns[plain(name)] = floats([record.get(name) for record in found])
    return columns


def floats(values: Iterable[Any]) -> np.ndarray:
    """Floats; NaN for a value that is missing or not a number."""
    import numpy as np

    if isinstance(values, np.ndarray):
        return values
    values = list(values)
    if not {float, type(None)}.issuperset(map(type, values)):
        values = [_float(value) for value in values]
    return np.array(values, dtype=np.float64)


def _float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return math.nan


def _times(values: Sequence[Any]) -> Any:
    """Times from seconds since 1970 (UTC)."""
    import pandas as pd

    return pd.to_datetime(floats(values), unit="s", utc=True)


_MAKE: dict[str, Callable[[list[Any]], Any]] = {
    "Int64": counts,
    "str": texts,
    "category": categories,
    "object": objects,
    "datetime, UTC": _times,
}
