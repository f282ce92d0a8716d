"""The Parquet file of an epoch, `trajectories/epoch-000003.parquet`: one row a trajectory or failed rollout.

Written so that a crash leaves all of it or none, and read without trusting it; others read it with pandas.read_parquet.
`trajectory_table` says which columns it has. The schema's metadata say which run and epoch it is and how many groups there
were. Every error is a StoreError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import StoreError
from ..types import TrajectoryCollection
from .durable import check_plain, write_durably
from .folder import trajectory_file
from .json import decode, encode
from .trajectory_table import (
    COLUMNS,
    FORMAT,
    KEY,
    OLDEST_READER,
    MessageColumn,
    check_columns,
    checked,
    collection_of,
    completed,
    joined,
    parts,
    storable,
    wide_columns,
    widened,
)

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "read_columns",
    "read_row_group",
    "read_trajectories",
    "write_trajectories",
]

_VALUES_AT_LEAST = 20_000_000
_VALUES_PER_BYTE = 1000
"""A file may claim that many values in a column, and that many for each of its bytes: a column of one value that is
repeated takes almost no bytes, and any memory."""
TOKENS_PER_GROUP = 500_000
"""Tokens in a row group, about: to read one rollout, all of its row group is decoded."""
ROWS_PER_GROUP = 8192
"""At most, however short they are."""
CHARACTERS_PER_TOKEN = 4
"""About: of a message that was not sampled, the tokens were not counted."""


def _leaf(name: str) -> str:
    """The path of the column's values inside its lists, as Parquet spells it."""
    return name + ".list.element" * COLUMNS[name].type.count("list<")


_DICTIONARY = [_leaf(name) for name, column in COLUMNS.items() if "string" in column.type]
_DICTIONARY.append(_leaf("token_ids"))
"""Columns in which the same values come again and again. Prompt ids stay plain: those of a turn begin with those of the
turn before it, which zstd finds where bytes are aligned."""
_SPLIT = {_leaf("logprobs"): "BYTE_STREAM_SPLIT"}


def write_trajectories(folder: Path, epoch: int, run_id: str, collection: TrajectoryCollection) -> int:
    """Writes an epoch's file. One that an earlier attempt left is replaced.

    Returns:
        The file's size in bytes.

    Raises:
        StoreError: It could not be written; the folder is then as it was.
    """
    import pyarrow as pa

    path = trajectory_file(folder, epoch)
    try:
        about = {
            "format": FORMAT,
            "reader": OLDEST_READER,
            "run_id": run_id,
            "collection": collection.run_id,
            "epoch": epoch,
            "groups": len(collection.trajectories),
        }
        check_plain(path.parent)
        path.parent.mkdir(exist_ok=True)
        write_durably(path, lambda file: _write_parts(file, collection, {KEY: encode(about)}))
        return os.stat(path).st_size
    except (OSError, pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreError(
            f"{path} could not be written: {type(error).__name__}: {error}. Epoch {epoch} is not recorded; everything "
            "before it is kept. Remove the cause (a full disk, say) and append the epoch again."
        ) from error


def _write_parts(file: BinaryIO, collection: TrajectoryCollection, metadata: Mapping[Any, Any]) -> None:
    """Writes a collection part by part, so that only a row group or two of it is in memory as columns."""
    wide: frozenset[str] = frozenset()
    while (wider := _write_with(file, collection, metadata, wide)) is not None:
        wide = wider  # a column cannot become wider in the middle of a file
        file.seek(0)
        file.truncate()


def _write_with(
    file: BinaryIO, collection: TrajectoryCollection, metadata: Mapping[Any, Any], wide: frozenset[str]
) -> frozenset[str] | None:
    """Writes a collection with the wider type of those columns and of those that need it in the first row group. If a later one
    needs it for others, the file is not complete: returns all of them, to begin with."""
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None
    with ExitStack() as stack:
        for table in _row_group_tables(map(storable, parts(collection.trajectories, collection.failures))):
            found = wide_columns(table)
            if writer is None:
                wide |= found
                table = widened(table, wide)
                writer = stack.enter_context(
                    pq.ParquetWriter(
                        file,
                        table.schema.with_metadata(metadata),
                        compression="zstd",
                        use_dictionary=_DICTIONARY,  # type: ignore[arg-type]  # the stubs know the bool only
                        column_encoding=_SPLIT,
                        write_statistics=False,
                        write_page_checksum=True,
                    )
                )
            elif not found <= wide:
                return wide | found
            writer.write_table(widened(table, wide), row_group_size=ROWS_PER_GROUP)
    return None


def _row_group_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables with consecutive rows -> one a row group."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) < 2 * ROWS_PER_GROUP:
            continue
        together = joined(waiting)
        *bounds, last = _row_groups(together)[:-1]
        for start, stop in pairwise([*bounds, last]):
            yield together.slice(start, stop - start)
        waiting = [together.slice(last)]
    together = joined(waiting)
    for start, stop in pairwise(_row_groups(together)):
        yield together.slice(start, stop - start)


def _row_groups(table: pa.Table) -> list[int]:
    """Where the row groups begin, and where the last one ends. Rollouts of one group stay together, as far as they fit."""
    import numpy as np
    import pyarrow.compute as pc

    contents = table.column("contents").combine_chunks()
    characters = np.zeros(len(contents.values) + 1, np.int64)
    lengths: Any = pc.call_function("binary_length", [contents.values])
    np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False), out=characters[1:])
    read = np.diff(characters[contents.offsets.to_numpy()]) // CHARACTERS_PER_TOKEN
    sampled = pc.fill_null(table.column("tokens"), 0).to_numpy()
    tokens = np.maximum(read, sampled).tolist()
    group_of = pc.fill_null(table.column("group"), -1).to_pylist()

    bounds, size = [0], 0
    begin = 0  # of the group of rollouts that the row is in
    for row, cost in enumerate(tokens):
        if row and group_of[row] != group_of[row - 1]:
            begin = row
        if size and (size + cost > TOKENS_PER_GROUP or row - bounds[-1] >= ROWS_PER_GROUP):
            bounds.append(begin if begin > bounds[-1] else row)
            size = sum(tokens[bounds[-1] : row])
        size += cost
    return [*bounds, len(tokens)]


def read_trajectories(folder: Path, epoch: int, run_id: str, rows: int, groups: int) -> TrajectoryCollection:
    """The trajectories and failures of an epoch.

    Args:
        folder: The run's folder.
        epoch: Its number.
        run_id: Of the run.
        rows: How many of them there are, as run.db says.
        groups: In how many groups.

    Raises:
        StoreError: The file is missing, damaged, or not the one of that epoch.
    """
    with _reading(folder, epoch, run_id, rows, groups) as (file, about):
        return collection_of(_read(file, COLUMNS), about["collection"], groups)


def read_columns(folder: Path, epoch: int, run_id: str, rows: int, groups: int, names: Sequence[str]) -> pa.Table:
    """Some columns of an epoch, by their names in COLUMNS; nothing else is read.

    Args:
        folder: The run's folder.
        epoch: Its number.
        run_id: Of the run.
        rows: How many rows there are, as run.db says.
        groups: How many groups.
        names: The columns. One that the file need not have, and has not, comes as missing values.

    Raises:
        StoreError: There is no such column, or the file is missing, damaged, or not the one of that epoch.
    """
    if unknown := [name for name in names if name not in COLUMNS]:
        raise StoreError(f"found columns {unknown}; the file of an epoch has {', '.join(COLUMNS)}.")
    with _reading(folder, epoch, run_id, rows, groups) as (file, _):
        return _read(file, names)


def read_row_group(
    folder: Path, epoch: int, run_id: str, rows: int, groups: int, row: int, names: Iterable[str] = tuple(COLUMNS)
) -> tuple[int, pa.Table]:
    """The row group that a row is in: the smallest part of the file that can be read.

    Args:
        folder: The run's folder.
        epoch: Its number.
        run_id: Of the run.
        rows: How many rows there are, as run.db says.
        groups: How many groups.
        row: The row's place in the file, from 0.
        names: The columns. Default: all.

    Returns:
        The place in the file of the table's first row, and the table.

    Raises:
        StoreError: There is no such row, or the file is missing, damaged, or not the one of that epoch.
    """
    if not 0 <= row < rows:
        raise StoreError(f"found row {row}; epoch {epoch} has rows 0 to {rows - 1}.")
    with _reading(folder, epoch, run_id, rows, groups) as (file, _):
        first = 0
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            if row < first + count:
                return first, _read(file, names, number)
            first += count
        raise ValueError(f"no row group has row {row}")


def _read(file: Any, names: Iterable[str], row_group: int | None = None) -> pa.Table:
    """Those columns: of one row group, or of the whole file."""
    there = set(file.schema_arrow.names)
    wanted = [name for name in names if name in there]
    lacking = [name for name in names if name not in there]
    if "roles" not in wanted and any(isinstance(COLUMNS[name], MessageColumn) for name in lacking):
        wanted.append("roles")  # how many messages there are is said by nothing else
    if row_group is None:
        table = file.read(wanted, use_threads=False)
    else:
        table = file.read_row_group(row_group, wanted, use_threads=False)
    table = checked(table)
    return completed(table, names) if lacking else table


@contextmanager
def _reading(folder: Path, epoch: int, run_id: str, rows: int, groups: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open Parquet file and what it says of itself, once its columns and counts are found to be the expected ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = trajectory_file(folder, epoch)
    try:
        check_plain(path.parent, path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            about = _about(file)
            check_columns(file.schema_arrow, about["format"])
            found = (about["run_id"], about["epoch"], about["groups"], file.metadata.num_rows)
            if found != (run_id, epoch, groups, rows):
                raise ValueError(
                    "run, epoch, groups and rows are {!r}, {!r}, {!r}, {!r}".format(*found)
                    + f"; run.db says {run_id!r}, {epoch}, {groups}, {rows}"
                )
            _check_claims(file.metadata, path.stat().st_size)
            yield file, about
    except StoreError:
        raise
    except FileNotFoundError:
        problem, cause = "it is missing", None
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        problem, cause = f"it cannot be read: {type(error).__name__}: {str(error)[:500]}", error
    else:
        return
    raise StoreError(
        f"{path}: {problem}. The trajectories of epoch {epoch} are lost unless you have a copy of that file; its "
        "numbers and all other epochs can be read."
    ) from cause


def _check_claims(about: Any, size: int) -> None:
    """Raises ValueError where reading the file would take more memory than an epoch can need."""
    most = _VALUES_AT_LEAST + _VALUES_PER_BYTE * size
    for column in range(about.num_columns):
        found = sum(about.row_group(group).column(column).num_values for group in range(about.num_row_groups))
        if found > most:
            raise ValueError(f"{found:,} values in a column of a file of {size:,} bytes; expected at most {most:,}")


def _about(file: Any) -> dict[str, Any]:
    """What the file says of itself. Raises ValueError where this release cannot read it."""
    about = decode(((file.schema_arrow.metadata or {}).get(KEY) or b"").decode("ascii", "replace"), dict)
    format = about.get("format")
    reader = about.get("reader", format)
    if type(format) is not int or type(reader) is not int or not reader <= FORMAT:
        raise ValueError(f"format {format!r}, expected {FORMAT}; update finetune_nb to read a newer one")
    if not isinstance(about.get("collection"), str):
        raise ValueError("it does not say which run it belongs to")
    return about
