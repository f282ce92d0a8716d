"""The file of an epoch can grow: a column that it lacks reads as missing values, one that nobody knows is passed over."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import finetune_nb as ft
from finetune_nb.errors import StoreError
from finetune_nb.store.store import RunStore
from finetune_nb.store.trajectory_table import COLUMNS, FORMAT, OLDEST_READER, MessageColumn
from finetune_nb.types import EpisodeItem, Trajectory, TrajectoryCollection

DATA = Path(__file__).parents[1] / "data"
EPOCH = 3
"""Of the run in the zip: 30 trajectories, 2 of them without a reward, and 6 failures with their model calls."""
FRAMES = ("trajectories", "messages", "tokens", "groups", "epochs")
REQUIRED = [name for name, column in COLUMNS.items() if column.required]
LATER = {"output", "entropies"}
"""Columns that the run in the zip does not have: a later format brought them."""
OPTIONAL = [name for name in COLUMNS if name not in REQUIRED and name not in LATER]
MADE_OF = {
    "generation": {"trajectories": ["generation"], "messages": [], "tokens": []},
    "error": {"trajectories": ["error"]},
    "turns": {"trajectories": ["turns"]},
    "tokens": {"trajectories": ["tokens"]},
    "policy_version": {"trajectories": ["policy_version"]},
    "finish_reason": {"trajectories": ["finish_reason"]},
    "token_ids": {"tokens": ["token_id"]},
    "token_texts": {"tokens": ["token"]},
    "prompt_token_ids": {"messages": ["prompt_tokens"]},
    "item_metadata": {"messages": ["tool_calls", "tool_call_id", "finish_reason", "seconds"]},
}
"""Column of the file -> the columns of each frame that are made of it."""
READ_BY_NO_FRAME = {"example", "shaped_rewards", "others"}
"""`others` is empty in this run."""


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that release 0.1.0 wrote."""
    with zipfile.ZipFile(DATA / "run_of_format_1.zip") as file:
        file.extractall(tmp_path)
    return tmp_path / "runs" / "first"


def change_file(folder: Path, change, **options) -> None:
    """Writes the epoch's file anew, changed."""
    path = folder / "trajectories" / f"epoch-{EPOCH:06}.parquet"
    pq.write_table(change(pq.read_table(path)), path, **options)


def without(*columns: str):
    return lambda table: table.drop_columns(list(columns))


def saying(**words):
    """The table with other words about itself in the schema's metadata."""

    def change(table: pa.Table) -> pa.Table:
        known = json.loads(table.schema.metadata[b"finetune_nb"])
        return table.replace_schema_metadata({b"finetune_nb": json.dumps({**known, **words})})

    return change


def frames_of(folder: Path) -> dict[str, pd.DataFrame]:
    run = ft.Run.open(folder)
    return {name: getattr(run, name)(epoch=EPOCH) for name in FRAMES}


def trajectories_of(folder: Path) -> list[Trajectory]:
    collection = RunStore.open(folder).epochs[EPOCH].collection
    return [trajectory for group in collection.trajectories for trajectory in group]


def is_failed(frame: pd.DataFrame) -> pd.Series:
    """Which rows are of a failed rollout: what is known of those does not stand in these columns."""
    if "failed" in frame:
        return frame.failed
    return frame.reason.isna() if "reason" in frame else pd.Series(False, frame.index)


# ── a file that lacks a column ───────────────────────────────────────────────────────────────────────────────────────


def test_these_tests_know_every_column():
    assert sorted([*MADE_OF, *READ_BY_NO_FRAME, "scores", "steps", "logprobs"]) == sorted(OPTIONAL)
    assert REQUIRED == ["kind", "group", "reward", "metadata", "roles", "contents"]


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("column", MADE_OF)
def test_what_is_made_of_a_column_that_the_file_lacks_is_missing_and_all_else_is_as_before(folder, column):
    before = frames_of(folder)
    change_file(folder, without(column))
    after = frames_of(folder)
    for name in FRAMES:
        lost = MADE_OF[column].get(name, [])
        failed = is_failed(after[name])
        for each in lost:
            assert before[name][each].notna().any()
            assert after[name][each][~failed].isna().all()  # NaN or <NA>, and no zero
            assert str(after[name][each].dtype) == str(before[name][each].dtype)
        kept = [each for each in before[name] if each not in lost]
        pd.testing.assert_frame_equal(after[name][kept], before[name][kept])


@pytest.mark.parametrize("column", sorted(READ_BY_NO_FRAME))
def test_a_column_that_no_frame_is_made_of_is_not_missed(folder, column):
    before = frames_of(folder)
    change_file(folder, without(column))
    after = frames_of(folder)
    for name in FRAMES:
        pd.testing.assert_frame_equal(after[name], before[name])


def test_without_scores_no_evaluator_has_a_column(folder):
    before = frames_of(folder)["trajectories"]
    change_file(folder, without("scores"))
    after = frames_of(folder)["trajectories"]
    assert [name for name in before if name not in after] == ["score_reward", "score_used_tool"]
    pd.testing.assert_frame_equal(after, before[after.columns])


def test_without_logprobs_it_is_not_known_what_was_sampled(folder):
    before = frames_of(folder)
    change_file(folder, without("logprobs"))
    after = frames_of(folder)
    messages = after["messages"][~after["messages"].failed]
    assert messages.tokens.isna().all() and messages.mean_logprob.isna().all()
    assert str(messages.tokens.dtype) == "Int64"
    assert len(after["tokens"]) == 0
    assert after["tokens"].dtypes.astype(str).equals(before["tokens"].dtypes.astype(str))
    pd.testing.assert_frame_equal(after["trajectories"], before["trajectories"])
    assert all(item.logprobs is None for trajectory in trajectories_of(folder) for item in trajectory.episode)


def test_without_steps_it_is_not_known_what_a_failed_rollout_had_done(folder):
    before = frames_of(folder)
    change_file(folder, without("steps"))
    after = frames_of(folder)
    assert before["messages"].failed.any() and not after["messages"].failed.any()
    assert len(after["messages"]) == (~before["messages"].failed).sum()
    pd.testing.assert_frame_equal(after["trajectories"], before["trajectories"])
    failures = RunStore.open(folder).epochs[EPOCH].collection.failures
    assert len(failures) == 6 and all(failure.steps == [] and failure.error for failure in failures)


@pytest.mark.parametrize("column", OPTIONAL)
def test_a_rollout_of_a_file_that_lacks_a_column_is_still_shown(folder, column):
    change_file(folder, without(column))
    run = ft.Run.open(folder)
    view = run.show(EPOCH, "train-0003")
    assert view.trajectory.reward == 1.0
    assert "12-17+15-15" in view._repr_html_()
    assert run.show(EPOCH, "train-0003", 1).failure.error == "ValueError: the answer -3 ends with 3"
    assert "train-0003" in run.compare_group(EPOCH, "train-0003")._repr_html_()


@pytest.mark.parametrize("column", OPTIONAL)
def test_trajectories_of_a_file_that_lacks_a_column_keep_all_else(folder, column):
    keys = {"token_ids": "token_ids", "token_texts": "tokens", "prompt_token_ids": "prompt_token_ids"}
    before = trajectories_of(folder)
    change_file(folder, without(column))
    after = trajectories_of(folder)
    for old, new in zip(before, after, strict=True):
        assert new.metadata == old.metadata
        assert new.reward == old.reward or (math.isnan(new.reward) and math.isnan(old.reward))
        for had, has in zip(old.episode, new.episode, strict=True):
            assert isinstance(had, EpisodeItem) and isinstance(has, EpisodeItem)
            assert (has.role, has.content) == (had.role, had.content)
            assert has.logprobs == (None if column == "logprobs" else had.logprobs)
            expected = dict(had.metadata or {})
            if column == "item_metadata":
                expected = {key: value for key, value in expected.items() if key in keys.values()}
            expected.pop(keys.get(column, ""), None)
            assert (has.metadata or {}) == expected


def test_a_file_with_no_more_than_it_must_have_is_read(folder):
    change_file(folder, without(*OPTIONAL))
    found = frames_of(folder)
    trajectories, messages = found["trajectories"], found["messages"]
    assert trajectories.trajectory.iloc[0] == "e3/train-0001/0"
    assert trajectories.reward.sum() == 11
    assert trajectories[["generation", "turns", "tokens", "policy_version"]][:30].isna().all(axis=None)
    assert messages.role.value_counts().to_dict() == {"assistant": 45, "user": 30, "tool": 15}
    assert len(trajectories_of(folder)) == 30


@pytest.mark.parametrize("column", REQUIRED)
def test_a_file_without_what_every_file_has_is_refused_with_what_is_to_be_done(folder, column):
    change_file(folder, without(column))
    message = rf"(?s)epoch-000003\.parquet.*column {column} is missing, expected.*unless you have a copy"
    with pytest.raises(StoreError, match=message):
        trajectories_of(folder)
    with pytest.raises(StoreError, match=message):
        RunStore.open(folder).columns(EPOCH, ["tokens"])


def test_missing_values_of_messages_have_their_places_in_every_part_of_a_long_file(folder):
    change_file(folder, without("token_ids", "turns"), row_group_size=5)
    table = RunStore.open(folder).columns(EPOCH, ["turns", "token_ids"])
    assert table.column_names == ["turns", "token_ids"]
    assert table["turns"].null_count == 36
    lengths = [None if values is None else len(values) for values in table["token_ids"].to_pylist()]
    assert lengths == [len(trajectory.episode) for trajectory in trajectories_of(folder)] + [None] * 6
    assert {value for values in table["token_ids"].to_pylist() for value in values or ()} == {None}


def test_rollouts_of_an_unfinished_epoch_that_lack_a_column_are_read(folder):
    expected = [t.episode[-1].content for g in RunStore.open(folder).partial().collection.trajectories for t in g]
    with closing(sqlite3.connect(folder / "run.db")) as db, db:
        for place, data in db.execute("SELECT rowid, data FROM rollouts").fetchall():
            table = pa.ipc.open_stream(data).read_all().drop_columns(["token_ids", "steps", "policy_version"])
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            db.execute("UPDATE rollouts SET data = ? WHERE rowid = ?", (sink.getvalue().to_pybytes(), place))
    partial = RunStore.open(folder).partial()
    found = [t for group in partial.collection.trajectories for t in group]
    assert [t.episode[-1].content for t in found] == expected
    assert all("token_ids" not in (t.episode[-1].metadata or {}) for t in found)
    assert all(t.episode[-1].metadata["prompt_token_ids"] for t in found)
    assert len(partial.collection.failures) == 3


# ── a file that has more ─────────────────────────────────────────────────────────────────────────────────────────────


def with_more(table: pa.Table) -> pa.Table:
    """Two columns that this release does not know: one of rollouts, one of messages."""
    table = table.add_column(3, "mood", pa.array(["good"] * len(table)))
    return table.append_column("heads", table["roles"])


@pytest.mark.parametrize("words", [{}, {"format": FORMAT + 1, "reader": FORMAT}])
def test_columns_of_a_later_release_are_passed_over(folder, words):
    before, trajectories = frames_of(folder), trajectories_of(folder)
    change_file(folder, lambda table: saying(**words)(with_more(table)))
    for name, frame in frames_of(folder).items():
        pd.testing.assert_frame_equal(frame, before[name])
    assert list(map(repr, trajectories_of(folder))) == list(map(repr, trajectories))
    assert "12-17+15-15" in ft.Run.open(folder).show(EPOCH, "train-0003")._repr_html_()


@pytest.mark.parametrize("words", [{"format": FORMAT + 1}, {"format": 9, "reader": FORMAT + 1}, {"reader": "1"}])
def test_a_file_that_this_release_would_misread_is_refused(folder, words):
    change_file(folder, saying(**words))
    with pytest.raises(StoreError, match=rf"format \d, expected {FORMAT}; update finetune_nb"):
        trajectories_of(folder)


# ── a release with one column more ───────────────────────────────────────────────────────────────────────────────────

NEW_COLUMNS = f"""
    "seed": FileColumn("int64", lambda rollouts: counts_of(rollouts.of_metadata("seed")), since={FORMAT + 1}, required=True),
    "thoughts": MessageColumn("list<string>", lambda messages: messages.contents(), since={FORMAT + 2}),
"""
LATER_RELEASE = f"""
import sys
from pathlib import Path

import finetune_nb as ft
from finetune_nb.store import trajectories, trajectory_table
from finetune_nb.store.store import RunStore
from finetune_nb.types import EpisodeItem, Trajectory, TrajectoryCollection

old, new = map(Path, sys.argv[1:])
assert trajectory_table.FORMAT == {FORMAT + 2}, trajectory_table.FORMAT
store = RunStore.open(old)
table = store.columns(3, ["seed", "thoughts", "reward"])
assert table["seed"].null_count == 36
assert {{each for said in table["thoughts"].to_pylist() for each in said or ()}} == {{None}}
assert len(store.epochs[3].collection.trajectories) == 6 and len(ft.Run.open(old).messages()) == 412

items = [EpisodeItem(role="user", content="2+2"), EpisodeItem(role="assistant", content="4", logprobs=[-0.5])]
trajectory = Trajectory(episode=items, reward=1.0, metadata={{"id": "q", "generation": 0, "seed": 7}})
trajectories.write_trajectories(new, 0, "later", TrajectoryCollection(trajectories=[[trajectory]], run_id="later"))
table = trajectories.read_columns(new, 0, "later", 1, 1, ["seed", "thoughts"])
assert table.to_pydict() == {{"seed": [7], "thoughts": [["2+2", "4"]]}}
"""


@pytest.mark.slow
def test_a_new_column_is_one_line_and_older_and_newer_releases_read_each_others_files(folder, tmp_path):
    later = tmp_path / "later"
    shutil.copytree(Path(ft.__file__).parent, later / "finetune_nb", ignore=shutil.ignore_patterns("__pycache__"))
    module = later / "finetune_nb" / "store" / "trajectory_table.py"
    code, line = module.read_text(encoding="utf-8"), '    "steps": FileColumn('
    assert code.count(line) == 1
    module.write_text(code.replace(line, NEW_COLUMNS.lstrip("\n") + line), encoding="utf-8")

    new = tmp_path / "new"
    new.mkdir()
    (tmp_path / "check.py").write_text(LATER_RELEASE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "check.py", folder, new],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(later)}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    # This release reads what that one wrote.
    from finetune_nb.store.trajectories import read_columns, read_trajectories

    schema = pq.read_schema(new / "trajectories" / "epoch-000000.parquet")
    assert json.loads(schema.metadata[b"finetune_nb"])["format"] == FORMAT + 2
    assert {"seed", "thoughts"} < set(schema.names)
    found = read_trajectories(new, 0, "later", 1, 1)
    assert isinstance(found, TrajectoryCollection)
    assert [item.content for item in found.trajectories[0][0].episode] == ["2+2", "4"]
    assert read_columns(new, 0, "later", 1, 1, ["turns"]).to_pydict() == {"turns": [2]}


def test_releases_that_know_no_more_than_the_first_columns_can_read_what_is_written_today():
    assert OLDEST_READER == 1
    assert {name for name, column in COLUMNS.items() if column.since > 1} == LATER
    assert not any(COLUMNS[name].required for name in LATER)
    assert isinstance(COLUMNS["roles"], MessageColumn) and not isinstance(COLUMNS["steps"], MessageColumn)
