"""Labels of rollouts, groups and epochs: stored beside whoever writes the run, and seen by every process."""

import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError, RunError, StoreError
from finetune_nb.store import database
from finetune_nb.store.labels import changed_since, read_labels
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def new_run(folder, rows=None, **options):
    policy = ScriptedPolicy(lambda messages, seed: f"reply {seed % 1009}")
    adapter = FakeAdapter(policy=policy)
    return ft.Run(
        solve,
        lambda item: 1.0,
        rows or sums(3),
        generations=3,
        output_dir=folder,
        name="run",
        adapter=adapter,
        **options,
    )


@pytest.fixture
def run(tmp_path):
    run = new_run(tmp_path)
    ft.run_sync(run.next_epoch())
    yield run
    run.close()


def test_a_label_has_its_tag_score_note_author_and_time(run):
    before = pd.Timestamp.now("UTC")
    run.label("e0/sum-1/2", "hacked", score=0.25, note="prints <b>the answer</b>", author="ann")
    (row,) = run.labels().itertuples()
    assert (row.name, row.level, row.epoch, row.example, row.generation) == ("e0/sum-1/2", "rollout", 0, "sum-1", 2)
    assert (row.tag, row.score, row.note, row.author) == ("hacked", 0.25, "prints <b>the answer</b>", "ann")
    assert before <= row.time <= pd.Timestamp.now("UTC")


def test_groups_and_epochs_have_labels_of_their_own(run):
    run.label(["e0", "e0/sum-1", "e0/sum-1/0"], "look")
    found = run.labels()
    assert found.level.tolist() == ["epoch", "group", "rollout"]
    assert found.example.tolist() == [None, "sum-1", "sum-1"]
    assert found.generation.isna().tolist() == [True, True, False]
    labelled = run.trajectories().set_index("trajectory").labels
    assert labelled.map(len).sum() == 1 and labelled["e0/sum-1/0"] == ("look",)


def test_the_same_tag_by_the_same_author_is_replaced_and_by_another_author_added(run):
    run.label("e0/sum-1/0", "good", score=1)
    run.label("e0/sum-1/0", "good", score=0.5, note="on second thoughts")
    run.label("e0/sum-1/0", "good", score=0, author="ann")
    assert run.labels()[["score", "note"]].values.tolist() == [[0.5, "on second thoughts"], [0.0, ""]]
    row = run.trajectories(example="sum-1").iloc[0]
    assert row.labels == ("good",) and row.label_score == 0.25  # each tag once, the mean of both


def test_labels_are_taken_away_by_tag_and_by_author(run):
    for author in ("ann", "bob"):
        run.label("e0/sum-1/0", "good", author=author)
    run.label(["e0/sum-1/0", "e0/sum-1/1"], "flag", author="ann")
    assert run.unlabel("e0/sum-1/0", "good", author="bob") == 1
    assert run.unlabel("e0/sum-1/0", "never given") == 0
    assert run.labels().tag.tolist() == ["good", "flag", "flag"]
    assert run.unlabel(["e0/sum-1/0", "e0/sum-1/1"]) == 3
    assert run.labels().empty and run.trajectories().labels.map(len).sum() == 0


def test_a_frame_of_rollouts_labels_them_all(run):
    rollouts = run.trajectories()
    run.label(rollouts[rollouts.generation == 1], "second")
    assert run.labels().name.tolist() == ["e0/sum-0/1", "e0/sum-1/1", "e0/sum-2/1"]
    run.label(run.labels(), "again")
    assert run.labels().tag.value_counts().to_dict() == {"second": 3, "again": 3}
    with pytest.raises(ConfigError, match="expected `trajectory` or `name`"):
        run.label(rollouts[["reward"]], "x")


def test_ids_with_slashes_are_found_and_the_rollout_comes_before_the_group(tmp_path):
    rows = [{"id": name, "question": "1+1", "answer": "2"} for name in ("a", "a/2", "a/2/1", "/", "", 7)]
    run = new_run(tmp_path, rows)
    ft.run_sync(run.next_epoch())
    rollouts = run.trajectories()
    run.label(rollouts, "each")
    found = run.labels()
    assert found.name.tolist() == rollouts.trajectory.tolist()
    assert found.example.tolist() == rollouts.example.tolist()
    assert found.generation.tolist() == rollouts.generation.tolist()
    run.label(["e0/a", "e0/a/2", "e0/7", "e0/a/2/1"], "one")
    one = run.labels().query("tag == 'one'")
    assert one.level.tolist() == ["group", "rollout", "group", "rollout"]
    assert one.example.tolist() == ["a", "a", 7, "a/2"]
    run.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sum-1/2", "no name of a rollout"),
        ("e0/sum-1/9", "has the generations 0, 1, 2"),
        ("e0/sum-11/0", "Did you mean 'sum-1'"),
        ("e7/sum-1/0", "epochs 0 to 0.*refresh"),
        ("e0/", "names nothing"),
        ("e-1", "no name"),
    ],
)
def test_a_name_of_nothing_is_refused_and_nothing_is_stored(run, name, said):
    with pytest.raises(RunError, match=said):
        run.label(["e0/sum-1/0", name], "x")
    assert run.labels().empty


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"tag": ""}, "tag"),
        ({"tag": "two\nlines"}, "tag"),
        ({"tag": "x" * 101}, "tag"),
        ({"tag": 3}, "tag"),
        ({"score": math.inf}, "score"),
        ({"score": "high"}, "score"),
        ({"score": "1"}, "score"),
        ({"note": None}, "note"),
        ({"note": "x" * 20_001}, "20,001 characters"),
        ({"author": " "}, "author"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(run, bad, said):
    with pytest.raises(ConfigError, match=said):
        run.label("e0/sum-1/0", **{"tag": "x", **bad})
    assert run.labels().empty


def test_a_score_of_nan_is_no_score(run):
    run.label("e0/sum-1/0", "x", score=math.nan)
    assert read_labels(run.folder)[0].score is None and run.labels().score.isna().all()


def test_before_an_epoch_has_ended_a_label_says_what_to_do(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(RunError, match="no epoch yet.*Run one"):
        run.label("e0/sum-1/0", "x")
    assert run.labels().empty and len(run.labels().columns) == 10
    run.close()


def test_labels_of_an_unknown_user_are_by_unknown(run, monkeypatch):
    def no_user():
        raise OSError("no username set in the environment")

    monkeypatch.setattr("getpass.getuser", no_user)
    run.label("e0", "x")
    assert run.labels().author.tolist() == ["unknown"]


def test_hidden_and_hostile_text_is_stored_as_it_can_be_seen(run):
    run.label("e0", "\u202ebad\x1b[0m", note="\ud800 \x00 <script>", author="\u200bann")
    (row,) = run.labels().itertuples()
    assert (row.tag, row.author) == ("[U+202E]bad␛[0m", "[U+200B]ann")
    assert "\x00" not in row.note and "<script>" in row.note


def test_a_rollout_of_an_unfinished_epoch_cannot_be_labelled(tmp_path):
    def fails_later(item):
        if run.records:
            raise SystemExit
        return 1.0

    policy = ScriptedPolicy(lambda messages, seed: "reply")
    run = ft.Run(
        solve, fails_later, sums(2), generations=2, output_dir=tmp_path, name="run", adapter=FakeAdapter(policy=policy)
    )
    ft.run_sync(run.next_epoch())
    run._driver.writer.store.begin_epoch(1, time.time(), 0)
    with pytest.raises(RunError, match="epoch 1 is not complete"):
        run.label("e1/sum-1/0", "x")
    run.close()


def test_labels_are_exported_with_the_trajectories(run, tmp_path):
    run.label("e0/sum-1/0", "good", score=0.5)
    run.label("e0/sum-1/0", "=cmd()")
    lines = [json.loads(line) for line in run.export(tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["labels"] for line in lines if line["labels"]] == [["good", "=cmd()"]]
    assert [line["label_score"] for line in lines if line["label_score"]] == [0.5]
    for name in ("all.parquet", "all.csv"):
        path = run.export(tmp_path / name)
        table = pd.read_parquet(path) if name.endswith("parquet") else pd.read_csv(path)
        assert json.loads(table.set_index("trajectory").labels["e0/sum-1/0"]) == ["good", "=cmd()"]
    labels = pd.read_csv(run.export(tmp_path / "labels.csv", "labels"))
    assert labels.tag.tolist() == ["good", "'=cmd()"]


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────


def in_another_process(folder, code):
    code = f"import finetune_nb as ft\nrun = ft.Run.open({str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.proof
def test_two_processes_label_one_folder_while_one_of_them_writes_it_and_both_see_both(run):
    run.label("e0/sum-1/0", "mine", author="ann")
    known = changed_since(run.folder, 0)
    code = "run.label('e0/sum-1/1', 'theirs', author='bob')\nprint(*run.labels().tag)\nprint(run.writer is not None)"
    assert in_another_process(run.folder, code) == ["mine", "theirs", "True"]
    assert [label.tag for label in changed_since(run.folder, known.change).labels] == ["theirs"]
    ft.run_sync(run.next_epoch())
    run.label("e1/sum-1/0", "mine too")
    assert run.labels().tag.tolist() == ["mine", "theirs", "mine too"]
    assert run.labels(epoch=1).name.tolist() == ["e1/sum-1/0"]
    run.close()
    assert in_another_process(run.folder, "print(len(run.labels()))") == ["3"]


@pytest.mark.slow
@pytest.mark.proof
def test_a_label_is_seen_by_whoever_asks_within_two_seconds(run):
    """Here by a thread that asks as the browser does, with a reader of its own."""
    change = changed_since(run.folder, 0).change
    seconds: list[float] = []
    seen = threading.Event()

    def watch():
        while not seen.wait(0.2):
            for label in changed_since(run.folder, change).labels:
                seconds.append(time.time() - label.time)
                seen.set()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    in_another_process(run.folder, "run.label('e0/sum-1/1', 'x')")
    watcher.join(10)
    assert len(seconds) == 1 and seconds[0] < 2


def test_changes_tell_what_was_removed_too(run):
    run.label(["e0", "e0/sum-1"], "x")
    first = changed_since(run.folder, 0)
    assert changed_since(run.folder, first.change) == (first.change, [])
    run.unlabel("e0")
    second = changed_since(run.folder, first.change)
    assert second.change > first.change
    assert [(label.name, label.removed) for label in second.labels] == [("e0", True)]
    assert [label.name for label in read_labels(run.folder)] == ["e0/sum-1"]


def test_a_folder_without_a_run_has_no_labels(tmp_path):
    assert changed_since(tmp_path, 0) == (0, [])
    assert read_labels(tmp_path / "none") == []


@pytest.mark.parametrize("closed", [True, False])
def test_labels_of_a_run_that_nobody_writes_leave_no_other_file(run, closed):
    run.close()
    if closed:
        run = ft.Run.open(run.folder)
    before = sorted(os.listdir(run.folder))
    run.label("e0", "x")
    assert len(run.labels()) == 1
    assert sorted(os.listdir(run.folder)) == before


def test_labelling_waits_for_a_writer_that_is_in_the_middle_of_a_write(run):
    with closing(sqlite3.connect(run.folder / "run.db", isolation_level=None, check_same_thread=False)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        threading.Timer(0.3, lambda: writer.execute("COMMIT")).start()
        run.label("e0", "x")
        assert len(run.labels()) == 1


def test_a_folder_that_cannot_be_written_says_so(run, monkeypatch):
    run.close()

    def full(*_):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("finetune_nb.store.labels.change_beside", full)
    with pytest.raises(StoreError, match=r"run\.db.*label a copy"):
        run.label("e0", "x")


# ── older and foreign files ──────────────────────────────────────────────────────────────────────────────────────────


def make_older(folder):
    with closing(sqlite3.connect(folder / "run.db")) as db:
        db.executescript("DROP TABLE labels; PRAGMA user_version = 2")


def test_a_run_of_an_older_release_has_no_labels_until_it_is_labelled(run):
    run.close()
    make_older(run.folder)
    run = ft.Run.open(run.folder)
    assert run.labels().empty and len(run) == 1
    with closing(sqlite3.connect(run.folder / "run.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 2  # reading changes nothing
    run.label("e0/sum-1/0", "x")
    assert len(run.labels()) == 1 and len(run.trajectories()) == 9


def test_a_run_of_the_first_schema_is_labelled_too(tmp_path):
    with zipfile.ZipFile(Path(__file__).parents[1] / "data" / "run_of_schema_1.zip") as file:
        file.extractall(tmp_path)
    (path,) = tmp_path.rglob("run.db")
    run = ft.Run.open(path.parent)
    assert run.labels().empty
    name = run.trajectories().trajectory.iloc[0]
    run.label(name, "x")
    assert run.labels().name.tolist() == [name] and len(ft.Run.open(path.parent)) == len(run)


def test_a_row_that_is_no_label_hides_no_other(run, caplog):
    run.label(["e0", "e0/sum-1"], "x")
    run.close()
    with closing(sqlite3.connect(run.folder / "run.db")) as db:
        db.execute("UPDATE labels SET example = '{' WHERE name = 'e0/sum-1'")
        db.commit()
    assert run.labels().name.tolist() == ["e0"]
    assert run.labels().name.tolist() == ["e0"]
    assert caplog.text.count("a label cannot be read") == 1


@pytest.mark.parametrize(
    "script",
    [
        "DROP TABLE labels; CREATE VIEW labels AS SELECT 1 AS name",
        "CREATE TRIGGER t AFTER INSERT ON labels BEGIN DELETE FROM epochs; END",
        "DROP TABLE labels",
    ],
)
def test_a_table_that_computes_something_is_refused(run, script):
    run.close()
    with closing(sqlite3.connect(run.folder / "run.db")) as db:
        db.executescript(script)
    with pytest.raises(StoreError, match="labels"):
        run.label("e0", "x")
    with pytest.raises(StoreError, match="labels"):
        run.labels()


def test_a_file_that_changed_while_it_was_read_is_read_again(run, monkeypatch):
    """A process that labels comes and goes in a moment: its log is gone when the reader looks for one."""
    run.close()
    run.label("e0", "first")
    states = iter([(1, 1, 1), (1, 1, 2)])
    monkeypatch.setattr(database, "_as_it_lies", lambda path: next(states))
    reads = []
    monkeypatch.setattr(database, "_check_tables", lambda *_: reads.append(1))
    assert len(read_labels(run.folder)) == 1
    assert len(reads) == 2


def test_labels_of_epochs_that_were_rewound_are_gone(run):
    ft.run_sync(run.next_epoch())
    run.label(["e0/sum-1/0", "e1/sum-1/0", "e1"], "x")
    change = changed_since(run.folder, 0).change
    run._driver.writer.store.rewind(0)
    assert [label.name for label in read_labels(run.folder)] == ["e0/sum-1/0"]
    assert {label.name for label in changed_since(run.folder, change).labels} == {"e1/sum-1/0", "e1"}
