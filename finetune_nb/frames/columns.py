"""Declares the columns of the frames, and makes them of lists of values that may be anything.

Missing stays apart from zero: NaN, or <NA> in counting columns. Values come from models, datasets and other people's
components: a count may be no number, and a text may hold a lone surrogate, which Arrow refuses.
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
    """A column of a frame."""

    name: str
    """"score_<name>" is one column for each name in the values, which are mappings then."""
    dtype: str
    """As the frame's docstring has it: "int64", "Int64" (where some may be missing), "float64", "str", "category", ..."""
    source: str | None = None
    """What it is made of: a column of the trajectories' file or an attribute of a record, such as "metrics.failures".
    None: of several of them."""
    key: str | None = None
    """Which value of the JSON object in `source`. None: all of it."""
    make: Callable[..., Any] | None = None
    """Makes its values of the source's. None: they are taken as they are."""
    only: str | None = None
    """The role of the only messages that have a value."""
    categories: tuple[str, ...] | None = None
    """All values that a category can have, where they are known. Its values are then positions in it, -1 for missing."""

    @property
    def prefix(self) -> str | None:
        """ "score_", where it is one column for each name."""
        start, mark, _ = self.name.partition("<")
        return start if mark else None


def sources_of(columns: Iterable[Column]) -> list[str]:
    """What they are made of, each source once."""
    sources = [column.source for column in columns if column.source is not None]
    return list(dict.fromkeys(sources))


def asked_for(
    columns: Sequence[str] | str | None, known: Iterable[str], prefixes: Iterable[str] = ()
) -> list[str] | None:
    """The columns to make, in that order; None: all. prefixes: of those that depend on what there is ("score_").
    Raises ConfigError for one that the frame never has."""
    if columns is None:
        return None
    names, known = [columns] if isinstance(columns, str) else list(columns), list(known)
    for name in names:
        if name not in known and not str(name).startswith(tuple(prefixes)):
            raise ConfigError(f"there is no column {name!r}. {did_you_mean(name, known)}")
    return names


def framed(found: Mapping[str, Any], columns: Sequence[str] | None) -> pd.DataFrame:
    """The columns as a frame: those that were asked for, in that order. One that depends on what there is (a score) is
    empty as long as there are no rows. Raises ConfigError where there are rows and none of them has it."""
    import pandas as pd

    if columns is not None:
        rows = len(next(iter(found.values()))) if found else 0
        if absent := [name for name in columns if name not in found and rows]:
            raise ConfigError(f"no epoch has {absent[0]!r}. {did_you_mean(absent[0], found)}")
        found = {name: found[name] if name in found else floats([]) for name in columns}
    return pd.DataFrame(dict(found), copy=False)


def column_of(column: Column, parts: Iterable[Any]) -> Any:
    """The values of a column, typed as it declares.

    Args:
        column: What it is.
        parts: The values of each epoch: a list or, where none of them is missing, an array.
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
    """The same of all values; where it is one column for each name, all of these columns."""
    if column.prefix is None:
        return {column.name: column_of(column, [values])}
    return {f"{column.prefix}{name}": found for name, found in wide(values).items()}


def flatten(parts: Iterable[list[Any]]) -> list[Any]:
    """The entries of several lists, one list after another."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))


def join(parts: Iterable[Any], dtype: Any) -> np.ndarray:
    """Arrays, one after another, as one of that dtype."""
    import numpy as np

    return np.concatenate([np.empty(0, dtype=dtype), *parts]).astype(dtype, copy=False)


def objects(values: Any) -> pd.Series:
    """Values as they are: left to themselves, numpy and pandas would make text of ids, and rows of lists."""
    import numpy as np
    import pandas as pd

    column = np.fromiter(values, dtype=object, count=len(values))
    return pd.Series(column, dtype=object, copy=False)


def counts(values: Sequence[Any]) -> Any:
    """Whole numbers; <NA> for what is missing, no whole number, or does not fit into 64 bits."""
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
    """Text in the string type that is the default from pandas 3 on, before as objects; NaN where it is missing."""
    import pandas as pd
    import pyarrow as pa

    if int(pd.__version__.partition(".")[0]) < 3:
        return objects([math.nan if value is None else plain(value) for value in values])
    try:
        found = pa.array(values, pa.string(), from_pandas=True)
    except (UnicodeEncodeError, TypeError, ValueError):  # a lone surrogate, or no text at all
        found = pa.array([value if value is None else plain(value) for value in values], pa.string())
    return pd.array(found, dtype="str")


def categories(values: list[Any]) -> Any:
    """Texts of which there are few -> a categorical, in the order in which they turn up; None is NaN."""
    import numpy as np
    import pandas as pd

    if not {str, type(None)}.issuperset(map(type, values)):
        values = [value if value is None else plain(value) for value in values]
    codes, found = pd.factorize(objects(values))
    names = [plain(name) for name in found]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}  # two may look alike once they are plain
    codes = np.array([*(places[name] for name in names), -1])[codes]
    return pd.Categorical.from_codes(codes, categories=texts(list(places)))


def repeated(values: Sequence[str], times: Any) -> Any:
    """Texts, each repeated that often, as a categorical: a name that thousands of rows share is held once."""
    import numpy as np
    import pandas as pd

    names = [plain(value) for value in values]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    codes = np.repeat(np.array([places[name] for name in names], dtype=np.int64), times)
    return pd.Categorical.from_codes(codes, categories=texts(list(places)))


def wide(records: Sequence[Mapping[Any, Any] | None]) -> dict[str, np.ndarray]:
    """Mappings -> one column of floats a name, in the order in which the names turn up; NaN for what is no number."""
    found = [record if isinstance(record, (dict, Mapping)) else {} for record in records]
    columns = {}
    for name in dict.fromkeys(chain.from_iterable(found)):
        columns[plain(name)] = floats([record.get(name) for record in found])
    return columns


def floats(values: Iterable[Any]) -> np.ndarray:
    """Numbers; NaN where one is missing or is none."""
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
    """Seconds since 1970."""
    import pandas as pd

    return pd.to_datetime(floats(values), unit="s", utc=True)


_MAKE: dict[str, Callable[[list[Any]], Any]] = {
    "Int64": counts,
    "str": texts,
    "category": categories,
    "object": objects,
    "datetime, UTC": _times,
}
