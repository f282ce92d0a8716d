"""RunStore: everything that a run records, in one folder that can be moved, copied, and read while it is written.

    run.db                             epochs, curriculum, validations, journal (SQLite)
    trajectories/epoch-000003.parquet  one row = one trajectory or failed rollout (Parquet)
    config.yml                         the config, without secrets
    signature                          says, to the user whose key made it, that config.yml is their own
    checkpoints/epoch-000003/          the adapter's own files
    log.jsonl                          events, one a line
    lock                               who is writing

An epoch is whole or not there: its Parquet file is on the disk before run.db names it. Every method may be called from
any thread, and blocks: on an event loop, use threads.in_daemon_thread.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..config.yaml import dump_yaml
from ..errors import StoreError
from ..redaction import redacting_logger
from ..text import one_line
from ..types import Change, Epoch, Selection, TrainingJobRef, TrainingJobStatus, TrajectoryCollection, Validation
from .batches import batches_of
from .database import (
    EmptyRun,
    UnreadableRecord,
    epoch_from_row,
    epoch_to_row,
    job_ref_to_json,
    migrate,
    open_to_write,
    read,
    readable,
    selection_to_json,
    status_to_json,
    validation_from_json,
    validation_to_row,
    whole_number,
)
from .durable import append_line, check_plain, write_durably
from .folder import CONFIG, DATABASE, LOG, RUN_ID, TRAJECTORIES, WriteLock, remove_leftovers, remove_temporary
from .json import encode, noting_replaced
from .labels import remove_labels_after
from .reader import RunReader, StoredEpoch, as_store_error
from .trajectories import write_trajectories
from .trust import sign

__all__ = [
    "FolderGone",
    "RunStore",
]

logger = redacting_logger(__name__)


_not_closed: list[sqlite3.Connection] = []


class FolderGone(StoreError):
    """The folder of a run that is written was moved, deleted or replaced."""


class RunStore(RunReader):
    """One run's folder. Made by `create` and `open`; every error is a StoreError."""

    def __init__(self, folder: Path, lock: WriteLock | None, db: sqlite3.Connection | None) -> None:
        self._lock, self._db, self._pid = lock, db, os.getpid()
        self._file = None if db is None else _identity(folder / DATABASE)
        self._told: set[str] = set()  # fields of which it was said that their values are stored as something less
        super().__init__(folder)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        run_id: str,
        config: Mapping[str, Any],
        parent: tuple[str, int] | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> RunStore:
        """A new run, to be written. config: `Config.stored()`. parent: run id and epoch of which it is a fork. start:
        the state after that epoch, which it continues from."""
        folder = Path(folder)
        if not RUN_ID.fullmatch(run_id):
            raise StoreError(
                f"run id {run_id!r}: expected letters, digits, '.', '_' and '-', at most 100, no leading sign."
            )
        with as_store_error(folder, "No run was made."):
            folder.mkdir(parents=True, exist_ok=True)
            check_plain(folder / TRAJECTORIES, folder / CONFIG, folder / LOG)
            with _opened(folder, create=True) as (lock, db):
                (folder / TRAJECTORIES).mkdir(exist_ok=True)
                remove_leftovers(folder.parent)
                text = dump_yaml(dict(config)).encode()
                write_durably(folder / CONFIG, lambda file: file.write(text))
                sign(folder, run_id, text)
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                migrate(db)
                db.execute(
                    "INSERT INTO run (one, id, created_at, state, parent, parent_epoch, start) "
                    "VALUES (1, ?, ?, 'new', ?, ?, ?)",
                    (run_id, time.time(), *(parent or (None, None)), start and encode(dict(start), strict=True)),
                )
                db.execute("COMMIT")
                db.execute("PRAGMA synchronous = NORMAL")
                return cls(folder, lock, db)

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether there is a run, damaged or not; False also if its creation did not finish."""
        try:
            read(Path(folder), lambda db: None)
        except EmptyRun:
            return False
        except (StoreError, sqlite3.Error, ValueError):
            return (Path(folder) / DATABASE).exists()
        return True

    @classmethod
    def open(cls, folder: str | Path, write: bool = False) -> RunStore:
        """A run from its folder. Without `write` nothing is locked or changed; `refresh` shows what a writer adds."""
        folder = Path(folder)
        if not write:
            return cls(folder, None, None)
        with as_store_error(folder / DATABASE, "Nothing was changed."):
            if not folder.is_dir():
                raise StoreError(f"there is no folder {folder}, so no run to open. Give the folder that holds one.")
            with _opened(folder) as (lock, db):
                remove_temporary(folder)
                remove_leftovers(folder.parent)
                db.execute("BEGIN IMMEDIATE")
                migrate(db)
                db.execute("COMMIT")
                return cls(folder, lock, db)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin_epoch(self, index: int, started_at: float, policy_version: int | None) -> bool:
        """An epoch begins. What an earlier attempt at it left is removed; returns whether there was one. The trajectories of the
        epoch before make room: they are read again where they are asked for."""
        with self._naming(f"epoch {index}"):
            version = whole_number(policy_version, "policy_version")
        with self._transaction(f"the begin of epoch {index}") as db:
            self._require_next(db, index)
            left = db.execute("DELETE FROM unfinished").rowcount > 0
            db.execute("DELETE FROM rollouts")
            db.execute("DELETE FROM validations WHERE epoch = ?", (index,))
            db.execute(
                "INSERT INTO unfinished (epoch, started_at, policy_version) VALUES (?, ?, ?)",
                (index, started_at, version),
            )
        self._newest = None
        return left

    def add_rollouts(self, index: int, rollouts: TrajectoryCollection, whole: bool = False) -> None:
        """Rollouts of the epoch that has begun, as they come in; best several at once, in any groups. They are there for
        the case that the epoch does not finish: `append` replaces them. whole: these are all of them, in their
        groups, in place of what came in before."""
        first = None
        with self._naming(f"epoch {index}"):
            for batch, is_last in batches_of(rollouts, whole):  # each by itself, so that nobody waits for all of them
                replaces = whole and is_last
                with self._transaction(f"rollouts of epoch {index}", durable=replaces) as db:
                    self._require_begun(db, index)
                    added = db.execute("INSERT INTO rollouts (epoch, data) VALUES (?, ?)", (index, batch)).lastrowid
                    first = added if first is None else first
                    if replaces:
                        db.execute("DELETE FROM rollouts WHERE epoch = ? AND batch < ?", (index, first))

    def record_selection(self, index: int, selection: Selection, seconds: Mapping[str, float]) -> None:
        """Which groups of the epoch that has begun are trained on, right before they are handed over. seconds: what
        each part of the epoch has taken so far."""
        self._set_unfinished(index, "selection", lambda: selection_to_json(selection, seconds))

    def record_job(self, index: int, ref: TrainingJobRef) -> None:
        """The training job of the epoch that has begun."""
        self._set_unfinished(index, "job_ref", lambda: job_ref_to_json(ref))

    def record_status(self, index: int, status: TrainingJobStatus) -> None:
        """The status of that job."""
        self._set_unfinished(index, "job_status", lambda: status_to_json(status), durable=False)

    def _set_unfinished(self, index: int, column: str, make: Callable[[], str], durable: bool = True) -> None:
        with self._naming(f"epoch {index}"):
            text = make()
        with self._transaction(f"the training of epoch {index}", durable) as db:
            self._require_begun(db, index)
            db.execute(f"UPDATE unfinished SET {column} = ? WHERE epoch = ?", (text, index))

    def append(self, epoch: Epoch, state: Mapping[str, Any]) -> StoredEpoch:
        """Ends an epoch. Where it fails nothing of it is there, and it can be appended again.

        Args:
            epoch: Its record. A value that JSON does not know is stored as a short text, with a warning.
            state: What resuming after it needs, in plain JSON data.

        Returns:
            The record as it can be read; it is on the disk when this returns.

        Raises:
            UnreadableRecord: It could not be read again, so it was not written.
            StoreError: It cannot be written at the moment.
        """
        with self._turn, self._naming(f"epoch {epoch.index}") as replaced:
            self._require_writable()
            self._read(lambda db: self._require_next(db, epoch.index))
            try:
                stored_state = encode(dict(state), strict=True)
            except ValueError as error:
                raise UnreadableRecord(
                    f"the state of epoch {epoch.index} cannot be stored: {error}. Make it lists, dicts, numbers."
                ) from None
            row = epoch_to_row(epoch)
            write_trajectories(self.folder, epoch.index, self.run_id, epoch.collection)
            with self._transaction(f"epoch {epoch.index}", durable=True) as db:
                self._require_next(db, epoch.index)
                ref = db.execute("SELECT job_ref FROM unfinished WHERE epoch = ?", (epoch.index,)).fetchone()
                row |= {"job_ref": ref and ref["job_ref"], "state": stored_state}
                marks = ", ".join("?" * len(row))
                db.execute(f"INSERT INTO epochs ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
                _put_validations(db, epoch)
                db.execute("DELETE FROM unfinished")
                db.execute("DELETE FROM rollouts")
                # What is committed can be read: by the same function as later, of what lies in the table.
                _require_readable(db.execute("SELECT * FROM epochs WHERE epoch = ?", (epoch.index,)).fetchone())
            return self._adopt(epoch, as_it_was=not replaced)

    def amend(self, epoch: Epoch) -> StoredEpoch:
        """Replaces the record of a completed epoch, but for its trajectories: a job ended after it was made, say."""
        with (
            self._naming(f"epoch {epoch.index}") as replaced,
            self._transaction(f"the record of epoch {epoch.index}", durable=True) as db,
        ):
            row = epoch_to_row(epoch)
            _require_readable(row)
            index = row.pop("epoch")
            places = ", ".join(f"{name} = ?" for name in row)
            done = db.execute(
                f"UPDATE epochs SET {places} WHERE epoch = ? AND trajectories = ? AND failures = ?",
                (*row.values(), index, row["trajectories"], row["failures"]),
            )
            if done.rowcount != 1:
                raise StoreError(
                    f"there is no epoch {index} with these trajectories, so it cannot be amended. Append it."
                )
            _put_validations(db, epoch)
            db.execute("UPDATE run SET revision = revision + 1")
        return self._adopt(epoch, as_it_was=not replaced)

    def copy_database(self, folder: Path, state: str) -> None:
        """run.db as it is, into a folder that has none, where the run is then in that state. It is on the disk when this
        returns."""
        path = folder / DATABASE
        with (
            as_store_error(path, "The run itself is as it was."),
            closing(sqlite3.connect(path, isolation_level=None)) as copy,
        ):
            self._read(lambda db: db.backup(copy))
            copy.execute("PRAGMA synchronous = FULL")
            copy.execute("UPDATE run SET state = ?", (state,))

    def rewind(self, index: int) -> None:
        """Removes every epoch after that one, and what has begun; changes that they used first are pending again. What
        is taken out is gone: see rewind.py, which copies it before."""
        with self._transaction(f"going back to epoch {index}", durable=True) as db:
            later = [
                (row["place"],)
                for row in db.execute("SELECT place, record FROM validations")
                if validation_from_json(row["record"]).epoch > index + 1
            ]
            db.executemany("DELETE FROM validations WHERE place = ?", later)  # those of weights that are gone
            db.execute("DELETE FROM validations WHERE epoch > ?", (index,))
            db.execute("DELETE FROM epochs WHERE epoch > ?", (index,))
            db.execute("DELETE FROM unfinished")
            db.execute("DELETE FROM rollouts")
            db.execute("UPDATE changes SET epoch = NULL WHERE epoch > ?", (index,))
            remove_labels_after(db, index)  # their names will be those of other rollouts
            db.execute("UPDATE run SET revision = revision + 1")
        self.refresh()

    def add_validation(self, validation: Validation, epoch: int | None = None) -> None:
        """A validation. epoch: the one that has begun, to which it belongs; None: it was asked for by hand."""
        with self._naming("a validation" if epoch is None else f"epoch {epoch}"):
            row = validation_to_row(validation, epoch)
        with self._transaction("a validation") as db:
            if epoch is not None:
                self._require_begun(db, epoch)
            db.execute(_INSERT_VALIDATION, row)

    def record_change(self, change: Change) -> int:
        """A change of the controls. Returns its place in the journal, from 0."""
        with self._naming(_A_CHANGE), self._transaction(_A_CHANGE) as db:
            place = db.execute("SELECT count(*) FROM changes").fetchone()[0]
            values = [encode(value, field=change.field) for value in (change.old, change.new)]
            texts = readable(change.source), readable(change.field), *values
            db.execute(
                "INSERT INTO changes (place, time, source, field, old, new, epoch) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (place, change.time, *texts, change.epoch),
            )
        return place

    def settle_change(self, place: int, epoch: int) -> None:
        """The epoch whose selection used a change first."""
        with self._transaction(_A_CHANGE) as db:
            if db.execute("UPDATE changes SET epoch = ? WHERE place = ?", (epoch, place)).rowcount != 1:
                raise StoreError(f"the journal has no change {place}. Record it first.")

    def record_event(self, kind: str, **data: Any) -> None:
        """Appends to the log: an error, a change of state, a line of text."""
        self._require_writable()
        path = self.folder / LOG
        with self._turn, as_store_error(path, "The event is not recorded; everything else is kept."):
            append_line(path, encode({"time": time.time(), "kind": kind, **data}))
            self.require_place()

    def set_state(self, state: str) -> None:
        """What the run is doing: "running", "paused", "failed", ..."""
        with self._transaction("the run's state") as db:
            db.execute("UPDATE run SET state = ?", (readable(state),))

    def close(self) -> None:
        """Ends the writing and gives the lock back. The epochs can still be read. Again: nothing."""
        with self._turn:
            db, self._db = self._db, None
            if db is not None and os.getpid() == self._pid:
                if _identity(self.folder / DATABASE) in (self._file, None):
                    _give_back_space(db)
                    db.close()
                else:
                    # SQLite removes its log by its path when it closes a file. This is another run's folder now.
                    _not_closed.append(db)
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ── how it is written ────────────────────────────────────────────────────────────────────────────────────────────

    def _require_writable(self) -> None:
        if self._db is None:
            raise StoreError(f"the run in {self.folder} is open to be read only. Open it with write=True.")
        if os.getpid() != self._pid:
            raise StoreError(
                f"the run in {self.folder} is written by process {self._pid}, which this one was forked from. Open it "
                "with write=False here."
            )

        self.require_place()

    def require_place(self) -> None:
        """Raises FolderGone where `run.db` in the folder is not the file that is open here: what is written would be in
        another place, or in none."""
        if self._file is None or _identity(self.folder / DATABASE) == self._file:
            return
        now = _folder_of(self._lock)
        if now is not None and _identity(now / DATABASE) == self._file:
            what = (
                f"it was moved to {now} while this run was writing it. Move it back, and run the epoch again; or close"
            )
            what += " this run and open the folder where it is now."
        else:
            what = (
                f"{DATABASE} there is not the file that this run has open: the folder was moved, deleted or replaced. Move "
                'it back, and run the epoch again. If it is deleted, save what is in memory: run.export("run.jsonl") '
                'writes the rollouts, run.export("epochs.csv", "epochs") the numbers, and run.save_model("model") the '
                "trained model; then close this run and begin a new one."
            )
        raise FolderGone(f"the run's folder {self.folder} is gone: {what} Nothing was recorded since.")

    @contextmanager
    def _naming(self, what: str) -> Iterator[dict[str, str]]:
        """Says once which fields are stored as something less than they were. what: whose fields.

        Yields:
            Those that were so far, by name, with what they were.
        """
        with noting_replaced() as replaced:
            yield replaced
        new = replaced.keys() - self._told
        self._told |= new
        if not new:
            return
        named = [f"{one_line(field)} ({one_line(replaced[field])})" for field in sorted(new)[:20]]
        if len(new) > 20:
            named.append(f"and {len(new) - 20} more")
        logger.warning(
            "%s: stored as a short text or left out, as it is not what can be stored there: %s. Everything else is stored as "
            "it is. This is said once for each field.",
            what, ", ".join(named),
        )  # fmt: skip

    @contextmanager
    def _transaction(self, what: str, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All that is done inside is written, or nothing. what: for the error. durable: a power failure does not undo it."""
        kept = (
            f"{what} is not recorded; everything before it is kept. Remove the cause (a full disk, say) and call again."
        )
        with self._turn, as_store_error(self.folder / DATABASE, kept):
            self._require_writable()
            db = self._db
            assert db is not None
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
                self.require_place()
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled it back already
                    db.execute("ROLLBACK")
                raise

    def _adopt(self, epoch: Epoch, as_it_was: bool) -> StoredEpoch:
        """The record as it is read back; its trajectories need not be, as long as somebody holds them and nothing of them
        was replaced."""
        self.refresh()
        stored = self._epoch(epoch.index)
        if as_it_was:
            self._keep(epoch.collection)
            vars(stored)["_collection"].remember(epoch.collection)
        return stored

    def _require_next(self, db: sqlite3.Connection, index: int) -> None:
        last = db.execute("SELECT max(epoch) FROM epochs").fetchone()[0]
        allowed = {0, self.parent[1] + 1 if self.parent else 0} if last is None else {last + 1}
        if index not in allowed:
            raise StoreError(
                f"found epoch {index}; run {self.run_id!r} continues with epoch {' or '.join(map(str, sorted(allowed)))}."
                " Epochs are recorded in order, each once."
            )

    def _require_begun(self, db: sqlite3.Connection, index: int) -> None:
        if db.execute("SELECT count(*) FROM unfinished WHERE epoch = ?", (index,)).fetchone()[0] != 1:
            raise StoreError(
                f"epoch {index!r} of run {self.run_id!r} has not begun, or is complete. Call begin_epoch first."
            )


_MOST_UNUSED = 16_000_000
_A_CHANGE = "a change of the controls"
_INSERT_VALIDATION = "INSERT INTO validations (epoch, mean_reward, error, record) VALUES (?, ?, ?, ?)"


@contextmanager
def _opened(folder: Path, create: bool = False) -> Iterator[tuple[WriteLock, sqlite3.Connection]]:
    """Lock and connection of the one writer; both are given back where the block raises."""
    lock, db = WriteLock(folder), None
    try:
        db = open_to_write(folder, create)
        yield lock, db
    except BaseException:
        if db is not None:
            db.close()
        lock.release()
        raise


def _give_back_space(db: sqlite3.Connection) -> None:
    """Makes the file small where the rollouts of unfinished epochs have left it large; what is in it is little."""
    with suppress(sqlite3.Error):  # somebody reads, or the disk is full
        pages, size = (db.execute(f"PRAGMA {what}").fetchone()[0] for what in ("freelist_count", "page_size"))
        if pages * size > _MOST_UNUSED:
            db.execute("VACUUM")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file has that name; None where there is none."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _folder_of(lock: WriteLock | None) -> Path | None:
    """Where the folder of that lock is now, if the system says so (Linux)."""
    path = None if lock is None else lock.path_now()
    return None if path is None else path.parent


def _require_readable(row: Mapping[str, Any]) -> None:
    """Raises UnreadableRecord."""
    try:
        epoch_from_row(row)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, AttributeError) as error:
        raise UnreadableRecord(
            f"the record of epoch {row['epoch']} could not be read again ({type(error).__name__}: {one_line(error)}), so "
            "it was not written. Everything before it is kept."
        ) from error


def _put_validations(db: sqlite3.Connection, epoch: Epoch) -> None:
    rows = [validation_to_row(validation, epoch.index) for validation in epoch.validations]
    db.execute("DELETE FROM validations WHERE epoch = ?", (epoch.index,))
    db.executemany(_INSERT_VALIDATION, rows)
