"""run.db: its tables, how it is opened to write and to read, and what its rows say.

    run          one row: id, created_at, state, revision (counts amended epochs); of a fork parent, parent_epoch and
                 start, the state that it continues from
    epochs       one row an epoch: a few columns to query, `record` (JSON: all that is known but arrays and
                 trajectories), the arrays of its statistics and selection (little-endian float64, int64, int8), and
                 `state` (JSON: what resuming needs)
    unfinished   the epoch that has begun and is not in `epochs`, with its job and selection (JSON) where it came so far;
                 `rollouts` its trajectories, in batches
    validations  by the epoch that they belong to; NULL: asked for by hand
    changes      the journal of the live settings
    labels       what people and code say of rollouts, groups and epochs; the one table that a process writes which does not
                 write the run. A label that was taken away stays as a row, `removed`, so that readers learn of it

PRAGMA user_version is the number of migrations that were applied. NaN is NULL in the columns to query.
"""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..errors import StoreError
from ..types import (
    GROUP_REASONS,
    Change,
    CurriculumSettings,
    CurriculumState,
    Epoch,
    EpochMetrics,
    GroupStatistics,
    Selection,
    TrainingJobRef,
    TrainingJobStatus,
    Validation,
    as_float,
)
from .durable import check_plain
from .folder import DATABASE
from .json import decode, encode, note_replaced, plain, short_text, type_name
from .nearest import is_whole

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "EmptyRun",
    "LABELS_SINCE",
    "MIGRATIONS",
    "UnreadableRecord",
    "change_beside",
    "change_from_row",
    "epoch_from_row",
    "epoch_to_row",
    "migrate",
    "open_to_write",
    "read",
    "readable",
    "selection_from_json",
    "selection_to_json",
    "status_to_json",
    "unreadable_epoch",
    "job_ref_to_json",
    "whole_number",
    "validation_from_json",
    "validation_to_row",
]

T = TypeVar("T")

APPLICATION_ID = 0x46544E42
"""Says in the file's header whose it is: "FTNB"."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE run (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, created_at REAL NOT NULL, "
        "state TEXT NOT NULL, parent TEXT, parent_epoch INTEGER, revision INTEGER NOT NULL DEFAULT 0)",
        "CREATE TABLE epochs (epoch INTEGER PRIMARY KEY CHECK (epoch >= 0), started_at REAL, mean_reward REAL, "
        "trajectories INTEGER NOT NULL, failures INTEGER NOT NULL, groups INTEGER NOT NULL, job TEXT, reason TEXT, "
        "record TEXT NOT NULL, rewards BLOB NOT NULL, offsets BLOB NOT NULL, counts BLOB NOT NULL, "
        "means BLOB NOT NULL, spreads BLOB NOT NULL, reasons BLOB NOT NULL, kept BLOB NOT NULL, job_ref TEXT, "
        "state TEXT NOT NULL)",
        "CREATE TABLE unfinished (epoch INTEGER PRIMARY KEY CHECK (epoch >= 0), started_at REAL NOT NULL, "
        "policy_version INTEGER, job_ref TEXT, job_status TEXT)",
        "CREATE TABLE rollouts (batch INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, data BLOB NOT NULL)",
        "CREATE TABLE validations (place INTEGER PRIMARY KEY, epoch INTEGER, mean_reward REAL, error TEXT, "
        "record TEXT NOT NULL)",
        "CREATE TABLE changes (place INTEGER PRIMARY KEY, time REAL NOT NULL, source TEXT NOT NULL, "
        "field TEXT NOT NULL, old TEXT NOT NULL, new TEXT NOT NULL, epoch INTEGER)",
    ),
    ("ALTER TABLE run ADD COLUMN start TEXT", "ALTER TABLE unfinished ADD COLUMN selection TEXT"),
    (
        "CREATE TABLE labels (name TEXT NOT NULL, tag TEXT NOT NULL, author TEXT NOT NULL, epoch INTEGER NOT NULL, "
        "example TEXT, generation TEXT, score REAL, note TEXT NOT NULL, time REAL NOT NULL, "
        "removed INTEGER NOT NULL DEFAULT 0, change INTEGER NOT NULL, PRIMARY KEY (name, tag, author))",
        "CREATE INDEX labels_by_change ON labels (change)",
    ),
)
"""Statements of each version; a new one is added after the others, never changed."""
LABELS_SINCE = 3
"""The first version with the table of labels. The one before it has all else as it is now, so it is read in place."""


LARGEST_VALUE = 2**29
"""Bytes of one value in the file, written or read: a file of a few bytes can ask for any size."""
_STEPS_AT_LEAST = 20_000_000
"""Steps of SQLite's machine that any reading may take: about a second."""
_STEPS_PER_BYTE = 20
"""And as many for each byte of the file. Reading all of a run takes fewer than one."""


_TABLES = ("run", "epochs", "unfinished", "rollouts", "validations", "changes", "labels")


class EmptyRun(StoreError):
    """A run whose creation did not finish."""


class UnreadableRecord(StoreError):
    """A record that could not be read again, so it was not written."""


def _files(folder: Path) -> list[Path]:
    return [folder / f"{DATABASE}{suffix}" for suffix in ("", "-wal", "-shm", "-journal")]


def _connect(path: Path, options: str) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}", uri=True, isolation_level=None, check_same_thread=False, timeout=10
    )
    db.row_factory = sqlite3.Row
    try:
        db.execute("PRAGMA trusted_schema = OFF")  # the file may be anybody's
        db.execute("PRAGMA cell_size_check = ON")
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)
        _bound(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _bound(db: sqlite3.Connection, path: Path) -> None:
    """Ends whatever takes more steps than reading all of the file can: pages that lead back to themselves, say."""
    size = 0
    for each in (path, path.with_name(f"{path.name}-wal")):
        with suppress(OSError):
            size += each.stat().st_size
    every = 100_000
    left = [(_STEPS_AT_LEAST + _STEPS_PER_BYTE * size) // every]

    def spent() -> bool:
        left[0] -= 1
        return left[0] < 0

    db.set_progress_handler(spent, every)


def _check_tables(db: sqlite3.Connection, folder: Path, version: int) -> None:
    """Raises StoreError where a table is none: a view, whose query may never end, or one that computes something when it is
    read or written."""
    kinds: dict[str, str] = {}
    for kind, name, table, text in db.execute("SELECT type, lower(name), lower(tbl_name), sql FROM sqlite_master"):
        if kind == "trigger" and table in _TABLES:
            raise StoreError(_not_ours(folder, f"{table} has a trigger"))
        if name in _TABLES:
            virtual = str(text).lstrip()[:14].upper() == "CREATE VIRTUAL"
            kinds[name] = "virtual table" if virtual else str(kind)
    for name in _TABLES:
        kind = kinds.get(name)
        if kind is None and name == "labels" and version < LABELS_SINCE:
            continue
        if kind != "table":
            raise StoreError(_not_ours(folder, f"{name} is missing" if kind is None else f"{name} is a {kind}"))
        columns = db.execute(f"PRAGMA table_xinfo({name})").fetchall()
        if any(column["hidden"] for column in columns):
            raise StoreError(_not_ours(folder, f"{name} has a column that is computed"))


def _not_ours(folder: Path, found: str) -> str:
    tables = ", ".join(_TABLES)
    return (
        f"{folder / DATABASE} is damaged, or was made by somebody else: {found}. Expected the tables {tables}. Nothing was "
        "changed. Restore the file from a copy; the Parquet files beside it can be read without it."
    )


def open_to_write(folder: Path, create: bool = False) -> sqlite3.Connection:
    """A connection for the one writer. create: where there is no run yet, or one whose creation did not end; else where
    there is one. Raises StoreError, sqlite3.Error."""
    check_plain(*_files(folder))
    _require_file(folder, create)
    if not create and not (folder / f"{DATABASE}-wal").exists():
        _require_whole(folder / DATABASE)
    db = _connect(folder / DATABASE, "mode=rwc" if create else "mode=rw")
    try:
        version = _version(db, folder)
        if version and create:
            raise StoreError(f"there is a run in {folder} already. Open it, or choose another folder.")
        if not create:
            _require_version(folder, version)
            _check_tables(db, folder, version)
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(str(found))
        db.set_progress_handler(None, 0)  # it is whole; what is written from now on is ours
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        db.close()
        raise
    return db


def change_beside(folder: Path, work: Callable[[sqlite3.Connection], T]) -> T:
    """Changes something beside the process that writes the run, if there is one: a short transaction that needs no lock of
    the run. Raises StoreError, sqlite3.Error and what `work` raises; then nothing was changed."""
    check_plain(*_files(folder))
    _require_file(folder)
    if not (folder / f"{DATABASE}-wal").exists():
        _require_whole(folder / DATABASE)
    with closing(_connect(folder / DATABASE, "mode=rw")) as db:
        version = _version(db, folder)
        _require_version(folder, version)
        _check_tables(db, folder, version)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        try:
            migrate(db)
            found = work(db)
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk has rolled it back already
                db.execute("ROLLBACK")
            raise
        return found


def migrate(db: sqlite3.Connection, version: int | None = None) -> None:
    """Applies the migrations that the file has not seen. Call it inside a transaction."""
    done = db.execute("PRAGMA user_version").fetchone()[0]
    for statements in MIGRATIONS[done:version]:
        for statement in statements:
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS[:version])}")


def _version(db: sqlite3.Connection, folder: Path) -> int:
    """The file's schema version; 0 for one that is still empty. Raises StoreError for a foreign or a newer one."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    if (tables or version) and application != APPLICATION_ID:
        raise StoreError(f"{folder / DATABASE} is no run of finetune_nb. Nothing was changed; choose another folder.")
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{folder / DATABASE} has schema version {version}, and this finetune_nb knows {len(MIGRATIONS)}. "
            "Nothing was changed. Update finetune_nb to open the run."
        )
    return version


def read(folder: Path, work: Callable[[sqlite3.Connection], T]) -> T:
    """What `work` finds, in one snapshot. Changes nothing, also beside a writer and in a folder that cannot be written.
    Raises StoreError, sqlite3.Error and what `work` raises."""
    path, wal = folder / DATABASE, folder / f"{DATABASE}-wal"
    check_plain(*_files(folder))
    _require_file(folder)
    if not wal.exists():
        # Then nobody writes, and the ordinary mode would create files beside it.
        before = _as_it_lies(path)
        try:
            _require_whole(path)
            found = _in_snapshot(folder, _connect(path, "mode=ro&immutable=1"), work)
            if not wal.exists() and _as_it_lies(path) == before:
                return found
        except (sqlite3.Error, ValueError, StoreError):
            if not wal.exists() and _as_it_lies(path) == before:
                raise
        # A writer has come meanwhile, or has come and gone: what was read may be half old and half new.
    try:
        return _in_snapshot(folder, _connect(path, "mode=ro"), work)
    except sqlite3.OperationalError:
        # A crash left the log there, and nothing can be created in this place: SQLite reads it in a copy only.
        if os.access(folder, os.W_OK) or not wal.exists():
            raise
        with tempfile.TemporaryDirectory() as copy:
            for file in (path, wal):
                shutil.copyfile(file, Path(copy) / file.name, follow_symlinks=False)
            return _in_snapshot(folder, _connect(Path(copy) / DATABASE, "mode=rw"), work)


def _as_it_lies(path: Path) -> tuple[int, int, int]:
    """What changes whenever the file does."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _in_snapshot(folder: Path, db: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    try:
        with closing(db):
            db.execute("BEGIN")
            version = _version(db, folder)
            _require_version(folder, version)
            _check_tables(db, folder, version)
            if version >= LABELS_SINCE - 1:
                return work(db)
            # It is brought up to date where no one sees.
            with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
                copy.row_factory = sqlite3.Row
                db.execute("COMMIT")
                db.backup(copy)
                _bound(copy, folder / DATABASE)
                migrate(copy)
                return work(copy)
    except sqlite3.OperationalError as error:
        if str(error) != "interrupted":
            raise
        raise StoreError(
            _not_ours(folder, "reading it takes more steps than a file of its size can need, so it was given up")
        ) from error


def _require_file(folder: Path, create: bool = False) -> None:
    if not create and not (folder / DATABASE).is_file():
        raise StoreError(f"there is no run in {folder}: it has no {DATABASE}. Give the folder that holds one.")


def _require_whole(path: Path) -> None:
    """SQLite reads zeros where the last page is cut; without a log beside it, a file has whole pages only."""
    with path.open("rb") as file:
        head = file.read(18)
    page = int.from_bytes(head[16:], "big")
    page = 65536 if page == 1 else page
    if page >= 512 and path.stat().st_size % page:
        raise sqlite3.DatabaseError("the file is cut off")


def _require_version(folder: Path, version: int) -> None:
    if version == 0:
        raise EmptyRun(f"the run in {folder} is empty: its creation did not finish. Create it again.")


# ── an epoch ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_ARRAYS = {
    "rewards": "<f8",
    "offsets": "<i8",
    "counts": "<i8",
    "means": "<f8",
    "spreads": "<f8",
    "reasons": "|i1",
    "kept": "<i8",
}
"""Of a GroupStatistics and of a Selection, as they lie in the file."""
_metrics = TypeAdapter(EpochMetrics)
_status = TypeAdapter(TrainingJobStatus | None)
_ref = TypeAdapter(TrainingJobRef)
_numbers = TypeAdapter(dict[str, float])
_versions = TypeAdapter(tuple[int | None, int | None])


def _fitting(kind: TypeAdapter[Any], value: Any, field: str, spare: Any = None) -> Any:
    """A part of a record as plain data that can be read again. What of it cannot is left out, and noted.

    Args:
        kind: By which it is read.
        value: The part.
        field: Its name.
        spare: What takes the place of its entries that must be there; None: then nothing of it is kept.
    """
    found = plain(value, field)
    for _ in range(50):
        try:
            kind.validate_python(found)
            return found
        except ValidationError as error:
            places = [each["loc"] for each in error.errors(include_url=False, include_context=False)]
        found = deepcopy(found)  # plain data may still be somebody's own
        for place in places:
            if not place:
                found = spare
            elif isinstance(found, dict):
                note_replaced(f"{field}.{'.'.join(map(str, place))}", "something of another type")
                _take_out(found, place, spare)
    note_replaced(field, "something of another type")
    return spare


def _take_out(found: dict[str, Any], place: tuple[Any, ...], spare: Any) -> None:
    """Takes the entry at that place out; what must be there is replaced."""
    *path, name = place
    holder = found
    for step in path:
        inside = holder.get(step)
        if not isinstance(inside, dict):
            name = step
            break
        holder = inside
    holder.pop(name, None)
    if holder is found and isinstance(spare, dict) and name in spare:
        holder[name] = spare[name]


def _fields_of(value: Any) -> Any:
    """The fields of a dataclass, themselves and no copies: not everything can be copied."""
    return {each.name: getattr(value, each.name) for each in fields(value)} if is_dataclass(value) else value


def whole_number(value: Any, field: str) -> int | None:
    """A number as SQLite takes it; None for what is none, which is noted."""
    if value is None:
        return None
    found = int(value) if is_whole(value) else None
    if found is not None and abs(found) < 2**63:
        return found
    note_replaced(field, type_name(value))
    return None


def job_ref_to_json(ref: TrainingJobRef) -> str:
    """Raises UnreadableRecord where it could not be read again."""
    found = _fitting(_ref, ref, "job")
    if found is None:
        raise UnreadableRecord(f"{short_text(ref)} is no reference to a job: expected run_id, backend and metadata.")
    return encode(found)


def status_to_json(status: TrainingJobStatus) -> str:
    """Raises UnreadableRecord where it could not be read again."""
    found = _fitting(_status, status, "job")
    if found is None:
        raise UnreadableRecord(f"{short_text(status)} is no status of a job: expected run_id, backend and status.")
    return encode(found)


def epoch_to_row(epoch: Epoch) -> dict[str, Any]:
    """The columns of an epoch but `job_ref` and `state`."""
    statistics, selection = epoch.statistics, epoch.selection
    no_metrics = _no_metrics(statistics, len(epoch.collection.failures))
    metrics = _fitting(_metrics, _fields_of(epoch.metrics), "metrics", no_metrics)
    versions = [whole_number(version, "policy_version") for version in epoch.policy_versions]
    reason = epoch.reason
    if reason is not None and not isinstance(reason, str):
        note_replaced("reason", type_name(reason))
        reason = short_text(reason)
    record = {
        "run_id": epoch.run_id,
        "example_ids": plain(list(statistics.example_ids), "example_ids"),
        **_about_selection(selection),
        "job": None if epoch.job is None else _fitting(_status, epoch.job, "job"),
        "reason": reason,
        "metrics": metrics,
        "policy_versions": versions,
        "started_at": as_float(epoch.started_at),
        "seconds": _fitting(_numbers, _fields_of(epoch.seconds), "seconds", {}),
    }
    arrays = {name: getattr(statistics if hasattr(statistics, name) else selection, name) for name in _ARRAYS}
    return {
        "epoch": epoch.index,
        "started_at": as_float(epoch.started_at),
        "mean_reward": as_float(metrics["mean_reward"]),
        "trajectories": len(statistics.rewards),
        "failures": len(epoch.collection.failures),
        "groups": len(statistics),
        "job": record["job"] and record["job"]["status"],
        "reason": readable(reason),
        "record": encode(record),
        **{name: array.astype(_ARRAYS[name], copy=False).tobytes() for name, array in arrays.items()},
    }


def _about_selection(selection: Selection) -> dict[str, Any]:
    """A selection but for its examples and arrays."""
    state = selection.state
    return {
        "settings": asdict(selection.settings),
        "curriculum_state": {**asdict(state), "included_groups": sorted(state.included_groups)},
        "inferred": selection.inferred,
    }


def _selection(
    record: Mapping[str, Any], example_ids: Sequence[Any], reasons: np.ndarray, kept: np.ndarray
) -> Selection:
    if len(reasons) != len(example_ids):
        raise ValueError("its arrays do not belong together")
    if len(kept) and not (kept.min() >= 0 and kept.max() < len(example_ids)):
        raise ValueError("it keeps groups that are not there")
    if len(reasons) and not (reasons.min() >= 0 and reasons.max() < len(GROUP_REASONS)):
        raise ValueError("it has reasons that are not known")
    state = record["curriculum_state"]
    curriculum = CurriculumState(
        float(state["percentile"]),
        int(state["last_expansion_epoch"]),
        int(state["total_groups"]),
        frozenset(map(int, state["included_groups"])),
    )
    settings = CurriculumSettings(**record["settings"])
    return Selection(example_ids, reasons, kept, curriculum, settings, bool(record["inferred"]))


def selection_to_json(selection: Selection, seconds: Mapping[str, float]) -> str:
    """The selection of an epoch that is not complete, and what each part of it took so far."""
    arrays = {"reasons": selection.reasons.tolist(), "kept": selection.kept.tolist()}
    record = {"example_ids": list(selection.example_ids), **arrays, **_about_selection(selection)}
    return encode({**record, "seconds": dict(seconds)})


def selection_from_json(text: str) -> tuple[Selection, dict[str, float]]:
    """The way back. Raises ValueError, KeyError, TypeError, OverflowError and FinetuneError for what does not fit."""
    import numpy as np

    record = decode(text, dict)
    reasons, kept = np.array(record["reasons"], np.int8), np.array(record["kept"], np.int64)
    selection = _selection(record, tuple(record["example_ids"]), reasons, kept)
    return selection, _numbers.validate_python(record["seconds"])


def epoch_from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an Epoch but `collection`, and `failures`: how many. Raises ValueError, KeyError, TypeError and
    FinetuneError for what does not fit."""
    record = decode(row["record"], dict)
    arrays = {name: _array(row[name], dtype) for name, dtype in _ARRAYS.items()}
    kept, reasons = arrays.pop("kept"), arrays.pop("reasons")
    if not isinstance(record["example_ids"], list):
        raise ValueError("its example ids are no list")
    example_ids = tuple(record["example_ids"])
    groups, rows = len(example_ids), len(arrays["rewards"])
    offsets = arrays["offsets"]
    of_groups = {len(offsets) - 1, len(arrays["counts"]), len(arrays["means"]), len(arrays["spreads"]), len(reasons)}
    if of_groups != {groups} or offsets[0] != 0 or offsets[-1] != rows or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("its arrays do not belong together")
    if (row["trajectories"], row["groups"]) != (rows, groups) or type(row["failures"]) is not int:
        raise ValueError("its counts do not fit its arrays")
    reason = record["reason"]
    if not (reason is None or isinstance(reason, str)) or not isinstance(record["run_id"], str):
        raise ValueError("a text is none")
    return {
        "index": int(row["epoch"]),
        "run_id": record["run_id"],
        "statistics": GroupStatistics(example_ids=example_ids, **arrays),
        "selection": _selection(record, example_ids, reasons, kept),
        "job": _status.validate_python(record["job"]),
        "reason": reason,
        "metrics": _metrics_of(record["metrics"], arrays["rewards"]),
        "policy_versions": _versions.validate_python(record["policy_versions"]),
        "started_at": float(record["started_at"]),
        "seconds": _numbers.validate_python(record["seconds"]),
        "failures": row["failures"],
    }


def _metrics_of(stored: Any, rewards: np.ndarray) -> EpochMetrics:
    """The metrics of an epoch. Missing rewards are counted again, as older records do not have their number."""
    import numpy as np

    metrics = _metrics.validate_python(stored)
    return replace(metrics, rewards_missing=int(np.isnan(rewards).sum()))


def unreadable_epoch(row: Mapping[str, Any], run_id: str, reason: str) -> dict[str, Any]:
    """As `epoch_from_row`, of a row that cannot be read: an epoch without trajectories. reason: why."""
    import numpy as np

    nothing, none = np.empty(0), np.empty(0, np.int64)
    statistics = GroupStatistics((), nothing, np.zeros(1, np.int64), none, nothing, nothing)
    settings = CurriculumSettings()
    state = CurriculumState(settings.percentile)
    return {
        "index": int(row["epoch"]),
        "run_id": run_id,
        "statistics": statistics,
        "selection": Selection((), np.empty(0, np.int8), none, state, settings, inferred=True),
        "job": None,
        "reason": reason,
        "metrics": _metrics.validate_python(_no_metrics(statistics, 0)),
        "policy_versions": (None, None),
        "started_at": as_float(row["started_at"]),
        "seconds": {},
    }


def _no_metrics(statistics: GroupStatistics, failures: int) -> dict[str, Any]:
    """Where nothing was measured but how many there were."""
    return {
        **dict.fromkeys(("mean_reward", "min_reward", "max_reward", "kept_mean_reward"), math.nan),
        "group_quantiles": [math.nan] * 3,
        "trajectories": len(statistics.rewards),
        "groups": len(statistics),
        "failures": failures,
        **dict.fromkeys(("groups_with_spread", "kept_trajectories", "kept_groups", "sampled_tokens"), 0),
    }


def _array(data: Any, dtype: str) -> np.ndarray:
    import numpy as np

    if not isinstance(data, bytes):
        raise ValueError("an array is no BLOB")
    return np.frombuffer(data, dtype)


# ── validations, changes ─────────────────────────────────────────────────────────────────────────────────────────────

_validation = TypeAdapter(Validation)


def validation_to_row(validation: Validation, epoch: int | None) -> tuple[Any, ...]:
    """epoch, mean_reward, error, record."""
    spare = {"epoch": epoch or 0, "policy_version": None, "mean_reward": math.nan, "examples": 0}
    record = _fitting(_validation, _fields_of(validation), "validation", spare)
    return epoch, as_float(record["mean_reward"]), readable(record.get("error")), encode(record)


def validation_from_json(record: Any) -> Validation:
    """The way back from the column `record`. Raises ValueError for what does not fit."""
    return _validation.validate_python(decode(record, dict))


def change_from_row(row: Mapping[str, Any]) -> Change:
    """A row of the journal. Raises ValueError for what does not fit."""
    values = {field.name: row[field.name] for field in fields(Change)}
    if not isinstance(values["time"], float) or not all(isinstance(values[name], str) for name in ("source", "field")):
        raise ValueError("a change of the journal is none")
    return Change(**{**values, "old": decode(values["old"]), "new": decode(values["new"])})


def readable(text: str | None) -> str | None:
    """Text for a column that people query: secrets masked, lone surrogates escaped. The JSON has the exact one."""
    return None if text is None else decode(encode(text)).encode("utf-8", "backslashreplace").decode()
