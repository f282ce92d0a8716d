"""Examples as a DataFrame: how hard each one is, and what the next epoch makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..rollouts.difficulty import STATES, DifficultySettings, Visits, states_of
from ..text import text_of
from .columns import Column, asked_for, column_of, framed

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "EXAMPLES",
    "examples",
]

EXAMPLES = (
    Column("example", "object"),
    Column("state", "category", categories=tuple(map(str, STATES))),
    Column("pass_rate", "float64"),
    Column("mean_reward", "float64"),
    Column("solved", "float64"),
    Column("rollouts", "int64"),
    Column("rewards_missing", "int64"),
    Column("epochs", "int64"),
    Column("last_epoch", "Int64"),
    Column("rests_until", "Int64"),
)
"""Columns of `examples`."""


def examples(
    visits: Visits,
    epoch: int,
    settings: DifficultySettings,
    dataset: Sequence[Any] = (),
    columns: Sequence[str] | str | None = None,
) -> pd.DataFrame:
    """One row = one example: those of the dataset in its order, then others that the record has.

    =============== ========== ==============================================================================
    example         object     the example's id
    state           category   "fresh" (it has no reward yet), "learning", "solved" or "too hard" (to be checked again), "resting"
    pass_rate       float64    mean reward of a visit, held to 0 .. 1, averaged over visits, of which the newest counts half;
                               NaN if it has no reward
    mean_reward     float64    mean of all known rewards; NaN if there are none
    solved          float64    share of them that are at least 1; NaN if there are none
    rollouts        int64      rollouts that finished
    rewards_missing int64      those of them without a finite reward
    epochs          int64      epochs that drew it
    last_epoch      Int64      the newest of them; <NA> if there is none
    rests_until     Int64      the first epoch that may draw it again, if it is solved or too hard; else <NA>
    =============== ========== ==============================================================================

    Args:
        visits: What the record says.
        epoch: The next epoch.
        settings: How long examples rest.
        dataset: Ids of all examples, if they are known.
        columns: Only these columns, in this order. Default: all.

    Returns:
        The frame.

    Raises:
        ConfigError: There is no such column.
    """
    names = asked_for(columns, [column.name for column in EXAMPLES])
    of_dataset = set(map(text_of, dataset))
    ids = [
        *dataset,
        *(each for key, each in zip(visits.place_of, visits.examples, strict=True) if key not in of_dataset),
    ]
    found = states_of(visits, epoch, settings, ids)
    places = [visits.place_of.get(text_of(each)) for each in ids]

    def counted(values: Sequence[Any]) -> list[Any]:
        return [0 if place is None else values[place] for place in places]

    rewarded, rollouts, last = counted(visits.rewarded), counted(visits.rollouts), counted(visits.last)

    def mean(values: Sequence[Any]) -> list[float]:
        return [total / n if n else math.nan for total, n in zip(counted(values), rewarded, strict=True)]

    epochs = counted(visits.epochs)
    values = {
        "example": ids,
        "state": found.state,
        "pass_rate": found.rate,
        "mean_reward": mean(visits.total),
        "solved": mean(visits.passed),
        "rollouts": rollouts,
        "rewards_missing": [all_ - known for all_, known in zip(rollouts, rewarded, strict=True)],
        "epochs": epochs,
        "last_epoch": [newest if n else None for newest, n in zip(last, epochs, strict=True)],
        "rests_until": [until or None for until in found.rests_until.tolist()],
    }
    return framed({column.name: column_of(column, [values[column.name]]) for column in EXAMPLES}, names)
