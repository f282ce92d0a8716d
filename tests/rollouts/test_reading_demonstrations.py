"""Demonstrations as they are read of rows, files and tables."""

import json

import pytest

from finetune_nb.errors import DatasetError
from finetune_nb.rollouts.demonstrations import read_demonstrations

ASKED = {"role": "user", "content": "2+2"}
SAID = {"role": "assistant", "content": "=4"}
ROW = {"messages": [ASKED, SAID]}


def test_lists_of_messages_and_rows_with_messages_are_the_same():
    assert (
        read_demonstrations([ROW]) == read_demonstrations([[ASKED, SAID]]) == read_demonstrations(iter([[ASKED, SAID]]))
    )


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "frame", "datasets"])
def test_tables_and_files_are_read(tmp_path, kind):
    call = {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [
        {**ROW, "tools": None},
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools},
    ]
    if kind == "jsonl":
        source = tmp_path / "rows.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        source = str(tmp_path / "rows.json")
        (tmp_path / "rows.json").write_text(json.dumps(rows))
    elif kind == "datasets":
        source = pytest.importorskip("datasets").Dataset.from_list(rows)
    else:
        source = pytest.importorskip("pandas").DataFrame(rows)
        if kind == "parquet":
            source.to_parquet(tmp_path / "rows.parquet")
            source = tmp_path / "rows.parquet"
    read = read_demonstrations(source)
    assert not read.errors and [each.row for each in read.rows] == [0, 1]
    assert read.rows[0].messages == [ASKED, SAID] and read.rows[0].tools is None  # without the tables' empty fields
    assert read.rows[1].tools == tools and read.rows[1].messages[1]["tool_calls"] == [call]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "2+2"}, "has no messages"),
        (7, "messages is a int"),
        ({"messages": "2+2"}, "messages is a str"),
        ([ASKED], "no message of the assistant"),
        ([ASKED, {**SAID, "weight": 0}], "no message of the assistant"),
        ([ASKED, {**SAID, "weight": 0.5}], "weight 0.5; expected 0 or 1"),
        ([ASKED, "=4"], "message 1 is a str"),
        ([{"role": "robot", "content": "x"}, SAID], "expected one of assistant"),
        ([ASKED, {"role": "assistant"}], "message 1 has neither content nor tool_calls"),
        ({"messages": [ASKED, SAID], "tools": 3}, "tools is a int"),
    ],
)
def test_a_row_that_is_none_is_an_error_with_its_number(row, said):
    read = read_demonstrations([ROW, row, ROW])
    assert [each.row for each in read.rows] == [0, 2]
    (error,) = read.errors
    assert error.row == 1 and said in error.error


def test_what_is_no_dataset_is_refused():
    with pytest.raises(DatasetError, match="got int"):
        read_demonstrations(7)
    with pytest.raises(DatasetError, match="unknown kind of file"):
        read_demonstrations("rows.txt")


def test_an_error_repeats_little_of_a_hostile_row():
    (error,) = read_demonstrations([{"messages": [{"role": "x" * 100_000, "content": "y"}]}]).errors
    assert len(error.error) < 400
