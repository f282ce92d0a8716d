"""Trajectories and failed rollouts as a DataFrame, and the key columns that identify the rollout of a row in every frame.

Only the needed columns of the trajectories' file are read, and no trajectory objects are made. If an epoch has no file, the
same columns are made from its rollouts in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..analysis.trajectory_names import generations_of, trajectory_names
from ..store.arrays import to_python
from ..store.json import decode, decode_steps
from ..store.labels import Label
from ..store.reader import trajectory_columns
from ..store.trajectory_table import table_of
from ..text import plain
from ..training.metrics import advantages
from ..types import GROUP_REASONS, Epoch, IntermediateStep, same_id
from .columns import (
    Column,
    asked_for,
    column_of,
    counts,
    flatten,
    framed,
    join,
    objects,
    repeated,
    sources_of,
    wide,
)
from .labels import NO_LABELS, Labelling, labels_by_name

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

__all__ = [
    "COLUMNS",
    "KEYS",
    "REASONS",
    "EpochColumns",
    "FramePart",
    "Rollouts",
    "chosen",
    "is_example",
    "key_columns",
    "positions",
    "trajectories",
]

REASONS = tuple(reason.value for reason in GROUP_REASONS)
"""Reasons of groups, in the order of the codes in Selection.reasons."""


COLUMNS = (
    Column("epoch", "int64"),
    Column("example", "object"),
    Column("generation", "Int64", source="generation"),
    Column("trajectory", "str"),
    Column("reward", "float64"),
    Column("advantage", "float64"),
    Column("selected", "bool"),
    Column("reason", "category", categories=REASONS),
    Column("error", "str", source="error"),
    Column("turns", "Int64", source="turns"),
    Column("tokens", "Int64", source="tokens"),
    Column("policy_version", "Int64", source="policy_version"),
    Column("finish_reason", "category", source="finish_reason"),
    Column("output", "str", source="output"),
    Column("labels", "object"),
    Column("label_score", "float64"),
    Column("score_<name>", "float64", source="scores"),
)
"""Columns of `trajectories`. Those without a source come from the epoch's statistics and selection, and from labels."""


def trajectories(
    epochs: Iterable[Epoch],
    example: Any = None,
    columns: Sequence[str] | str | None = None,
    labels: Iterable[Label] = (),
) -> pd.DataFrame:
    """One row = one trajectory, in the collection's order; then one row for each failed rollout of that epoch.

    ================ ========== =============================================================================
    epoch            int64      counts from 0
    example          object     the example's id, as in the dataset
    generation       Int64      which of the group's rollouts, from 0
    trajectory       str        "e3/q17/2": epoch, example, generation ("#2": its position, if that is unknown)
    reward           float64    NaN if there is none; `error` then says why
    advantage        float64    (r - mean) / std within the group, kept or not; NaN without reward
    selected         bool       whether its group was kept
    reason           category   GroupReason: why its group was kept or not; NaN for a failure
    error            str        what went wrong with the rollout or its reward; NaN if nothing did
    turns            Int64      messages in the episode
    tokens           Int64      tokens that the policy sampled
    policy_version   Int64      the weights that it was sampled from
    finish_reason    category   of the last turn that has one: "stop", "length", ...
    output           str        what the workflow returned: a text as it is, any other value as JSON
    labels           object     the tags of its labels, a tuple: ("hacked", "flag"); () if it has none
    label_score      float64    the mean of its tags' scores; NaN if it has none
    score_<name>     float64    score from evaluator <name>; NaN if it is not a number
    ================ ========== =============================================================================

    Args:
        epochs: The records.
        example: Only the rollouts of this example, or of a list of examples. Default: all.
        columns: Only these columns, in this order. Default: all. Only the data that they need is read.
        labels: Labels, of which those of these rollouts are shown.

    Returns:
        The frame.

    Raises:
        ConfigError: There is no such column.
    """
    fixed = [column.name for column in COLUMNS if column.prefix is None]
    names = asked_for(columns, fixed, [column.prefix for column in COLUMNS if column.prefix])
    wanted = [column for column in COLUMNS if names is None or _is_wanted(column, names)]
    labelled = labels_by_name(labels, "rollout")
    parts = [_values_of(epoch, example, wanted, labelled) for epoch in epochs]
    found: dict[str, Any] = {}
    for column in wanted:
        values = [part[column.name] for part in parts]
        if column.name == "output":
            values = [_plain_outputs(flatten(values))]
        if column.prefix is None:
            found[column.name] = column_of(column, values)
        else:
            found |= {f"{column.prefix}{name}": scores for name, scores in _scores(flatten(values)).items()}
    return framed(found, names)


def _scores(texts: list[str | None]) -> dict[str, np.ndarray]:
    """One column per name, from scores as JSON. The same text recurs often, so each is parsed once."""
    import pandas as pd

    places, distinct = pd.factorize(objects(texts))
    records = [decode(text) for text in distinct]
    records.append(None)  # at index -1, the code of missing values
    return {name: column[places] for name, column in wide(records).items()}


def _plain_outputs(texts: list[str | None]) -> list[str | None]:
    """Outputs as JSON -> a text as it is, any other value as the JSON is."""
    plain: list[str | None] = []
    for text in texts:
        if text is not None and text.startswith('"'):
            text = decode(text, str)
        plain.append(text)
    return plain


def _is_wanted(column: Column, names: Sequence[str]) -> bool:
    if column.prefix is None:
        return column.name in names
    return any(name.startswith(column.prefix) for name in names)


def _values_of(
    epoch: Epoch, example: Any, wanted: Sequence[Column], labelled: Mapping[str, Labelling]
) -> dict[str, Any]:
    """The values of the wanted columns for one epoch: its trajectories, then its failures."""
    import numpy as np

    columns, statistics = EpochColumns(epoch), epoch.statistics
    failures = columns.failures
    found: dict[str, Any] = {}

    # From the file: the trajectories, and the few values that a failure has.
    names = [column.name for column in wanted]
    sources = sources_of(wanted)
    is_labelled = any(name in names for name in ("labels", "label_score")) and any(
        name.startswith(f"e{epoch.index}/") for name in labelled
    )
    is_named = "trajectory" in names or is_labelled
    if is_named and "generation" not in sources:
        sources.append("generation")
    known = columns.values(sources)
    for column in wanted:
        if column.source is not None:
            values = known[column.source]
            if failures:
                values = list(values) if isinstance(values, list) else values.tolist()
                values += [failure.get(column.name) for failure in failures]
            found[column.name] = values

    # From the epoch: a failure has no reward, and no reason.
    missing = np.full(len(failures), math.nan)
    found["epoch"] = np.full(columns.rows + len(failures), epoch.index)
    found["example"] = columns.examples
    if is_named:
        found["trajectory"] = columns.named(columns.generations(known["generation"]))
    rows = columns.rows + len(failures)
    if is_labelled:
        of_rows = [labelled.get(plain(name), NO_LABELS) for name in found["trajectory"]]
        found["labels"] = [tags for tags, _ in of_rows]
        found["label_score"] = np.array([score for _, score in of_rows], dtype=float)
    else:
        tags, score = NO_LABELS
        found["labels"], found["label_score"] = [tags] * rows, np.full(rows, score)
    found["reward"] = np.concatenate([statistics.rewards, missing])
    if "advantage" in names:
        found["advantage"] = np.concatenate([advantages(statistics), missing])
    reasons = np.repeat(epoch.selection.reasons, columns.sizes)
    found["reason"] = np.concatenate([reasons, np.full(len(failures), -1, np.int8)])
    found["selected"] = found["reason"] == 0

    return found if example is None else chosen(found, columns.of_example(example))


def chosen(values: Mapping[str, Any], those: np.ndarray) -> dict[str, Any]:
    """Filter the rows of columns, which are arrays or lists. those: one bool per row."""
    import numpy as np

    found: dict[str, Any] = {}
    for name, column in values.items():
        found[name] = column[those] if isinstance(column, np.ndarray) else list(compress(column, those))
    return found


def is_example(found: Any, asked: Any) -> bool:
    """Whether an id is the one asked for, or one of several. Ids are compared by their text: 1 and "1" are the same, 1, 1.0
    and True are not.

    Args:
        found: The id of an example.
        asked: An id, or a list or set of ids.

    Returns:
        True if it is.
    """
    if isinstance(asked, list | set | frozenset) and type(found) is not type(asked):
        return any(is_example(found, each) for each in asked)
    return same_id(found, asked)


# ── the columns of one epoch ─────────────────────────────────────────────────────────────────────────────────────────


class EpochColumns:
    """An epoch's rollouts as columns: N trajectories, then F failures.

    The columns are those of its file. If it has no file, they are made from the rollouts in memory.
    """

    def __init__(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self._read = getattr(epoch, "columns", None)
        self.rows = len(epoch.statistics.rewards)
        """N."""

    @cached_property
    def sizes(self) -> np.ndarray:
        """(G) number of trajectories in each group."""
        import numpy as np

        return np.diff(self._epoch.statistics.offsets)

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """(F) `id`, `generation` and `error` of each failure."""
        if not self._epoch.metrics.failures:
            return []
        if self._read is None:
            # Keep the ids as they are, like the groups' ids in the statistics: JSON would turn (1, 2) into [1, 2].
            failures = self._epoch.collection.failures
            return [{"id": f.example_id, "generation": f.generation, "error": f.error} for f in failures]
        texts = self._read(["metadata"]).column("metadata").slice(self.rows).to_pylist()
        return [decode(text, dict) for text in texts]

    @cached_property
    def examples(self) -> list[Any]:
        """(N + F) the example id of each rollout."""
        examples: list[Any] = []
        for example, size in zip(self._epoch.statistics.example_ids, self.sizes.tolist(), strict=True):
            examples += [example] * size
        return examples + [failure["id"] for failure in self.failures]

    def trajectories(self, names: Sequence[str]) -> pa.Table:
        """(N) the named columns of the trajectories."""
        return trajectory_columns(self._epoch, names)

    def rollouts(self, names: Sequence[str]) -> pa.Table:
        """(N + F) the named columns of the trajectories and, after them, of the failures."""
        if self._read is not None:
            return self._read(names)
        collection = self._epoch.collection
        return table_of(collection.trajectories, collection.failures, names)

    def values(self, names: Sequence[str]) -> dict[str, Any]:
        """(N) the named columns, each as a list of Python values; integers of which none is missing as an array."""
        import pyarrow as pa

        if not names:
            return {}
        table = self.trajectories(names)
        found: dict[str, Any] = {}
        for name in names:
            column = table.column(name).combine_chunks()
            is_whole = pa.types.is_integer(column.type) and not column.null_count
            found[name] = column.to_numpy() if is_whole else to_python(column)
        if any(text and "\\ud" in text for text in found.get("error", ())):
            # The column has a lone surrogate as an escape; the metadata have the original.
            exact = [metadata.get("reward_error") for metadata in self.metadata()]
            found["error"] = [text and error for text, error in zip(found["error"], exact, strict=True)]
        return found

    def metadata(self) -> list[dict[str, Any]]:
        """(N) the trajectories' metadata."""
        return [{} if text is None else decode(text, dict) for text in self.values(["metadata"])["metadata"]]

    def generations(self, known: list[Any] | np.ndarray) -> list[Any]:
        """(N + F) the generation of each rollout. known: the column, which only holds integers."""
        column = known if isinstance(known, list) else known.tolist()
        return generations_of(self._epoch, column) + [failure["generation"] for failure in self.failures]

    def named(self, generations: Sequence[Any]) -> list[str]:
        """(N + F) names such as "e3/q17/2"."""
        places = [*positions(self.sizes).tolist(), *range(len(self.failures))]
        return trajectory_names(self._epoch.index, self.examples, generations, places)

    def of_example(self, example: Any) -> np.ndarray:
        """(N + F) bool: whether a rollout belongs to that example, or to one in a list. None: all do."""
        import numpy as np

        if example is None:
            return np.ones(len(self.examples), dtype=bool)
        return np.array([is_example(found, example) for found in self.examples], dtype=bool)

    def steps(self, those: np.ndarray) -> list[list[IntermediateStep]]:
        """The recorded steps of the selected failed rollouts. those: (F) bool."""
        if not any(those):
            return []
        texts = self.rollouts(["steps"]).column("steps").slice(self.rows).to_pylist()
        return [[] if text is None else decode_steps(text) for text in compress(texts, those)]


# ── frames with several rows per rollout ─────────────────────────────────────────────────────────────────────────────

KEYS = (
    Column("epoch", "int64"),
    Column("example", "object"),
    Column("generation", "Int64"),
    Column("trajectory", "category"),
)
"""The columns that identify the rollout of a row."""


class Rollouts(NamedTuple):
    """Rollouts of an epoch, N trajectories and F failures, or a selection of them."""

    examples: list[Any]
    generations: list[Any]
    names: list[str]

    @classmethod
    def of(cls, columns: EpochColumns, table: pa.Table) -> Rollouts:
        """All rollouts of an epoch. table: has the column "generation" of the trajectories."""
        generations = columns.generations(to_python(table.column("generation").combine_chunks()))
        return cls(columns.examples, generations, columns.named(generations))

    def first(self, those: np.ndarray) -> Rollouts:
        """The selected trajectories. those: (N) bool."""
        return Rollouts(*(list(compress(values, those)) for values in self))

    def last(self, those: np.ndarray) -> Rollouts:
        """The selected failures. those: (F) bool."""
        return Rollouts(*(list(compress(values[len(values) - len(those) :], those)) for values in self))


class FramePart(NamedTuple):
    """The rows that one epoch adds to a frame."""

    epoch: int
    rollouts: Rollouts
    rows: np.ndarray
    """Number of rows of each rollout."""
    columns: dict[str, Any]
    """Name -> values, one per row."""


def key_columns(parts: Sequence[FramePart]) -> dict[str, Any]:
    """The columns of KEYS."""
    import numpy as np

    rows = join((part.rows for part in parts), "int64")
    epochs = join((np.full(len(part.rows), part.epoch) for part in parts), "int64")
    examples = objects(flatten(part.rollouts.examples for part in parts))
    return {
        "epoch": np.repeat(epochs, rows),
        "example": objects(examples.to_numpy().repeat(rows)),
        "generation": counts(flatten(part.rollouts.generations for part in parts)).repeat(rows),
        "trajectory": repeated(flatten(part.rollouts.names for part in parts), rows),
    }


def positions(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... within each group of the given sizes, one group after another."""
    import numpy as np

    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
