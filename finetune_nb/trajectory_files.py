"""The Parquet file of an epoch, `trajectories/epoch-000003.parquet`: written so that a crash leaves none or all of it,
and read without trusting it. Others read it with pandas.read_parquet.

Columns are those of trajectory_table.py; the schema's metadata say which run and epoch it is and how many groups there
were. A batch of rollouts of an unfinished epoch is the same table as an Arrow stream. Every error is a StoreError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import StoreError
from .run_folder import check_plain, trajectory_file, write_durably
from .stored_json import decode, encode
from .trajectory_rows import collection_of
from .trajectory_table import COLUMNS, table_of
from .types import RolloutFailure, Trajectory, TrajectoryCollection

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["batch_of", "collection_of_batches", "read_columns", "read_trajectories", "write_trajectories"]

FORMAT = 1
KEY = b"finetune_nb"
ROWS_PER_GROUP = 8192
"""So that a reader of whole rows does not need all memory at once."""
_AS_TEXT = ("kind", "example", "error", "finish_reason", "scores", "metadata", "steps")
_DICTIONARY = [*_AS_TEXT, *(f"{name}.list.element" for name in ("roles", "contents", "item_metadata", "others"))]
_DICTIONARY += ["token_texts.list.element.list.element", "token_ids.list.element.list.element"]
_SPLIT = {"logprobs.list.element.list.element": "BYTE_STREAM_SPLIT"}
"""Prompt ids stay plain: a turn's begin with those of the turn before, which zstd finds where bytes are aligned."""


def write_trajectories(folder: Path, epoch: int, run_id: str, collection: TrajectoryCollection) -> int:
    """Writes an epoch's file in place of one that an append left behind which did not come to its end. Returns its size
    in bytes. Raises StoreError; the folder is then as it was."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = trajectory_file(folder, epoch)
    try:
        table = table_of(collection.trajectories, collection.failures)
        groups = len(collection.trajectories)
        about = {"format": FORMAT, "run_id": run_id, "collection": collection.run_id, "epoch": epoch, "groups": groups}
        table = table.replace_schema_metadata({KEY: encode(about)})
        check_plain(path.parent)
        path.parent.mkdir(exist_ok=True)
        write_durably(
            path,
            lambda file: pq.write_table(
                table,
                file,
                row_group_size=ROWS_PER_GROUP,
                compression="zstd",
                use_dictionary=_DICTIONARY,  # type: ignore[arg-type]  # the stubs know the bool only
                column_encoding=_SPLIT,
                write_statistics=False,
                write_page_checksum=True,
            ),
        )
        return os.stat(path).st_size
    except (OSError, pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreError(
            f"{path} could not be written: {type(error).__name__}: {error}. Epoch {epoch} is not recorded; everything "
            "before it is kept. Remove the cause (a full disk, say) and append the epoch again."
        ) from error


def read_trajectories(folder: Path, epoch: int, run_id: str, rows: int, groups: int) -> TrajectoryCollection:
    """The trajectories of an epoch. rows, groups: how many run.db says that there are. Raises StoreError."""
    with _reading(folder, epoch, run_id, rows, groups) as file:
        return collection_of(_checked(file.read(list(COLUMNS), use_threads=False)), _about(file)["collection"], groups)


def read_columns(folder: Path, epoch: int, run_id: str, rows: int, groups: int, names: Sequence[str]) -> pa.Table:
    """Some columns of an epoch, by the names in trajectory_table.py; nothing else is read. Raises StoreError."""
    if unknown := [name for name in names if name not in COLUMNS]:
        raise StoreError(f"found columns {unknown}; the file of an epoch has {', '.join(COLUMNS)}.")
    with _reading(folder, epoch, run_id, rows, groups) as file:
        return _checked(file.read(list(names), use_threads=False))


@contextmanager
def _reading(folder: Path, epoch: int, run_id: str, rows: int, groups: int) -> Iterator[Any]:
    """The open Parquet file, once its columns and counts are found to be the expected ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = trajectory_file(folder, epoch)
    try:
        check_plain(path.parent, path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            types = {
                field.name: str(field.type).replace("element: ", "").replace("item: ", "")
                for field in file.schema_arrow
            }
            for name, allowed in COLUMNS.items():
                if types.get(name) not in allowed:
                    raise ValueError(f"column {name} is {types.get(name, 'missing')}, expected {' or '.join(allowed)}")
            about = _about(file)
            found = (about["run_id"], about["epoch"], about["groups"], file.metadata.num_rows)
            if found != (run_id, epoch, groups, rows):
                raise ValueError(
                    "run, epoch, groups and rows are {!r}, {!r}, {!r}, {!r}".format(*found)
                    + f"; run.db says {run_id!r}, {epoch}, {groups}, {rows}"
                )
            yield file
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


def _about(file: Any) -> dict[str, Any]:
    about = decode(((file.schema_arrow.metadata or {}).get(KEY) or b"").decode("ascii", "replace"), dict)
    if about.get("format") != FORMAT:
        raise ValueError(f"format {about.get('format')!r}, expected {FORMAT}; update finetune_nb to read a newer one")
    if not isinstance(about.get("collection"), str):
        raise ValueError("it does not say which run it belongs to")
    return about


def _checked(table: pa.Table) -> pa.Table:
    table.validate(full=True)
    return table


# ── batches of an unfinished epoch ───────────────────────────────────────────────────────────────────────────────────


def batch_of(collection: TrajectoryCollection, whole: bool) -> bytes:
    """Rollouts as bytes. whole: these are all of the epoch's, and their groups are kept. Raises StoreError for what
    cannot be written down."""
    import pyarrow as pa

    try:
        table = table_of(collection.trajectories, collection.failures)
        if whole:
            table = table.replace_schema_metadata({KEY: encode({"groups": len(collection.trajectories)})})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreError(f"a rollout cannot be written down: {type(error).__name__}: {error}.") from error


def collection_of_batches(batches: Sequence[bytes], run_id: str) -> TrajectoryCollection:
    """The rollouts of several batches, grouped by example; a whole one is alone, and in its own groups. Raises
    StoreError."""
    import pyarrow as pa

    groups: dict[Any, list[Trajectory]] = {}
    failures: list[RolloutFailure] = []
    try:
        for batch in batches:
            with pa.ipc.open_stream(pa.BufferReader(batch)) as reader:
                table = _checked(reader.read_all())
            if about := (table.schema.metadata or {}).get(KEY):
                return collection_of(table, run_id, int(decode(about.decode("ascii", "replace"), dict)["groups"]))
            found = collection_of(table, run_id, None)
            for group in found.trajectories:
                groups.setdefault(encode((group[0].metadata or {}).get("id")), []).extend(group)
            failures += found.failures
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise StoreError(
            f"the rollouts of the unfinished epoch cannot be read: {type(error).__name__}: {str(error)[:500]}. "
            "Completed epochs are not touched by that."
        ) from error
    return TrajectoryCollection.model_construct(trajectories=list(groups.values()), run_id=run_id, failures=failures)
