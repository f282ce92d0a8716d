"""RunStore: no second writer, crash, full disk or hostile folder costs a completed epoch or reaches outside the run."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import collected, make_epoch, make_trajectory

from finetune_nb.errors import StoreError
from finetune_nb.store import database as store_schema
from finetune_nb.store import folder as run_folder
from finetune_nb.store.folder import trajectory_file
from finetune_nb.store.store import RunStore

CONFIG = {"run": {"seed": 0}}
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(folder):
    with RunStore.create(folder, "run", CONFIG) as store:
        yield store


# ── several processes, moved and read-only folders ───────────────────────────────────────────────────────────────────


def in_another_process(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, cwd=SUPPORT, **options,
    )  # fmt: skip


OPEN_TO_WRITE = """
import sys
from finetune_nb.store.store import RunStore; from finetune_nb.errors import StoreError
try:
    RunStore.open(sys.argv[1], write=True)
except StoreError as error:
    print(error)
"""


def test_a_second_writer_is_told_who_writes(store, folder):
    done = in_another_process(OPEN_TO_WRITE, folder)
    assert f"is being written by process {os.getpid()} on " in done.stdout
    with pytest.raises(StoreError, match=f"process {os.getpid()}"):
        RunStore.open(folder, write=True)
    store.close()
    assert in_another_process(OPEN_TO_WRITE, folder).stdout == ""
    RunStore.open(folder, write=True).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_neither_writes_nor_keeps_the_lock(store, folder):
    into, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.set_state("child")
        except StoreError as error:
            os.write(out, str(error).encode())
        os.close(out)
        signal.pause()
    try:
        os.close(out)
        assert b"forked" in os.read(into, 1000)
        store.close()
        RunStore.open(folder, write=True).close()  # while the child is alive
    finally:
        os.close(into)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


WRITE_EPOCHS = """
import sys
from factories import make_epoch
from finetune_nb.store.store import RunStore
store = RunStore.open(sys.argv[1], write=True)
for index in range(int(sys.argv[2]), int(sys.argv[3])):
    store.append(make_epoch([[1.0, 0.0]], index=index), {"index": index})
    print(index, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.proof
def test_a_reader_sees_what_a_writer_of_another_process_adds(store, folder):
    store.append(make_epoch([[1.0, 0.0]]), {})
    store.close()
    reader = RunStore.open(folder)
    assert len(reader.epochs) == 1
    command = [sys.executable, "-c", WRITE_EPOCHS, str(folder), "1", "4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=SUPPORT) as writer:
        for index in (1, 2, 3):
            assert int(writer.stdout.readline()) == index
            reader.refresh()
            assert len(reader.epochs) >= index + 1
            assert reader.epochs[index].collection.trajectories[0][0].reward == 1.0
            assert reader.state()["index"] >= index
        writer.communicate(b"")


def test_reading_leaves_no_trace(store, folder):
    store.append(make_epoch([[1.0, 0.0]]), {})
    store.close()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    reader = RunStore.open(folder)
    assert reader.epochs[0].collection.trajectories and reader.partial() is None
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(StoreError, match="read only. Open it with write=True"):
        reader.set_state("running")
    with pytest.raises(StoreError, match="read only"):
        reader.append(make_epoch([[1.0]], index=1), {})
    with pytest.raises(StoreError, match="read only"):
        reader.record_event("x")


def test_a_moved_folder_is_the_same_run(store, folder, tmp_path):
    store.append(make_epoch([[1.0, 0.0]]), {})
    store.close()
    moved = shutil.move(folder, tmp_path / "other")
    with RunStore.open(moved, write=True) as again:
        again.append(make_epoch([[0.5, 0.0]], index=1), {})
    assert [e.collection.trajectories[0][0].reward for e in RunStore.open(moved).epochs] == [1.0, 0.5]
    assert not folder.exists()


READ = """
import os, sys
from finetune_nb.store.store import RunStore; from finetune_nb.errors import StoreError
RunStore.open(sys.argv[2]).epochs[0].collection  # all that is needed is loaded before the rights to read it go
if os.getuid() == 0:
    os.setuid(65534)
store = RunStore.open(sys.argv[1])
print(len(store.epochs), store.epochs[-1].collection.trajectories[0][0].reward)
try:
    RunStore.open(sys.argv[1], write=True)
except StoreError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs Unix permissions")
@pytest.mark.parametrize("left_behind", [False, True])
def test_a_folder_that_cannot_be_written_can_be_read(store, folder, left_behind):
    store.append(make_epoch([[0.75, 0.0]]), {})
    place = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())  # pytest's own folders are private
    try:
        if left_behind:  # a crash leaves SQLite's log, which holds the epoch
            shutil.copytree(folder, place / "run", ignore=shutil.ignore_patterns("*-shm"))
            assert (place / "run" / "run.db-wal").stat().st_size > 0
        store.close()
        if not left_behind:
            shutil.copytree(folder, place / "run")
        place.chmod(0o755)
        for path in (place / "run").rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (place / "run").chmod(0o555)
        done = in_another_process(READ, place / "run", folder)
        assert done.stdout.startswith("1 0.75\n"), done.stderr
        assert "write=False" in done.stdout
    finally:
        (place / "run").chmod(0o755)
        (place / "run" / "trajectories").chmod(0o755)
        shutil.rmtree(place)


# ── full disks, crashes ──────────────────────────────────────────────────────────────────────────────────────────────


class Injected:
    """Counts the operating system's calls that write, and lets one of them fail; after a Crash none works any more."""

    NAMES = ("open", "write", "fsync", "replace", "unlink", "ftruncate")

    def __init__(self, monkeypatch, error: type[BaseException] = OSError, at: int = -1):
        self.calls, self.error, self.at = 0, error, at
        for name in self.NAMES:
            monkeypatch.setattr(run_folder.os, name, self._failing(getattr(os, name)))

    def _failing(self, original):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at or (self.error is Crash and self.calls > self.at):
                raise self.error(28, "No space left on device")
            return original(*args, **kwargs)

        return call


class Crash(BaseException):
    """The process is gone; nothing that it would have done after this happens."""


def write_calls(monkeypatch, store) -> int:
    with monkeypatch.context() as patch:
        counted = Injected(patch)
        store.append(make_epoch([[1.0, 0.0]]), {})
        return counted.calls


def test_a_write_that_fails_anywhere_leaves_the_epoch_to_be_appended_again(tmp_path, monkeypatch):
    with RunStore.create(tmp_path / "count", "run", CONFIG) as store:
        calls = write_calls(monkeypatch, store)
    assert calls >= 5
    for at in range(1, calls + 1):
        with RunStore.create(tmp_path / str(at), "run", CONFIG) as store:
            store.append(make_epoch([[1.0, 0.0]]), {})
            store.begin_epoch(1, 0.0, None)
            store.add_rollouts(1, collected([make_trajectory(0.25)]))
            with monkeypatch.context() as patch:
                Injected(patch, OSError, at)
                with pytest.raises(
                    StoreError, match=r"epoch-000001\.parquet could not be written.*append the epoch again"
                ):
                    store.append(make_epoch([[0.5, 0.0]], index=1), {})
            assert len(store.epochs) == 1
            assert store.partial().collection.trajectories[0][0].reward == 0.25
            store.append(make_epoch([[0.5, 0.0]], index=1), {})
        assert [e.collection.trajectories[0][0].reward for e in RunStore.open(tmp_path / str(at)).epochs] == [1.0, 0.5]
        assert sorted(p.name for p in (tmp_path / str(at) / "trajectories").iterdir()) == [
            "epoch-000000.parquet",
            "epoch-000001.parquet",
        ]


def test_a_crash_at_any_file_operation_leaves_the_completed_epochs_and_the_unfinished_one(tmp_path, monkeypatch):
    with RunStore.create(tmp_path / "count", "run", CONFIG) as store:
        calls = write_calls(monkeypatch, store)
    for at in range(1, calls + 1):
        folder, copy = tmp_path / f"{at}", tmp_path / f"{at}-after"
        store = RunStore.create(folder, "run", CONFIG)
        store.append(make_epoch([[1.0, 0.0]]), {"index": 0})
        store.begin_epoch(1, 0.0, None)
        store.add_rollouts(1, collected([make_trajectory(0.25)]))
        with monkeypatch.context() as patch:
            Injected(patch, Crash, at)
            with pytest.raises(Crash):
                store.append(make_epoch([[0.5, 0.0]], index=1), {"index": 1})
        shutil.copytree(folder, copy)  # as the dead process left it
        store.close()
        with RunStore.open(copy, write=True) as after:
            assert len(after.epochs) == 1
            assert after.epochs[0].collection.trajectories[0][0].reward == 1.0
            assert after.state() == {"index": 0}
            assert after.partial().collection.trajectories[0][0].reward == 0.25
            after.append(make_epoch([[0.5, 0.0]], index=1), {})
            assert len(after.epochs) == 2
            assert not list(copy.rglob("*.tmp-*"))


@pytest.mark.parametrize("limit", [40_000, 80_000, 120_000])
def test_a_disk_that_is_really_full_costs_nothing_that_was_complete(store, folder, limit):
    """RLIMIT_FSIZE: the operating system itself refuses to let any file grow, SQLite's log included."""
    store.append(make_epoch([[1.0, 0.0]]), {})
    big = make_epoch([[1.0, 0.0]] * 40, index=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    errors = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for index in range(1, 200):
            try:
                store.begin_epoch(index, 0.0, 0)
                store.add_rollouts(index, big.collection)
                store.record_event("state", state="running" * 10)
                store.append(replace(big, index=index), {"index": index})
            except StoreError as error:
                errors.append(str(error))
                break
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert errors and str(folder) in errors[0] and ("kept" in errors[0])
    done = len(store.epochs)
    assert store.epochs[-1].collection.trajectories[0][0].reward == 1.0
    store.begin_epoch(done, 0.0, 0)
    store.append(replace(big, index=done), {"index": done})
    assert len(RunStore.open(folder).epochs) == done + 1


KILLED = """
import os, sys
from pathlib import Path
import numpy, pyarrow.parquet
from factories import collected, make_epoch, make_trajectory
from finetune_nb.store.store import RunStore
epochs = [make_epoch([[1.0, 0.0]] * 3, index=i) for i in range(400)]
rollouts = collected([make_trajectory(0.25)] * 4)
while name := sys.stdin.readline().strip():
    child = os.fork()
    if child == 0:
        store = RunStore.create(Path(name), "run", {"run": {}})
        for index, epoch in enumerate(epochs):
            store.begin_epoch(index, 0.0, 0)
            store.add_rollouts(index, rollouts)
            store.append(epoch, {"index": index})
            os.write(1, f"done {index}\\n".encode())
        os._exit(0)
    os.write(1, f"child {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"end\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_killed_at_any_moment_loses_no_completed_epoch(tmp_path):
    draw = random.Random(0)
    command = [sys.executable, "-c", KILLED]
    killed_while_writing = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=SUPPORT, text=True) as forker:
        for attempt in range(36):
            folder = tmp_path / str(attempt)
            forker.stdin.write(f"{folder}\n")
            forker.stdin.flush()
            child = int(forker.stdout.readline().split()[1])
            done = -1
            if attempt % 3:  # else it may be killed while it makes the run
                done = int(forker.stdout.readline().split()[1])
            time.sleep(draw.uniform(0.0, 0.08))
            os.kill(child, signal.SIGKILL)
            while (line := forker.stdout.readline()) != "end\n":
                done = int(line.split()[1])
            try:
                store = RunStore.open(folder, write=True)
            except StoreError as error:
                assert done == -1, str(error)  # noqa: PT017  # only a run that was never made may be unreadable
                RunStore.create(folder, "run", CONFIG).close()
                continue
            with store:
                indexes = [epoch.index for epoch in store.epochs]
                assert indexes == list(range(len(indexes))) and len(indexes) >= done + 1
                assert all(len(epoch.collection.trajectories) == 3 for epoch in store.epochs)
                assert (store.state() or {"index": -1})["index"] == len(indexes) - 1
                partial = store.partial()
                assert partial is None or partial.index == len(indexes)
                killed_while_writing += len(indexes) > 0
                store.append(make_epoch([[1.0]], index=len(indexes)), {})
            assert not list(folder.rglob("*.tmp-*"))
        forker.stdin.close()
    assert killed_while_writing >= 10  # else the moments were badly chosen


# ── damaged and hostile folders ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
def test_a_cell_reads_while_the_engine_writes(store):
    seen: list[int] = []

    def read():
        while not seen or seen[-1] < 20:
            epochs = store.epochs
            seen.append(len(epochs))
            assert all(len(epoch.collection.trajectories) == 2 for epoch in epochs[-2:])

    with ThreadPoolExecutor(3) as threads:
        readers = [threads.submit(read) for _ in range(2)]
        for index in range(20):
            store.begin_epoch(index, 0.0, 0)
            store.append(make_epoch([[1.0, 0.0]] * 2, index=index), {})
        for reader in readers:
            reader.result(timeout=60)
    assert seen


def two_epochs(folder) -> Path:
    with RunStore.create(folder, "run", CONFIG) as store:
        for index in range(2):
            store.append(make_epoch([[1.0, 0.0]], index=index), {})
    return folder


@pytest.mark.parametrize("damage", ["missing", "cut", "noise", "empty", "swapped", "directory"])
def test_a_damaged_file_costs_the_trajectories_of_its_own_epoch_only(folder, damage):
    path = trajectory_file(two_epochs(folder), 0)
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "noise":
        middle = len(data) // 3
        path.write_bytes(data[:middle] + bytes(200) + data[middle + 200 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "swapped":
        shutil.copy(trajectory_file(folder, 1), path)
    elif damage == "directory":
        path.mkdir()
    store = RunStore.open(folder)
    first, second = store.epochs
    assert first.metrics.mean_reward == 0.5
    with pytest.raises(StoreError, match=r"(?s)epoch-000000\.parquet.*all other epochs can be read"):
        first.collection  # noqa: B018
    assert second.collection.trajectories[0][0].reward == 1.0


def test_a_file_with_other_columns_or_values_is_refused(folder):
    path = trajectory_file(two_epochs(folder), 0)
    table = pq.read_table(path)
    place = {name: table.schema.get_field_index(name) for name in table.column_names}

    def with_column(name, values):
        return table.set_column(place[name], name, pa.array(values, table.schema.field(name).type))

    hostile = [
        table.drop_columns(["roles"]),
        table.set_column(place["reward"], "reward", pa.array(["a", "b"])),
        with_column("roles", [["root", "user"], ["user", "user"]]),
        with_column("roles", [["user"], ["user"]]),
        with_column("group", [99, -1]),
        with_column("kind", ["failure", "failure"]),
        with_column("metadata", ["[1]", "{"]),
        with_column("metadata", ["[" * 100_000, "{}"]),
        with_column("item_metadata", [["9" * 5000] * 2] * 2),
        table.slice(0, 1),
        table.replace_schema_metadata({b"finetune_nb": b'{"format": 2}'}),
        table.replace_schema_metadata(None),
    ]
    for other in hostile:
        pq.write_table(other, path)
        with pytest.raises(StoreError, match=r"epoch-000000\.parquet"):
            RunStore.open(folder).epochs[0].collection  # noqa: B018


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("hacked",))


def test_metadata_of_a_parquet_file_run_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = trajectory_file(two_epochs(folder), 0)
    table = pq.read_table(path)
    about = table.schema.metadata
    pickled = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Evil())}
    evil = table.schema.set(0, table.schema.field(0).with_metadata(pickled))
    for schema in (
        evil,
        table.schema.with_metadata({**about, b"pandas": b'{"columns": ' + b"[" * 100_000}),
    ):
        pq.write_table(table.cast(schema), path)
        (trajectories,) = RunStore.open(folder).epochs[0].collection.trajectories  # they do not count
        assert [t.reward for t in trajectories] == [1.0, 0.0]
    pq.write_table(table.replace_schema_metadata({**about, b"ARROW:schema": pickle.dumps(Evil())}), path)
    with pytest.raises(StoreError, match=r"epoch-000000\.parquet"):
        RunStore.open(folder).epochs[0].collection  # noqa: B018
    ours = json.loads(about[b"finetune_nb"])
    for wrong in ({"groups": 10**12}, {"run_id": "../x"}, {"epoch": 1}, {"collection": ["x"]}, {"format": None}):
        pq.write_table(table.replace_schema_metadata({b"finetune_nb": json.dumps({**ours, **wrong})}), path)
        with pytest.raises(StoreError, match=r"epoch-000000\.parquet"):
            RunStore.open(folder).epochs[0].collection  # noqa: B018
    assert not (tmp_path / "hacked").exists()


def test_rollouts_that_claim_more_groups_than_there_can_be_are_refused(store, folder):
    store.begin_epoch(0, 0.0, None)
    store.add_rollouts(0, collected([make_trajectory(0.25)]), whole=True)
    with closing(sqlite3.connect(folder / "run.db")) as db:
        (data,) = db.execute("SELECT data FROM rollouts").fetchone()
        table = (
            pa.ipc.open_stream(data).read_all().replace_schema_metadata({b"finetune_nb": b'{"groups": 1000000000000}'})
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        db.execute("UPDATE rollouts SET data = ?", (sink.getvalue().to_pybytes(),))
        db.commit()
    with pytest.raises(StoreError, match="1000000000000 groups"):
        RunStore.open(folder).partial()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_truncated_database_is_a_clear_error(folder, share):
    path = two_epochs(folder) / "run.db"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    for write in (False, True):
        with pytest.raises(StoreError, match=r"run\.db|is empty"):
            RunStore.open(folder, write=write).epochs  # noqa: B018
    assert path.stat().st_size == int(len(data) * share)


def test_a_newer_schema_is_refused_and_says_what_to_do(folder):
    two_epochs(folder)
    with sqlite3.connect(folder / "run.db") as db:
        db.execute("PRAGMA user_version = 99")
    for write in (False, True):
        with pytest.raises(StoreError, match="schema version 99.*Update finetune_nb"):
            RunStore.open(folder, write=write)


def version_of(folder):
    with closing(sqlite3.connect(folder / "run.db")) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def test_an_older_schema_is_read_as_it_is_and_brought_up_to_date_by_a_writer(folder, monkeypatch):
    two_epochs(folder)
    now = len(store_schema.MIGRATIONS)
    newer = (*store_schema.MIGRATIONS, ("ALTER TABLE run ADD COLUMN note TEXT",))
    monkeypatch.setattr(store_schema, "MIGRATIONS", newer)
    reader = RunStore.open(folder)
    assert len(reader.epochs) == 2 and reader.epochs[1].collection.trajectories
    assert version_of(folder) == now
    RunStore.open(folder, write=True).close()
    assert version_of(folder) == now + 1
    assert len(RunStore.open(folder).epochs) == 2


def test_a_database_of_somebody_else_is_left_alone(folder):
    folder.mkdir()
    with sqlite3.connect(folder / "run.db") as db:
        db.execute("CREATE TABLE theirs (x)")
    before = (folder / "run.db").read_bytes()
    for attempt in (lambda: RunStore.open(folder), lambda: RunStore.create(folder, "run", CONFIG)):
        with pytest.raises(StoreError, match="no run of finetune_nb"):
            attempt()
    assert (folder / "run.db").read_bytes() == before


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE run SET id = '../../etc'",
        "UPDATE run SET id = x'05'",
        "DELETE FROM run",
        "UPDATE epochs SET record = '{}'",
        "UPDATE epochs SET record = '[' || record",
        "UPDATE epochs SET rewards = 'text'",
        "UPDATE epochs SET rewards = x'00'",
        "UPDATE epochs SET kept = x'ffffffffffffffff'",
        "UPDATE epochs SET reasons = x'7f'",
        "UPDATE epochs SET offsets = x''",
        "UPDATE epochs SET failures = 1e300",
        "UPDATE epochs SET record = json_set(record, '$.settings', json('{\"percentile\": 7}'))",
        "UPDATE epochs SET record = json_set(record, '$.example_ids', 'q')",
        "UPDATE epochs SET record = json_set(record, '$.metrics', 1)",
        "UPDATE epochs SET record = json_set(record, '$.job.status', 'great')",
        "DROP TABLE epochs",
    ],
)
def test_hostile_values_in_the_database_are_a_clear_error(folder, statement):
    two_epochs(folder)
    with sqlite3.connect(folder / "run.db") as db:
        db.execute(statement)
    with pytest.raises(StoreError, match=r"run\.db"):
        RunStore.open(folder).epochs  # noqa: B018


def write_into(folder):
    with RunStore.open(folder, write=True) as store:
        store.record_event("state", state="running")
        store.append(make_epoch([[1.0]], index=2), {})


def test_symbolic_links_inside_the_folder_are_refused_and_what_they_lead_to_is_untouched(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    for name in ("lock", "log.jsonl", "run.db-wal", "trajectories/epoch-000002.parquet"):
        shutil.rmtree(folder, ignore_errors=True)
        link = two_epochs(folder) / name
        link.unlink(missing_ok=True)
        link.symlink_to(outside)
        with pytest.raises(StoreError, match="symbolic link"):
            write_into(folder)
        assert outside.read_bytes() == b"precious"
    for name in ("trajectories", "config.yml"):
        shutil.rmtree(folder, ignore_errors=True)
        link = two_epochs(folder) / name
        link.rename(tmp_path / f"real-{name}")
        link.symlink_to(tmp_path / f"real-{name}")
        store = RunStore.open(folder)
        with pytest.raises(StoreError, match="symbolic link"):
            store.epochs[0].collection if name == "trajectories" else store.config()


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(folder):
    path = trajectory_file(two_epochs(folder), 0)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="special file"):
        RunStore.open(folder).epochs[0].collection  # noqa: B018
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".hidden", "a b", "x" * 101, "a\n", "-x"])
def test_a_run_id_that_is_no_plain_name_is_refused(folder, run_id):
    with pytest.raises(StoreError, match="expected letters"):
        RunStore.create(folder, run_id, CONFIG)
    assert not folder.exists()


def test_a_folder_that_holds_a_run_is_not_made_again(folder):
    two_epochs(folder)
    with pytest.raises(StoreError, match="there is a run in"):
        RunStore.create(folder, "other", {"run": {"seed": 5}})
    assert RunStore.open(folder).run_id == "run" and RunStore.open(folder).config() == CONFIG


def test_folders_without_a_run_say_so(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        for write in (False, True):
            with pytest.raises(StoreError, match="Give the folder that holds one"):
                RunStore.open(folder, write=write)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "lock"])


def test_a_hostile_config_is_not_run(folder):
    (two_epochs(folder) / "config.yml").write_text("!!python/object/apply:os.system ['touch hacked']")
    with pytest.raises(StoreError, match=r"config\.yml"):
        RunStore.open(folder).config()


def test_broken_lines_of_the_log_are_passed_over(store, folder):
    store.record_event("state", state="running")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind": "sta')
    store.record_event("state", state="done")
    assert [event["state"] for event in store.events()] == ["running", "done"]
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["state"] == "done"
