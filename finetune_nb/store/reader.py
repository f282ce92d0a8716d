"""Reads a run's folder: epochs, journal, validations, events, and the epoch that was not finished.

Nothing here changes a byte, but for the signature of a folder that the user says to trust. run.db is trusted to be ours only
after its values have been looked at; every error is a StoreError that names the file.
"""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.yaml import MAX_CHARACTERS, read_yaml
from ..errors import FinetuneError, StoreError
from ..redaction import redacting_logger
from ..text import one_line
from ..types import (
    Change,
    Epoch,
    Selection,
    TrainingJobRef,
    TrainingJobStatus,
    TrajectoryCollection,
    Validation,
    as_float,
)
from .batches import DecodedBatches, collection_of_batches
from .database import (
    change_from_row,
    epoch_from_row,
    read,
    selection_from_json,
    unreadable_epoch,
    validation_from_json,
)
from .durable import check_plain, size_of
from .folder import CONFIG, DATABASE, LOG, RUN_ID, trajectory_file, writer_of
from .json import decode
from .trajectories import read_columns, read_row_group, read_trajectories
from .trajectory_table import COLUMNS, table_of
from .trust import is_signed, sign

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "PartialEpoch",
    "RunReader",
    "StoredEpoch",
    "as_store_error",
    "trajectory_columns",
]

T = TypeVar("T")
logger = redacting_logger(__name__)

_DOES_NOT_FIT = (
    FinetuneError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
    AttributeError,
)
"""What reading a row raises where it holds something else than what a run writes."""


class StoredEpoch(Epoch):
    """An Epoch whose collection is read from its file when it is asked for, and forgotten when nobody holds it."""

    def __init__(
        self,
        *,
        collection: TrajectoryCollection | Callable[[], TrajectoryCollection],
        columns: Callable[[Sequence[str]], pa.Table] | None = None,
        row_group: Callable[[int, Iterable[str]], tuple[int, pa.Table]] | None = None,
        **record: Any,
    ) -> None:
        # dataclasses.replace hands over a collection; then it is this epoch's own, as in any other Epoch.
        vars(self).update(record, _collection=collection, _columns=columns, _row_group=row_group)

    _collection: TrajectoryCollection | Callable[[], TrajectoryCollection]
    _columns: Callable[[Sequence[str]], pa.Table] | None
    _row_group: Callable[[int, Iterable[str]], tuple[int, pa.Table]] | None

    @property
    def collection(self) -> TrajectoryCollection:  # type: ignore[override]
        """Raises StoreError where the file is missing or damaged."""
        found = self._collection
        return found if isinstance(found, TrajectoryCollection) else found()

    @property
    def columns(self) -> Callable[[Sequence[str]], pa.Table] | None:
        """`columns(["generation", "reward"])`: those columns, by their names in store.trajectory_table.COLUMNS, straight from
        the file and without making the trajectories. None where the epoch has no file."""
        return self._columns

    @property
    def row_group(self) -> Callable[[int, Iterable[str]], tuple[int, pa.Table]] | None:
        """`row_group(7, ["reward"])`: those columns of the part of the file that has row 7, as the place of its first row and a
        table. None where the epoch has no file."""
        return self._row_group


def trajectory_columns(epoch: Epoch, names: Sequence[str]) -> pa.Table:
    """Columns of an epoch's trajectories: those of its file or, if it has none, made from the rollouts in memory.

    Args:
        epoch: Its record.
        names: The columns, by their names in store.trajectory_table.COLUMNS.

    Returns:
        (N) rows.
    """
    read = getattr(epoch, "columns", None)
    if read is None:
        return table_of(epoch.collection.trajectories, (), names)
    return read(names).slice(0, len(epoch.statistics.rewards))  # failures come after them


@dataclass(frozen=True)
class PartialEpoch:
    """An epoch that has begun and has not finished."""

    index: int
    collection: TrajectoryCollection
    """The rollouts so far, grouped by example."""
    job: TrainingJobRef | None
    status: TrainingJobStatus | None
    started_at: float
    """Seconds since 1970, UTC."""
    policy_version: int | None
    validations: tuple[Validation, ...] = ()
    selection: Selection | None = None
    """Which groups were to be trained on, where it came so far."""
    seconds: Mapping[str, float] = field(default_factory=dict)


class _Collection:
    """The trajectories of one epoch, read when called; held only as long as somebody else holds them."""

    def __init__(self, read: Callable[[], TrajectoryCollection], keep: Callable[[TrajectoryCollection], None]) -> None:
        self._read, self._keep = read, keep
        self._known: weakref.ref[TrajectoryCollection] | None = None

    def __call__(self) -> TrajectoryCollection:
        found = self.held
        if found is None:
            found = self._read()
            self.remember(found)
        self._keep(found)
        return found

    @property
    def held(self) -> TrajectoryCollection | None:
        """The trajectories, if they are in memory."""
        return self._known() if self._known else None

    def remember(self, collection: TrajectoryCollection) -> None:
        self._known = weakref.ref(collection)


class RunReader:
    """What a run's folder holds."""

    _db: sqlite3.Connection | None = None
    """The writer's connection, where this is the writer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._turn = threading.RLock()
        self._epochs: list[StoredEpoch] = []
        self._revision = -1
        self._warned: set[str] = set()
        self._newest: TrajectoryCollection | None = None  # so that a loop over one epoch does not read it twice
        self.run_id, self.created_at, self.parent = self._read(_run_of)
        """The run's id, when it was made (seconds since 1970, UTC), and the run and epoch that it was forked from."""

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._turn, self._as_store_error():
            return work(self._db) if self._db is not None else read(self.folder, work)

    def _as_store_error(self) -> AbstractContextManager[None]:
        return as_store_error(self.folder / DATABASE, "Nothing was changed; the Parquet files beside it are whole.")

    @property
    def epochs(self) -> list[StoredEpoch]:
        """The completed epochs, in order; a reader's since its last `refresh`. Trajectories are read when asked for."""
        if self._revision < 0:
            self.refresh()
        return list(self._epochs)

    def refresh(self) -> None:
        """Sees what a writer has added since."""
        with self._turn:
            revision, new = self._read(self._new_epochs)
            if revision != self._revision:
                self._epochs, self._revision = [], revision
            self._epochs += new

    def _new_epochs(self, db: sqlite3.Connection) -> tuple[int, list[StoredEpoch]]:
        revision = int(db.execute("SELECT revision FROM run").fetchone()[0])
        since = self._epochs[-1].index if self._epochs and revision == self._revision else -1
        validations: dict[int, list[Validation]] = {}
        query = "SELECT place, epoch, record FROM validations WHERE epoch > ? ORDER BY place"
        for row in db.execute(query, (since,)):
            found = self._or_none("validations", row["place"], lambda row=row: validation_from_json(row["record"]))
            if found is not None:
                validations.setdefault(row["epoch"], []).append(found)

        epochs: list[StoredEpoch] = []
        unreadable: list[Exception] = []
        for row in db.execute("SELECT * FROM epochs WHERE epoch > ? ORDER BY epoch", (since,)):
            if row["epoch"] <= (epochs[-1].index if epochs else since):
                raise sqlite3.DatabaseError("the table of epochs leads back to itself")
            try:
                record = epoch_from_row(row)
            except _DOES_NOT_FIT as error:
                unreadable.append(error)
                epochs.append(self._unreadable(row, error, validations))
            else:
                epochs.append(self._stored(record, validations))
        if unreadable and len(unreadable) == len(epochs) and since < 0:
            raise unreadable[0]  # there is nothing to show
        return revision, epochs

    def _unreadable(
        self, row: Mapping[str, Any], error: Exception, validations: Mapping[int, list[Validation]]
    ) -> StoredEpoch:
        """In place of an epoch whose row cannot be read: its number, and why. The other epochs keep their places."""
        index = int(row["epoch"])
        reason = self._tell("epochs", f"epoch {index}", error)
        return StoredEpoch(
            collection=TrajectoryCollection(trajectories=[], run_id=self.run_id),
            validations=tuple(validations.get(index, ())),
            **unreadable_epoch(row, self.run_id, f"{reason} Its trajectories are in {trajectory_file(Path(), index)}."),
        )

    def _or_none(self, table: str, row: Any, make: Callable[[], T]) -> T | None:
        """What is made of a row; None, with a warning that names the row, where it does not fit: one bad row hides no
        other."""
        try:
            return make()
        except _DOES_NOT_FIT as error:
            self._tell(table, f"row {row}", error)
            return None

    def _tell(self, table: str, row: str, error: Exception) -> str:
        """Warns once of a row that cannot be read, and returns what is said."""
        what = f"{row} of the table {table} cannot be read: {type(error).__name__}: {one_line(error)}."
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s: %s Everything else is shown.", self.folder / DATABASE, what)
        return what

    def _stored(self, record: dict[str, Any], validations: Mapping[int, list[Validation]]) -> StoredEpoch:
        index, statistics = record["index"], record["statistics"]
        rows, groups = len(statistics.rewards) + record.pop("failures"), len(statistics)
        collection = _Collection(lambda: read_trajectories(self.folder, index, self.run_id, rows, groups), self._keep)

        def columns(names: Sequence[str]) -> pa.Table:
            try:
                return read_columns(self.folder, index, self.run_id, rows, groups, names)
            except StoreError:
                held = collection.held
                if held is None or not set(names) <= COLUMNS.keys():
                    raise
                return table_of(held.trajectories, held.failures, names)  # the file is gone, what it held is not

        def row_group(row: int, names: Iterable[str]) -> tuple[int, pa.Table]:
            return read_row_group(self.folder, index, self.run_id, rows, groups, row, names)

        return StoredEpoch(
            collection=collection,
            columns=columns,
            row_group=row_group,
            validations=tuple(validations.get(index, ())),
            **record,
        )

    def _keep(self, collection: TrajectoryCollection) -> None:
        self._newest = collection

    def columns(self, index: int, names: Sequence[str]) -> pa.Table:
        """Some columns of an epoch's trajectories and failures, without reading the others.

        Args:
            index: The epoch's number.
            names: The columns, by their names in store.trajectory_table.COLUMNS.

        Returns:
            One row a trajectory, in the collection's order, and then one a failure. A column that the file of an older
            release has not is there with missing values.

        Raises:
            StoreError: There is no such epoch or column, or the file is missing or damaged.
        """
        columns = self._epoch(index).columns
        assert columns is not None  # an epoch of ours has a file
        return columns(names)

    @property
    def next_index(self) -> int:
        """The epoch that comes next: 0 for a new run, for a fork the one after its parent's."""
        if self.epochs:
            return self._epochs[-1].index + 1
        return self.parent[1] + 1 if self.parent else 0

    def _epoch(self, index: int) -> StoredEpoch:
        for epoch in self.epochs:
            if epoch.index == index:
                return epoch
        raise StoreError(f"run {self.run_id!r} has no completed epoch {index!r}; it has {len(self._epochs)}.")

    def partial(self, decoded: DecodedBatches | None = None) -> PartialEpoch | None:
        """The epoch that has begun and is not complete; None where there is none. decoded: as in `collection_of_batches`."""

        def work(db: sqlite3.Connection) -> tuple[Any, list[bytes], list[Any]] | None:
            row = db.execute("SELECT * FROM unfinished ORDER BY epoch DESC LIMIT 1").fetchone()
            if row is None:
                return None
            epoch = (int(row["epoch"]),)
            batches = [r[0] for r in db.execute("SELECT data FROM rollouts WHERE epoch = ? ORDER BY batch", epoch)]
            query = "SELECT place, record FROM validations WHERE epoch = ? ORDER BY place"
            return row, batches, db.execute(query, epoch).fetchall()

        found = self._read(work)
        if found is None:
            return None
        # Decoded here, so that whoever writes the epoch does not wait for it.
        with self._as_store_error():
            return self._partial_of(*found, decoded)

    def _partial_of(
        self, row: Any, batches: list[bytes], validations: list[Any], decoded: DecodedBatches | None
    ) -> PartialEpoch:
        index = int(row["epoch"])
        ref, status = row["job_ref"], row["job_status"]
        place = f"of epoch {index}"
        selected = row["selection"] and self._or_none(
            "unfinished", place, lambda: selection_from_json(row["selection"])
        )
        selection, seconds = selected or (None, {})
        checks = [
            self._or_none("validations", each["place"], lambda each=each: validation_from_json(each["record"]))
            for each in validations
        ]
        return PartialEpoch(
            index=index,
            collection=collection_of_batches(batches, self.run_id, decoded),
            job=ref and self._or_none("unfinished", place, lambda: TrainingJobRef.model_validate(decode(ref))),
            status=status
            and self._or_none("unfinished", place, lambda: TrainingJobStatus.model_validate(decode(status))),
            started_at=as_float(row["started_at"]),
            policy_version=row["policy_version"] if isinstance(row["policy_version"], int) else None,
            validations=tuple(each for each in checks if each is not None),
            selection=selection,
            seconds=seconds,
        )

    def partial_stamp(self) -> tuple[Any, ...] | None:
        """A value that changes when the rollouts of the unfinished epoch do; None where there is none. It takes less than a
        millisecond, so it can be asked every second."""

        def work(db: sqlite3.Connection) -> tuple[Any, ...] | None:
            row = db.execute("SELECT epoch, started_at FROM unfinished ORDER BY epoch DESC LIMIT 1").fetchone()
            if row is None:
                return None
            of_epoch = "SELECT count(*), max(batch), total(length(data)) FROM rollouts WHERE epoch = ?"
            return (*row, *db.execute(of_epoch, (row["epoch"],)).fetchone())

        return self._read(work)

    def state(self) -> dict[str, Any] | None:
        """What resuming after the last completed epoch needs; of a fork that has none, what it starts from; else None."""

        def work(db: sqlite3.Connection) -> dict[str, Any] | None:
            for row in db.execute("SELECT epoch, state FROM epochs ORDER BY epoch DESC"):
                if self._db is not None:
                    return decode(row["state"], dict)  # to continue from an older one would be another run
                found = self._or_none("epochs", row["epoch"], lambda row=row: decode(row["state"], dict))
                if found is not None:
                    return found
            row = db.execute("SELECT start FROM run WHERE start IS NOT NULL").fetchone()
            return None if row is None else decode(row[0], dict)

        return self._read(work)

    def start(self) -> dict[str, Any] | None:
        """What a fork starts from; None for a run that is none."""

        def work(db: sqlite3.Connection) -> dict[str, Any] | None:
            row = db.execute("SELECT start FROM run WHERE start IS NOT NULL").fetchone()
            return None if row is None else decode(row[0], dict)

        return self._read(work)

    def state_of(self, index: int) -> dict[str, Any]:
        """The same after another epoch; of a fork also after the one that it starts from."""

        def work(db: sqlite3.Connection) -> dict[str, Any]:
            row = db.execute("SELECT state FROM epochs WHERE epoch = ?", (index,)).fetchone()
            start = "SELECT start FROM run WHERE parent_epoch = ? AND start IS NOT NULL"
            row = row or db.execute(start, (index,)).fetchone()
            if row is None:
                raise StoreError(f"run {self.run_id!r} has no completed epoch {index!r} to continue from.")
            return decode(row[0], dict)

        return self._read(work)

    def journal(self) -> list[Change]:
        """Every change of the controls, in order."""
        query = "SELECT place, time, source, field, old, new, epoch FROM changes ORDER BY place"

        def change(row: Mapping[str, Any]) -> Change:
            found = self._or_none("changes", row["place"], lambda: change_from_row(row))
            # Changes are known by their places, so this one keeps its own.
            return found or Change(as_float(row["time"]), "?", "row.unreadable", None, None, row["epoch"] or 0)

        return self._read(lambda db: [change(row) for row in db.execute(query)])

    @property
    def validations(self) -> list[Validation]:
        """Those that belong to no epoch: asked for by hand."""
        query = "SELECT place, record FROM validations WHERE epoch IS NULL ORDER BY place"

        def work(db: sqlite3.Connection) -> list[Validation]:
            found = [
                self._or_none("validations", row["place"], lambda row=row: validation_from_json(row["record"]))
                for row in db.execute(query)
            ]
            return [each for each in found if each is not None]

        return self._read(work)

    @property
    def run_state(self) -> str:
        """What the run is doing, or was when its writer ended: "new", "running", ...; "interrupted" where it was running
        and nobody writes it any more."""
        told = self._read(lambda db: str(db.execute("SELECT state FROM run").fetchone()[0]))
        return "interrupted" if told == "running" and self.writer is None else told

    @property
    def writer(self) -> str | None:
        """Who writes the run at the moment: "process 4711 on host since ..."; None where nobody does."""
        return writer_of(self.folder)

    def events(self, kind: str | None = None, last: int | None = None) -> list[dict[str, Any]]:
        """The log, oldest first: `time`, `kind` and what was said. A line that a crash cut off is passed over. last: no more
        than that many, read from the end, so that the last words of a long run cost no more than those of a short one."""
        path = self.folder / LOG
        with as_store_error(path, "Everything else can be read."):
            check_plain(path)
            if not path.exists():
                return []
            with path.open("rb") as file:
                size = path.stat().st_size
                reach = size if last is None else 65_536
                while True:
                    file.seek(max(0, size - reach))
                    lines = file.read().split(b"\n")[reach < size :]  # the first one has lost its beginning
                    found = [event for event in map(_event, lines) if event and kind in (None, event["kind"])]
                    if last is None:
                        return found
                    if reach >= size or len(found) >= last:
                        return found[max(0, len(found) - last) :]
                    reach *= 4

    def config(self) -> dict[str, Any]:
        """The config as plain data, `${NAME}` where it stood; `load_config` takes it."""
        return self.config_and_owner()[0]

    def config_and_owner(self, trust: bool = False) -> tuple[dict[str, Any], bool]:
        """The config as plain data, and whether this user wrote it: what is not theirs is only to be looked at.

        Args:
            trust: The user says that it is theirs, or as good as that: the folder is signed with their key. Where it cannot
                be written, it is theirs for this time only.

        Raises:
            StoreError: There is no config.yml, or it cannot be read.
        """
        path = self.folder / CONFIG
        with as_store_error(path, "Everything else can be read."):
            check_plain(path)
            # Read once: what is parsed is what was signed.
            with path.open("rb") as file:
                text = file.read(4 * MAX_CHARACTERS + 1)
            found = read_yaml(text.decode("utf-8"), str(path))
            if not isinstance(found, dict):
                raise ValueError(f"{type(found).__name__} where a mapping was expected")
        own = is_signed(self.folder, self.run_id, text)
        if trust and not own:
            own = True
            try:
                sign(self.folder, self.run_id, text)
            except (OSError, StoreError) as error:
                logger.warning("%s is trusted this time, and cannot be signed: %s", path, error)
        return found, own

    def size(self) -> int:
        """Bytes of all files in the folder."""
        return size_of(self.folder)


def _event(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None for one that is none."""
    try:
        event = decode(line.decode("utf-8", errors="replace"), dict)
    except ValueError:
        return None
    return event if "kind" in event else None


def _run_of(db: sqlite3.Connection) -> tuple[str, float, tuple[str, int] | None]:
    row = db.execute("SELECT id, created_at, parent, parent_epoch FROM run").fetchone()
    if row is None or not isinstance(row["id"], str) or not RUN_ID.fullmatch(row["id"]):
        raise ValueError(f"it holds no run, or one whose id is none: {row and row['id']!r}")
    parent = None if row["parent"] is None else (str(row["parent"]), int(row["parent_epoch"]))
    return row["id"], float(row["created_at"]), parent


@contextmanager
def as_store_error(path: Path, kept: str) -> Iterator[None]:
    """What goes wrong with a file as a StoreError that names it. kept: what the reader need not fear for."""
    try:
        yield
    except StoreError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{path}: {type(error).__name__}: {error}. {kept}") from error
    except _DOES_NOT_FIT as error:
        raise StoreError(
            f"{path} holds what no run of finetune_nb writes: {type(error).__name__}: {str(error)[:500]}. {kept}"
        ) from error
