"""Labels as a DataFrame, and as columns of the trajectories' frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..store.labels import Label, scores_by_tag
from .columns import Column, asked_for, columns_of, framed

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LABELS",
    "NO_LABELS",
    "Labelling",
    "labels",
    "labels_by_name",
]

LABELS = (
    Column("name", "str", source="name"),
    Column("level", "category", source="level", categories=("rollout", "group", "epoch")),
    Column("epoch", "int64", source="epoch"),
    Column("example", "object", source="example"),
    Column("generation", "Int64", source="generation"),
    Column("tag", "category", source="tag"),
    Column("score", "float64", source="score"),
    Column("note", "str", source="note"),
    Column("author", "category", source="author"),
    Column("time", "datetime, UTC", source="time"),
)
"""Columns of `labels`."""


def labels(found: Iterable[Label], columns: Sequence[str] | str | None = None) -> pd.DataFrame:
    """One row = one label, oldest first.

    ================ ============== =========================================================================
    name             str            "e3/q17/2", as in the column `trajectory`; "e3/q17" a group, "e3" an epoch
    level            category       what it is a label of: "rollout", "group" or "epoch"
    epoch            int64          counts from 0
    example          object         the example's id; None for an epoch
    generation       Int64          which of the group's rollouts; <NA> for a group or an epoch
    tag              category       "hacked", "flag", ...
    score            float64        NaN if it has none
    note             str            "" if it has none
    author           category       who said so
    time             datetime, UTC  when
    ================ ============== =========================================================================

    Args:
        found: The labels.
        columns: Only these columns, in this order. Default: all.

    Returns:
        The frame.

    Raises:
        ConfigError: There is no such column.
    """
    found = list(found)
    values: dict[str, Any] = {}
    for column in LABELS:
        assert column.source is not None
        column_values = [getattr(label, column.source) for label in found]
        if column.categories is not None:
            column_values = [column.categories.index(value) for value in column_values]
        values |= columns_of(column, column_values)
    return framed(values, asked_for(columns, values))


Labelling = tuple[tuple[str, ...], float]
"""Tags, each once and in order of time, and the mean of their scores; NaN if none has one."""
NO_LABELS: Labelling = ((), math.nan)


def labels_by_name(found: Iterable[Label], level: str) -> dict[str, Labelling]:
    """The labels of rollouts, of groups or of epochs, by their names.

    Args:
        found: Labels, of any level.
        level: "rollout", "group" or "epoch": those of this level count.
    """
    result = {}
    for name, by_tag in scores_by_tag(found, level).items():
        scores = [score for score in by_tag.values() if score is not None]
        mean = math.fsum(scores) / len(scores) if scores else math.nan
        result[name] = (tuple(by_tag), mean)
    return result
