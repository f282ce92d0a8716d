"""The folder that is written is the folder that was opened, and what it holds are tables and files of a sensible size."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import collected, make_epoch, make_trajectory

import finetune_nb as ft
from finetune_nb.errors import StoreError
from finetune_nb.store.folder import trajectory_file
from finetune_nb.store.store import FolderGone, RunStore
from finetune_nb.testing import FakeAdapter
from finetune_nb.types import Change, TrainingJobRef, TrainingJobStatus, Validation


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(folder):
    store = RunStore.create(folder, "run", {})
    yield store
    store.close()


# ── moved, deleted, replaced ─────────────────────────────────────────────────────────────────────────────────────────

WRITES = {
    "begin_epoch": lambda store: store.begin_epoch(1, 0.0, None),
    "add_rollouts": lambda store: store.add_rollouts(1, collected([make_trajectory()])),
    "record_selection": lambda store: store.record_selection(1, make_epoch([[1.0]]).selection, {}),
    "record_job": lambda store: store.record_job(1, TrainingJobRef(run_id="run", backend="b")),
    "record_status": lambda store: store.record_status(
        1, TrainingJobStatus(run_id="run", backend="b", status="running")
    ),  # type: ignore[arg-type]
    "append": lambda store: store.append(make_epoch([[1.0]], index=1), {}),
    "amend": lambda store: store.amend(make_epoch([[1.0, 0.0]])),
    "rewind": lambda store: store.rewind(-1),
    "add_validation": lambda store: store.add_validation(Validation(0, 0, 0.5, 3)),
    "record_change": lambda store: store.record_change(Change(0.0, "code", "lr", 1, 2)),
    "record_event": lambda store: store.record_event("told"),
    "set_state": lambda store: store.set_state("ready"),
}


@pytest.mark.parametrize("what", ["moved", "deleted", "replaced", "its database replaced"])
@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_written_where_the_folder_is_another_or_none(store, folder, tmp_path, write, what):
    store.append(make_epoch([[1.0, 0.0]]), {})
    if what == "moved":
        folder.rename(tmp_path / "elsewhere")
    elif what == "deleted":
        shutil.rmtree(folder)
    elif what == "replaced":
        folder.rename(tmp_path / "elsewhere")
        RunStore.create(folder, "other", {}).close()
    else:
        shutil.copy(folder / "run.db", tmp_path / "copy.db")
        os.replace(tmp_path / "copy.db", folder / "run.db")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(FolderGone, match=r"moved.*run the epoch again") as told:
        WRITES[write](store)
    assert str(folder) in str(told.value)
    if what == "moved":
        assert str(tmp_path / "elsewhere") in str(told.value) or not os.path.exists("/proc/self/fd")
    elif what != "replaced":
        assert "run.export(" in str(told.value) and "run.save_model(" in str(told.value)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_folder_that_was_moved_back_is_written_again(store, folder, tmp_path):
    store.append(make_epoch([[1.0, 0.0]]), {})
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FolderGone):
        store.append(make_epoch([[1.0, 0.0]], index=1), {})
    (tmp_path / "elsewhere").rename(folder)
    store.append(make_epoch([[1.0, 0.0]], index=1), {})
    assert len(RunStore.open(folder).epochs) == 2


def test_a_folder_that_was_moved_has_all_that_was_recorded(store, folder, tmp_path):
    for index in range(3):
        store.append(make_epoch([[1.0, 0.0]], index=index), {})
    folder.rename(tmp_path / "elsewhere")
    store.close()
    with RunStore.open(tmp_path / "elsewhere", write=True) as moved:
        assert len(moved.epochs) == 3
        moved.append(make_epoch([[1.0, 0.0]], index=3), {})
    assert not folder.exists()


def test_a_run_that_took_the_place_of_a_moved_one_keeps_its_own_log_of_changes(store, folder, tmp_path):
    store.append(make_epoch([[1.0, 0.0]]), {})
    folder.rename(tmp_path / "elsewhere")
    with RunStore.create(folder, "other", {}) as other:
        other.append(make_epoch([[0.5, 0.0]]), {})
        store.close()
        assert (folder / "run.db-wal").exists()
        other.append(make_epoch([[0.5, 0.0]], index=1), {})
        assert len(RunStore.open(folder).epochs) == 2
    assert RunStore.open(folder).run_id == "other" and len(RunStore.open(folder).epochs) == 2
    assert len(RunStore.open(tmp_path / "elsewhere").epochs) == 1


class Saving(FakeAdapter):
    """Writes its model as one file."""

    def save(self, directory):
        os.mkdir(directory)
        return directory


@pytest.mark.slow
@pytest.mark.proof
async def test_a_run_whose_folder_is_deleted_says_so_at_once_and_its_memory_can_be_saved(make_run, tmp_path):
    run = make_run(name="run", adapter=Saving())
    for _ in range(2):
        await run.next_epoch()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StoreError, match=r"run\.export.*run\.save_model"):
        await run.next_epoch()
    lines = run.export(tmp_path / "run.jsonl").read_text().splitlines()
    assert sum(line.startswith('{"epoch":1,') for line in lines) == 24  # the newest epoch is in memory
    assert run.export(tmp_path / "epochs.csv", "epochs").read_text().count("\n") == 3
    for name in ("run.csv", "run.parquet", "run.html", "run.yaml"):
        assert run.export(tmp_path / name).stat().st_size
    assert run.save_model(tmp_path / "model").is_dir()
    run.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.proof
async def test_a_run_whose_folder_is_deleted_within_an_epoch_fails_and_has_its_rollouts_in_memory(make_run, tmp_path):
    class Deleting(FakeAdapter):
        async def wait_until_complete(self, ref, poll_interval=10.0):
            shutil.rmtree(tmp_path / "run")
            return await super().wait_until_complete(ref, poll_interval)

    run = make_run(name="run", adapter=Deleting())
    with pytest.raises(StoreError, match="is gone"):
        await run.next_epoch()
    assert len(run) == 1 and run[0].metrics.trajectories == 24
    assert run.export(tmp_path / "run.jsonl").read_text().count("\n") == 24
    with pytest.raises(StoreError, match="is gone"):
        run.close()  # what is not stored is not lost in silence


async def test_a_run_whose_folder_is_moved_within_an_epoch_is_stored_once_it_is_back(make_run, tmp_path):
    moves = [tmp_path / "elsewhere"]

    class Moving(FakeAdapter):
        async def wait_until_complete(self, ref, poll_interval=10.0):
            if moves:
                (tmp_path / "run").rename(moves.pop())
            return await super().wait_until_complete(ref, poll_interval)

    run = make_run(name="run", adapter=Moving())
    with pytest.raises(StoreError, match="is gone"):
        await run.next_epoch()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    await run.next_epoch()
    run.close()
    found = ft.Run.open(tmp_path / "run")
    assert [len(epoch.collection.trajectories) for epoch in found] == [6, 6]


# ── tables that are none ─────────────────────────────────────────────────────────────────────────────────────────────

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS"
TABLES = ("run", "epochs", "unfinished", "rollouts", "validations", "changes")
NOT_TABLES = {
    **{f"{name} is a view": [f"DROP TABLE {name}", f"CREATE VIEW {name} AS {ENDLESS} epoch FROM n"] for name in TABLES},
    "epochs is a view in capitals": [
        "ALTER TABLE epochs RENAME TO e",
        f"CREATE VIEW EPOCHS AS {ENDLESS} epoch, e.* FROM n, e",
    ],
    "a trigger": ["CREATE TRIGGER t AFTER INSERT ON epochs BEGIN DELETE FROM epochs; END"],
    "a trigger of changes": ["CREATE TRIGGER t BEFORE INSERT ON changes BEGIN SELECT RAISE(IGNORE); END"],
    "a virtual table": ["DROP TABLE changes", "CREATE VIRTUAL TABLE changes USING fts5(time, source, field)"],
    "a computed column": ["ALTER TABLE epochs ADD COLUMN more AS (zeroblob(500000000))"],
    "no table": ["DROP TABLE validations"],
}


@pytest.mark.parametrize("how", NOT_TABLES)
@pytest.mark.parametrize("write", [False, True])
def test_a_table_that_is_none_is_refused_within_seconds(store, folder, how, write):
    store.append(make_epoch([[1.0, 0.0]]), {})
    store.close()
    with closing(sqlite3.connect(folder / "run.db")) as db:
        for statement in NOT_TABLES[how]:
            db.execute(statement)
        db.commit()
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"run\.db.*Expected the tables.*Restore"):
        RunStore.open(folder, write=write).epochs  # noqa: B018
    assert time.monotonic() - started < 10


def test_somebodys_own_views_and_indexes_are_left_alone(store, folder):
    store.append(make_epoch([[1.0, 0.0]]), {})
    store.close()
    with closing(sqlite3.connect(folder / "run.db")) as db:
        db.execute("CREATE VIEW mine AS SELECT epoch, mean_reward FROM epochs")
        db.execute("CREATE INDEX by_reward ON epochs (mean_reward)")
        db.execute("CREATE TABLE notes (text)")
        db.commit()
    assert len(RunStore.open(folder).epochs) == 1
    with RunStore.open(folder, write=True) as again:
        again.append(make_epoch([[1.0]], index=1), {})


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("write", [False, True])
def test_pages_that_lead_back_to_themselves_end(folder, write):
    """Every child of the inner page of a table is the same leaf, and its first child is the page itself."""
    with RunStore.create(folder, "run", {}) as store:
        for index in range(60):
            store.append(make_epoch([[1.0, 0.0]], index=index), {})
    path = folder / "run.db"
    with closing(sqlite3.connect(path)) as db:
        root = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'epochs'").fetchone()[0]
        size = db.execute("PRAGMA page_size").fetchone()[0]
    data = bytearray(path.read_bytes())
    start = (root - 1) * size
    assert data[start] == 5  # an inner page of a table
    cells = int.from_bytes(data[start + 3 : start + 5], "big")
    for cell in range(cells):
        place = start + int.from_bytes(data[start + 12 + 2 * cell : start + 14 + 2 * cell], "big")
        data[place : place + 4] = root.to_bytes(4, "big")
    data[start + 8 : start + 12] = root.to_bytes(4, "big")
    path.write_bytes(data)
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"run\.db"):
        RunStore.open(folder, write=write).epochs  # noqa: B018
    assert time.monotonic() - started < 20


def test_a_file_that_claims_more_values_than_it_can_hold_is_refused_before_it_is_read(store, folder):
    store.append(make_epoch([[1.0, 0.0]]), {})
    path = trajectory_file(folder, 0)
    table = pq.read_table(path)
    place = table.schema.get_field_index("token_ids")
    tokens = pa.array(np.full(48_000_000, 7, np.int32))
    turns = pa.ListArray.from_arrays(pa.array([0, 24_000_000, 48_000_000], pa.int32()), tokens)
    many = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), turns)
    pq.write_table(table.set_column(place, "token_ids", many), path, compression="zstd")
    assert path.stat().st_size < 20_000
    with pytest.raises(StoreError, match=r"epoch-000000\.parquet.*48,000,00. values.*expected at most"):
        RunStore.open(folder).epochs[0].collection  # noqa: B018
