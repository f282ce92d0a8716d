"""Conditions on rollouts, such as "reward < 0.5 and 'hacked' in labels", evaluated without running code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from ..text import short
from .trajectories import COLUMNS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = [
    "condition_of",
]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_TURNED_ROUND: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
}
"""1 < reward is reward > 1."""
_MEMBER = (ast.In, ast.NotIn)
_LONGEST = 2_000
"""Characters of a condition."""
_EXPECTED = (
    "Expected comparisons of columns with values, joined by and, or, not: \"reward < 0.5 and 'hacked' in labels\", "
    "\"finish_reason == 'length' or error != None\"."
)


def condition_of(where: Any) -> tuple[Callable[[pd.DataFrame], Any], tuple[str, ...] | None]:
    """Make a condition on the rows of `trajectories`.

    Args:
        where: A text, of comparisons of columns with values: `reward < 0.5 and 'hacked' in labels`. Of a column of texts, `in`
            asks for a part of the text; `== None` asks for a missing value. Or a function of the frame of one epoch, that
            returns a bool for each row.

    Returns:
        The condition as a function of such a frame, and the columns that it needs; None: all.

    Raises:
        ConfigError: It is neither, or names a column that there is not.
    """
    if callable(where):
        return where, None
    if not isinstance(where, str) or not where.strip():
        raise ConfigError(f"where is {short(repr(where), 80)}; expected a condition or a function. {_EXPECTED}")
    try:
        if len(where) > _LONGEST:
            raise SyntaxError(f"more than {_LONGEST:,} characters")
        tree = ast.parse(where.strip(), mode="eval").body
        names = tuple(dict.fromkeys(_columns_in(tree)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(
            f"where={short(repr(where), 80)} is no condition: {short(reason, 120)}. {_EXPECTED}"
        ) from error
    fixed = [column.name for column in COLUMNS if column.prefix is None]
    for name in names:
        if name not in fixed and not name.startswith("score_"):
            raise ConfigError(
                f"where={short(repr(where), 80)}: there is no column {name!r}. {did_you_mean(name, fixed)}"
            )
    return lambda frame: _evaluate(tree, frame), names or ("epoch",)


def _columns_in(node: ast.expr) -> Iterator[str]:
    """The columns that a condition names. Raises SyntaxError where it is none."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _columns_in(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _columns_in(node.operand)
    elif isinstance(node, ast.Name):
        yield node.id  # a column of bools
    elif isinstance(node, ast.Compare):
        for op, left, right in _pairs(node):
            yield from _columns_of_pair(op, left, right)
    else:
        raise SyntaxError(f"found {ast.unparse(node)!r}")


def _pairs(node: ast.Compare) -> Iterator[tuple[ast.cmpop, ast.expr, ast.expr]]:
    """0 < reward < 1 -> 0 < reward, reward < 1."""
    sides = [node.left, *node.comparators]
    yield from zip(node.ops, sides[:-1], sides[1:], strict=True)


def _columns_of_pair(op: ast.cmpop, left: ast.expr, right: ast.expr) -> Iterator[str]:
    named = [side for side in (left, right) if isinstance(side, ast.Name)]
    if len(named) != 1:
        raise SyntaxError(f"found {ast.unparse(left)} and {ast.unparse(right)}, one of which must be a column")
    (column,) = named
    value = _value(right if column is left else left)
    if isinstance(op, _MEMBER):
        if column is right and not isinstance(value, str):
            raise SyntaxError(f"found {value!r} in {column.id}, which must be a text")
        if column is left and not (isinstance(value, list | tuple | set) and all(map(_is_single, value))):
            raise SyntaxError(f"found {column.id} in {value!r}, which must be a list of texts or numbers")
    elif not _is_single(value):
        raise SyntaxError(f"found {column.id} beside {value!r}, which must be a text or a number")
    elif isinstance(op, ast.Is | ast.IsNot) and value is not None:
        raise SyntaxError(f"`is` is for None alone; write {column.id} == {value!r}")
    elif value is None and not isinstance(op, ast.Eq | ast.NotEq | ast.Is | ast.IsNot):
        raise SyntaxError("None is neither less nor greater than anything")
    yield column.id


def _value(node: ast.expr) -> Any:
    """A constant, or a list of constants. Raises SyntaxError."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise SyntaxError(f"found {ast.unparse(node)!r}, which must be a value") from error


def _is_single(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _evaluate(node: ast.expr, frame: pd.DataFrame) -> np.ndarray:
    """(N) bool: for which rows it holds."""
    import numpy as np

    if isinstance(node, ast.BoolOp):
        parts = [_evaluate(value, frame) for value in node.values]
        return np.logical_and.reduce(parts) if isinstance(node.op, ast.And) else np.logical_or.reduce(parts)
    if isinstance(node, ast.UnaryOp):
        return ~_evaluate(node.operand, frame)
    if isinstance(node, ast.Name):
        return np.array([bool(value) and value == value for value in frame[node.id].fillna(False).tolist()], dtype=bool)
    assert isinstance(node, ast.Compare)
    return np.logical_and.reduce([_compare(op, left, right, frame) for op, left, right in _pairs(node)])


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, frame: pd.DataFrame) -> np.ndarray:
    """(N) bool. A missing value is equal to nothing but None, and neither less nor greater than anything."""
    import numpy as np

    turned_round = not isinstance(left, ast.Name)
    name = ast.unparse(right if turned_round else left)
    value = _value(left if turned_round else right)
    column: Any = frame[name]
    missing = column.isna().to_numpy(dtype=bool)
    if value is None:
        return missing if isinstance(op, ast.Eq | ast.Is) else ~missing
    if isinstance(op, _MEMBER):
        if turned_round:
            found = np.array([_holds(each, value) for each in column.tolist()], dtype=bool)
        else:
            found = column.isin(list(value)).to_numpy(dtype=bool)
        return ~found if isinstance(op, ast.NotIn) else found
    if turned_round:
        op = _TURNED_ROUND.get(type(op), type(op))()
    try:
        found = _COMPARE[type(op)](column.astype(object)[~missing], value)
    except TypeError as error:
        raise ConfigError(f"{name} cannot be compared with {value!r}: {short(error, 120)}.") from error
    holds = np.full(len(column), isinstance(op, ast.NotEq))
    holds[~missing] = found.to_numpy(dtype=bool)
    return holds


def _holds(whole: Any, part: str) -> bool:
    """Whether a tuple of tags has that tag, or a text that part."""
    if isinstance(whole, str):
        return part in whole
    return isinstance(whole, tuple | list) and part in whole
