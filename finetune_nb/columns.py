"""Lists of values -> columns of a DataFrame that keep missing apart from zero, whatever the values are.

Values come from models, datasets and other people's components: a count may be no number, a text may hold a lone
surrogate, which Arrow refuses. Which columns a frame has is left to frames.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from .html import plain
from .types import GROUP_REASONS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["categories", "counts", "floats", "join", "objects", "reasons", "texts", "wide"]


def join(parts: Iterable[Any], dtype: Any) -> np.ndarray:
    """Arrays behind one another; an empty one of that dtype where there are none."""
    import numpy as np

    return np.concatenate([np.empty(0, dtype=dtype), *parts]).astype(dtype, copy=False)


def objects(values: list[Any]) -> pd.Series:
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
