"""Datasets: files, lists and frames become items; what is wrong with them is said."""

import json

import pandas as pd
import pytest

import finetune_nb as ft
from finetune_nb.config import EvalDatasetBaseConfig, EvalDatasetStructureConfig
from finetune_nb.errors import DatasetError, WorkflowError
from finetune_nb.rollouts.datasets import load_dataset, to_items
from finetune_nb.rollouts.workflow import Workflow
from finetune_nb.testing import FakeAdapter, ScriptedPolicy

ROWS = [{"id": "007", "question": "3+4", "answer": "7"}, {"id": "b", "question": "1+1", "answer": "2"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_keeps_ids_and_questions(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame(ROWS)
    if suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    items = load_dataset(path)
    assert [item.id for item in items] == ["007", "b"]
    assert [item.input_obj for item in items] == ["3+4", "1+1"]
    assert str(items[0].expected_output_obj) == "7"


def test_list_and_frame_give_the_same_items():
    assert load_dataset(ROWS) == load_dataset(pd.DataFrame(ROWS))


def test_missing_ids_are_made_and_clash_with_no_given_one():
    items = to_items([{"question": "a"}, {"question": "b", "id": "0"}, {"question": "c", "id": None}])
    ids = [str(item.id) for item in items]
    assert len(set(ids)) == 3
    assert ids[1] == "0"


def test_duplicate_ids_are_named():
    with pytest.raises(DatasetError, match=r"'x'.*needs its own"):
        to_items([{"id": "x", "question": "a"}, {"id": "x", "question": "b"}, {"id": "y", "question": "c"}])


def test_an_empty_cell_of_a_table_is_missing_not_nan(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,question,answer\n1,,7\n2,1+1,2\n")
    assert load_dataset(path)[0].input_obj is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is empty"),
        ("{}", "expected a list"),
        ("[1]", "row 0"),
        ("[", "not readable as json"),
        ('[{"id": ["a"], "question": "a"}]', "expected a text or a number"),
    ],
)
def test_a_bad_file_is_a_clear_error(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_dataset(path)


def test_a_column_that_nothing_names_may_be_missing():
    rows = [{"statement": "1+1", "result": "2"}]
    item = to_items(rows)[0]
    assert (item.input_obj, item.expected_output_obj, item.full_dataset_entry) == (None, None, rows[0])


@pytest.mark.parametrize(("key", "what"), [("question_key", "question"), ("answer_key", "answer")])
def test_a_column_that_the_config_names_must_be_there(tmp_path, key, what):
    path = tmp_path / "rows.json"
    path.write_text('[{"prompts": "a", "solution": "b"}]')
    config = EvalDatasetBaseConfig(structure=EvalDatasetStructureConfig(**{key: "prompt"}))
    with pytest.raises(DatasetError, match=f"no column 'prompt' for the {what}. Did you mean 'prompts'"):
        load_dataset(path, config)


def test_a_workflow_whose_question_is_no_column_is_refused():
    items = to_items([{"qestion": "a"}])
    with pytest.raises(WorkflowError, match="no such column for the question. Did you mean 'qestion'"):
        Workflow(lambda question, llm: "", object()).check(items)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DatasetError, match=r"none\.json.*Looked in"):
        load_dataset(tmp_path / "none.json")


def test_an_unknown_kind_of_file_names_the_known_ones(tmp_path):
    with pytest.raises(DatasetError, match=r"\.parquet"):
        load_dataset_of(tmp_path / "rows.pickle")


def load_dataset_of(path):
    path.write_bytes(b"")
    return load_dataset(path)


def test_structure_names_the_columns():
    config = EvalDatasetBaseConfig(structure=EvalDatasetStructureConfig(question_key="prompt", answer_key="target"))
    (item,) = to_items([{"id": 1, "prompt": "p", "target": "t"}], config)
    assert (item.input_obj, item.expected_output_obj) == ("p", "t")


def test_filters_allow_and_deny_rows():
    config = EvalDatasetBaseConfig.model_validate(
        {"filter": {"allowlist": {"field": {"level": [1, 2]}}, "denylist": {"field": {"id": ["b"]}}}}
    )
    rows = [{"id": i, "question": "q", "level": level} for i, level in (("a", 1), ("b", 2), ("c", 3))]
    assert [item.id for item in to_items(rows, config)] == ["a"]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    assert len(load_dataset(path)) == 2
    path.write_text(json.dumps([*ROWS, {"id": "c", "question": "2+2", "answer": "4"}]))
    assert len(load_dataset(path)) == 3


def trl_rows():
    from datasets import Dataset

    conversation = [{"role": "user", "content": "3+4"}]
    return Dataset.from_dict({"prompt": [conversation, conversation], "solution": ["7", "8"], "level": [1, 2]})


@pytest.mark.slow
def test_a_dataset_of_hugging_face_is_taken_with_the_columns_of_trl():
    for source in (trl_rows(), trl_rows().to_iterable_dataset(), trl_rows().with_format("numpy").with_format(None)):
        items = load_dataset(source)
        assert [item.input_obj for item in items] == [[{"role": "user", "content": "3+4"}]] * 2
        assert [item.expected_output_obj for item in items] == ["7", "8"]
        assert [item.full_dataset_entry["level"] for item in items] == [1, 2]


def test_columns_that_have_our_names_or_are_named_come_before_those_of_trl():
    row = {"question": "a", "prompt": "b", "text": "c", "answer": "d", "solution": "e"}
    assert (to_items([row])[0].input_obj, to_items([row])[0].expected_output_obj) == ("a", "d")
    named = EvalDatasetBaseConfig(structure=EvalDatasetStructureConfig(question_key="text", answer_key="solution"))
    item = to_items([row], named)[0]
    assert (item.input_obj, item.expected_output_obj) == ("c", "e")


@pytest.mark.slow
def test_several_datasets_at_once_are_told_apart_by_their_names():
    from datasets import DatasetDict

    with pytest.raises(DatasetError, match="a DatasetDict has several datasets: 'train', 'test'. Choose one"):
        load_dataset(DatasetDict(train=trl_rows(), test=trl_rows()))


async def test_a_run_takes_a_dataset_of_trl_and_its_reward_function_as_they_are(tmp_path):
    def accuracy(completions, solution, **kwargs):
        return [float(each[0]["content"] == right) for each, right in zip(completions, solution, strict=True)]

    async def answer(prompt, llm):
        return (await llm.chat(prompt)).content

    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "7"))
    rows = [{"prompt": [{"role": "user", "content": "3+4"}], "solution": solution} for solution in ("7", "8")]
    run = ft.Run(answer, ft.from_trl(accuracy), rows, adapter=adapter, generations=2, output_dir=tmp_path)
    await run.next_epoch()
    assert run.trajectories().reward.tolist() == [1.0, 1.0, 0.0, 0.0]
    run.close()
