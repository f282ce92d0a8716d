"""Lists of values -> columns of a DataFrame that keep missing apart from zero, whatever the values are; and which columns
were asked for.

Values come from models, datasets and other people's components: a count may be no number, a text may hold a lone
surrogate, which Arrow refuses. Which columns a frame has is left to frames.py and its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from ..text import plain
from ..types import GROUP_REASONS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "asked_for",
    "categories",
    "counts",
    "floats",
    "framed",
    "join",
    "objects",
    "reasons",
    "repeated",
    "texts",
    "wide",
]


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


def join(parts: Iterable[Any], dtype: Any) -> np.ndarray:
    """Arrays behind one another; an empty one of that dtype where there are none."""
    import numpy as np

    return np.concatenate([np.empty(0, dtype=dtype), *parts]).astype(dtype, copy=False)


def objects(values: Any) -> pd.Series:
    """Values as they are: left to themselves, numpy and pandas would make text of ids, and rows of lists."""
    import numpy as np
    import pandas as pd

    column = np.empty(len(values), dtype=object)
    column[:] = values
    return pd.Series(column, dtype=object, copy=False)


def counts(values: Sequence[Any]) -> Any:
    """Whole numbers, <NA> where one is missing, is none, or does not fit into 64 bits."""
    import numpy as np
    import pandas as pd

    if {int}.issuperset(map(type, values)) and (not values or max(map(abs, values)) < 2**63):
        return pd.arrays.IntegerArray(np.array(values, dtype=np.int64), np.zeros(len(values), dtype=bool))
    whole = [isinstance(v, Integral) and not isinstance(v, bool) and abs(int(v)) < 2**63 for v in values]
    known = [value if ok else 0 for value, ok in zip(values, whole, strict=True)]
    return pd.arrays.IntegerArray(np.array(known, dtype=np.int64), ~np.array(whole, dtype=bool))


def texts(values: list[Any]) -> Any:
    """Text in the string type that is the default from pandas 3 on, before as objects; NaN where it is missing."""
    import pandas as pd

    if int(pd.__version__.partition(".")[0]) < 3:
        return objects([math.nan if value is None else plain(value) for value in values])
    try:
        return pd.array(values, dtype="str")
    except (UnicodeEncodeError, TypeError, ValueError):  # a lone surrogate, or no text at all
        return pd.array([value if value is None else plain(value) for value in values], dtype="str")


def reasons(codes: np.ndarray) -> Any:
    """Positions in GROUP_REASONS -> a categorical; -1 is NaN."""
    import pandas as pd

    return pd.Categorical.from_codes(codes, categories=[reason.value for reason in GROUP_REASONS])


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
    found = [r if type(r) is dict else dict(r) if isinstance(r, Mapping) else {} for r in records]
    columns = {}
    for name in dict.fromkeys(chain.from_iterable(found)):
        columns[plain(name)] = floats([record.get(name) for record in found])
    return columns


def floats(values: Iterable[Any]) -> np.ndarray:
    """Numbers; NaN where one is missing or is none."""
    import numpy as np

    values = list(values)
    if not {float, type(None)}.issuperset(map(type, values)):
        values = [_float(value) for value in values]
    return np.array(values, dtype=np.float64)


def _float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return math.nan
