"""A DataFrame's named index is a column of the dataset; one without a name is left out, and that is said."""

from __future__ import annotations

import logging

import pandas as pd
import pytest

import finetune_nb as ft
from finetune_nb.config.base import EvalDatasetBaseConfig
from finetune_nb.rollouts.datasets import load_dataset, read_rows
from finetune_nb.testing import FakeAdapter, sums


@pytest.fixture
def frame():
    return pd.DataFrame({"id": ["a", "b"], "question": ["1+1", "2+2"], "answer": ["2", "4"], "level": [1, 2]})


def test_a_named_index_counts_as_a_column(frame, caplog):
    items = load_dataset(frame.set_index("id"))
    assert [item.id for item in items] == ["a", "b"]
    assert [item.full_dataset_entry["id"] for item in items] == ["a", "b"]
    assert not caplog.records


def test_an_index_of_another_name_is_an_id_by_the_configs_id_key(frame):
    config = EvalDatasetBaseConfig(id_key="key")
    items = load_dataset(frame.rename(columns={"id": "key"}).set_index("key"), config)
    assert [item.id for item in items] == ["a", "b"]


def test_the_question_may_be_the_index(frame):
    assert [item.input_obj for item in load_dataset(frame.set_index("question"))] == ["1+1", "2+2"]


def test_every_named_level_of_several_counts(frame):
    rows = read_rows(frame.set_index(["id", "level"]))
    assert rows[1] == {"id": "b", "level": 2, "question": "2+2", "answer": "4"}
    assert type(rows[1]["level"]) is int
    assert list(rows[0])[:2] == ["id", "level"]


def test_of_several_levels_those_without_a_name_are_left_out_and_that_is_said_once(frame, caplog):
    rows = read_rows(frame.set_index(["id", "level"]).rename_axis(["id", None]))
    assert set(rows[0]) == {"id", "question", "answer"}
    assert len(caplog.records) == 1 and "no name" in caplog.text


def test_a_default_index_is_left_out_without_a_word(frame, caplog):
    assert set(read_rows(frame)[0]) == {"id", "question", "answer", "level"}
    assert not caplog.records


@pytest.mark.parametrize("index", [["x", "y"], [1, 0], [5, 6], [0.5, 1.5], pd.date_range("2026-01-01", periods=2)])
def test_an_unnamed_index_that_is_not_the_default_is_left_out_with_one_log_line(frame, index, caplog):
    rows = read_rows(frame.set_axis(index, axis=0))
    assert set(rows[0]) == {"id", "question", "answer", "level"}
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING and "rename_axis" in caplog.text


def test_a_column_wins_over_an_index_of_its_name_and_that_is_said(frame, caplog):
    rows = read_rows(frame.set_axis(pd.Index(["x", "y"], name="id"), axis=0))
    assert [row["id"] for row in rows] == ["a", "b"]
    assert len(caplog.records) == 1 and "column 'id'" in caplog.text


def test_a_missing_value_in_an_index_is_none_and_numbers_are_pythons_own(frame):
    rows = read_rows(frame.set_axis(pd.Index([1.0, float("nan")], name="weight"), axis=0))
    assert [row["weight"] for row in rows] == [1.0, None]
    (first, _) = read_rows(frame.set_axis(pd.Index([7, 8], name=3), axis=0))
    assert first["3"] == 7 and type(first["3"]) is int


def test_the_index_that_a_parquet_file_holds_counts_too(frame, tmp_path):
    frame.set_index("id").to_parquet(tmp_path / "rows.parquet")
    assert [item.id for item in load_dataset(tmp_path / "rows.parquet")] == ["a", "b"]


def test_an_empty_frame_and_its_filters_change_nothing(frame, caplog):
    assert read_rows(frame.set_index("id").iloc[:0]) == []
    rows = read_rows(frame.set_index("id").iloc[1:])
    assert [row["id"] for row in rows] == ["b"] and not caplog.records


def test_rollouts_of_a_run_join_with_the_frame_that_they_came_from(tmp_path):
    async def solve(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    frame = pd.DataFrame(sums(3)).set_index("id")
    run = ft.Run(solve, lambda item: 1.0, frame, generations=2, output_dir=tmp_path, adapter=FakeAdapter())
    try:
        ft.run_sync(run.next_epoch())
        joined = run.trajectories().merge(frame, left_on="example", right_index=True)
        assert len(joined) == 6
    finally:
        run.close()
