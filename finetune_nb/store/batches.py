"""Rollouts of an unfinished epoch as bytes, batch by batch: their table (trajectory_table) as an Arrow stream. Every error is a
StoreError.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..redaction import redacting_logger
from ..types import RolloutFailure, Trajectory, TrajectoryCollection
from .json import decode, encode
from .trajectory_table import KEY, check_columns, checked, collection_of, joined, parts, storable

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "DecodedBatches",
    "batches_of",
    "collection_of_batches",
]

logger = redacting_logger(__name__)

PARTS_PER_BATCH = 8
"""Parts of a table in a batch, at most: SQLite takes no value of more than a gigabyte."""


def batches_of(collection: TrajectoryCollection, whole: bool) -> Iterator[tuple[bytes, bool]]:
    """Rollouts of an unfinished epoch as bytes, in one batch or several.

    Args:
        collection: The rollouts.
        whole: Whether these are all of the epoch's, so that their groups are kept. They are then read again if all of these
            batches are there.

    Yields:
        A batch, and whether it is the last one.

    Raises:
        StoreError: A rollout cannot be written down.
    """
    import pyarrow as pa

    waiting = list(parts(collection.trajectories, collection.failures))
    count = math.ceil(len(waiting) / PARTS_PER_BATCH)
    about: dict[str, Any] = {"groups": len(collection.trajectories)}
    if count > 1:  # under another key, so that an earlier release does not take one of them for all
        about = {"set": uuid.uuid4().hex, "batches": count, "groups_in_all": len(collection.trajectories)}
    try:
        for number in range(1, count + 1):
            some = waiting[(number - 1) * PARTS_PER_BATCH : number * PARTS_PER_BATCH]
            table = joined(list(map(storable, some)))
            if whole:
                table = table.replace_schema_metadata({KEY: encode(about)})
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
                writer.write_table(table)
            yield sink.getvalue().to_pybytes(), number == count
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise StoreError(f"a rollout cannot be written down: {type(error).__name__}: {error}.") from error


DecodedBatches = dict[bytes, TrajectoryCollection]
"""Batches of rollouts, or all batches of a whole epoch, by the digest of their bytes."""


def collection_of_batches(
    batches: Sequence[bytes], run_id: str, decoded: DecodedBatches | None = None
) -> TrajectoryCollection:
    """The rollouts of several batches, grouped by example; those of a whole epoch are alone, and in their own groups.

    Args:
        batches: As `batches_of` makes them.
        run_id: Of the run.
        decoded: What earlier calls have decoded, which is not decoded again: whoever reads an epoch again and again while it
            grows keeps it, and changes nothing in what is returned. Left with the batches of this call.

    Raises:
        StoreError: No batch can be read.
    """
    import pyarrow as pa

    unreadable = (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, RecursionError)
    read = _Batches(run_id, decoded)
    whole: dict[str, list[bytes]] = {}
    said: dict[str, dict[str, Any]] = {}
    others: list[tuple[int, bytes]] = []
    for number, batch in enumerate(batches):
        try:
            about = _about_batch(batch)
        except unreadable as error:
            read.note(number, error)
            continue
        if about is None:
            others.append((number, batch))
        else:
            name = str(about.get("set"))
            said[name] = about
            whole.setdefault(name, []).append(batch)

    # The newest one that was written to its end; an attempt that was not is passed over.
    for name, found in reversed(whole.items()):
        if len(found) == said[name].get("batches", 1):
            try:
                return read.decode(found, said[name]["groups" if len(found) == 1 else "groups_in_all"])
            except unreadable as error:
                read.note(batches.index(found[0]), error)

    groups: dict[Any, list[Trajectory]] = {}
    failures: list[RolloutFailure] = []
    for number, batch in others:
        try:
            found = read.decode([batch], None)
        except unreadable as error:
            read.note(number, error)
            continue
        for group in found.trajectories:
            groups.setdefault(encode((group[0].metadata or {}).get("id")), []).extend(group)
        failures += found.failures
    if read.errors and not groups and not failures:
        raise read.errors[0]
    for each in read.errors:
        logger.warning("%s The other batches are shown.", each)
    return TrajectoryCollection.model_construct(trajectories=list(groups.values()), run_id=run_id, failures=failures)


class _Batches:
    """Decodes batches, and keeps what it decoded for the next time."""

    def __init__(self, run_id: str, decoded: DecodedBatches | None) -> None:
        self._run_id, self._decoded = run_id, decoded
        self._known = dict(decoded or {})
        self.errors: list[StoreError] = []
        if decoded is not None:
            decoded.clear()

    def decode(self, batches: Sequence[bytes], groups: int | None) -> TrajectoryCollection:
        """The rollouts of batches that belong together. groups: as `collection_of` takes it."""
        if self._decoded is None:
            return self._collection(batches, groups)
        digest = hashlib.blake2b(digest_size=16)
        for batch in batches:
            digest.update(batch)
        key = digest.digest()
        found = self._decoded[key] = self._known.get(key) or self._collection(batches, groups)
        return found

    def _collection(self, batches: Sequence[bytes], groups: int | None) -> TrajectoryCollection:
        return collection_of(joined(list(map(_table_of_batch, batches))), self._run_id, groups)

    def note(self, number: int, error: Exception) -> None:
        """Notes that a batch cannot be read."""
        problem = f"{type(error).__name__}: {str(error)[:500]}"
        what = f"batch {number} of the rollouts of the unfinished epoch cannot be read: {problem}."
        self.errors.append(StoreError(f"{what} Completed epochs are not touched by that."))


def _about_batch(batch: bytes) -> dict[str, Any] | None:
    """What a batch of a whole epoch says of it; None for one of single rollouts."""
    import pyarrow as pa

    with pa.ipc.open_stream(pa.BufferReader(batch)) as reader:
        about = (reader.schema.metadata or {}).get(KEY)
    return None if about is None else decode(about.decode("ascii", "replace"), dict)


def _table_of_batch(batch: bytes) -> pa.Table:
    import pyarrow as pa

    with pa.ipc.open_stream(pa.BufferReader(batch)) as reader:
        table = checked(reader.read_all())
    # A batch does not say its format: a column that came later than the first one may be missing from any.
    check_columns(table.schema, format=1)
    return table.replace_schema_metadata(None)
