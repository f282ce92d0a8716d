"""An epoch's file is cut into parts of about half a million tokens, so that one rollout can be read without the others."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from factories import item, make_epoch, make_trajectory
from records import epoch_of, failed, stored

from finetune_nb.errors import StoreError
from finetune_nb.store import trajectories
from finetune_nb.store.folder import trajectory_file
from finetune_nb.store.trajectory_table import COLUMNS


def long_rollout(example, generation, characters):
    trajectory = make_trajectory(float(generation % 2), example, generation)
    trajectory.episode = [item("user", "x" * characters), item("assistant", "y", logprobs=[-1.0])]
    return trajectory


def sizes(folder):
    about = pq.ParquetFile(trajectory_file(folder / "run", 0)).metadata
    return [about.row_group(number).num_rows for number in range(about.num_row_groups)]


def test_rollouts_of_one_example_stay_in_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "TOKENS_PER_GROUP", 1000)
    groups = [[long_rollout(f"q{g}", k, 1000) for k in range(3)] for g in range(4)]  # 250 tokens each
    (record,) = stored(tmp_path, epoch_of(groups))
    assert sizes(tmp_path) == [3, 3, 3, 3]
    first, table = record.row_group(7, COLUMNS)
    assert first == 6 and table.column("example").to_pylist() == ["q2"] * 3
    assert [len(group) for group in record.collection.trajectories] == [3] * 4


def test_a_group_that_is_too_long_is_cut_and_the_sampled_tokens_count(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "TOKENS_PER_GROUP", 1000)
    long = make_trajectory(1.0, "q", 0)
    long.episode = [item("assistant", "y", logprobs=[-1.0] * 900)]
    (record,) = stored(tmp_path, epoch_of([[long, *(long_rollout("q", k, 2000) for k in range(1, 4))]]))
    assert sizes(tmp_path) == [1, 2, 1]
    assert record.row_group(2, COLUMNS)[0] == 1


def test_short_rollouts_are_cut_by_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "ROWS_PER_GROUP", 4)
    stored(tmp_path, make_epoch([[0, 1, 1], [0, 1, 1], [1]], failures=[failed()]))
    assert sizes(tmp_path) == [3, 4, 1]


def test_an_epoch_without_rollouts_can_be_written_and_read(tmp_path):
    (record,) = stored(tmp_path, make_epoch({}))
    assert record.collection.trajectories == []
    with pytest.raises(StoreError, match="found row 0"):
        record.row_group(0, ["reward"])


def test_a_file_in_one_part_as_it_was_written_before_is_read_as_well(tmp_path):
    (record,) = stored(tmp_path, make_epoch([[0, 1], [1, 1]], failures=[failed()]))
    path = trajectory_file(tmp_path / "run", 0)
    pq.write_table(pq.read_table(path), path, row_group_size=8192)
    first, table = record.row_group(4, COLUMNS)
    assert (first, len(table)) == (0, 5) and table.column("kind")[4].as_py() == "failure"
