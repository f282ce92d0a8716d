"""One rollout, whole: its turns, texts, tokens and alternatives, from any record."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from factories import item, make_epoch, make_trajectory, sampled
from hostile import HOSTILE
from records import epoch_of, failed, stored, with_tool

from finetune_nb.analysis.rollout_body import RolloutRows, rollout_body, rollout_json
from finetune_nb.types import DPOItem, RolloutFailure


def texts(blob, offsets):
    ends = np.frombuffer(offsets, "<u4")
    return [blob[start:stop].decode() for start, stop in pairwise(ends)]


def test_turns_tokens_and_tool_calls_are_all_there():
    body = rollout_body(with_tool())
    turns = body.about["turns"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "assistant", "tool", "assistant"]
    assert [(turn["start"], turn["stop"]) for turn in turns] == [(0, 0), (0, 0), (0, 2), (2, 2), (2, 3)]
    assert turns[1]["sampled"] is False and turns[2]["sampled"] is True and turns[0]["sampled"] is None
    assert turns[2]["calls"] == [{"name": "add", "arguments": '{"a": 2, "b": 2}'}]
    assert turns[3]["name"] == "add" and turns[2]["seconds"] == 0.5
    assert [turn["shown"] for turn in turns] == ["text", "text", "tokens", "text", "tokens"]
    assert texts(*body.columns[:2]) == ["2+2", "hm", "", "4", "4"]
    assert texts(*body.columns[2:4]) == ["<ca", "ll>", "4"]
    assert np.frombuffer(body.columns[4], "<f4").tolist() == [-1, -3, -0.25]
    assert body.columns[5:] == [b""] * 5


def test_alternatives_and_the_entropy_that_follows_from_them_come_with_their_token():
    trajectory = make_trajectory()
    trajectory.episode = [
        sampled((" a", -0.5), ("b", -2.0), top_logprobs=[{" a": -0.5, " c": -1.5}, {"b": -2.0, "d": -0.2}])
    ]
    columns = rollout_body(trajectory).columns
    assert np.frombuffer(columns[6], "<u4").tolist() == [0, 1, 2]
    assert texts(*columns[7:9]) == [" c", "d"]
    assert np.frombuffer(columns[9], "<f4").tolist() == pytest.approx([-1.5, -0.2])
    assert (np.frombuffer(columns[5], "<f4") > 0).all()


def test_what_was_said_besides_what_was_sampled_is_shown_too():
    trajectory = make_trajectory()
    trajectory.episode = [item("assistant", "polished", logprobs=[-1.0], tokens=["raw"])]
    assert rollout_body(trajectory).about["turns"][0]["shown"] == "both"


def test_scores_come_with_the_words_of_who_gave_them_and_a_missing_reward_with_its_reason():
    trajectory = make_trajectory(
        None, scores={"judge": 0.5, "odd": float("inf"), "none": None}, reasonings={"judge": "half"}
    )
    about = rollout_body(trajectory).about
    assert about["scores"] == {"judge": 0.5, "odd": "inf", "none": None} and about["words"] == {"judge": "half"}
    assert about["error"] == "ValueError: no number in the reply"
    json.dumps(about, allow_nan=False)


def test_a_failed_rollout_shows_its_last_model_call():
    body = rollout_body(failed())
    assert body.about["error"] == "TimeoutError: too slow"
    assert [turn["role"] for turn in body.about["turns"]] == ["user", "assistant"]
    assert body.about["turns"][1]["finish"] == "length" and texts(*body.columns[2:4]) == ["5", "."]
    assert rollout_body(RolloutFailure("a", 0, "Error")).about["turns"] == []


def test_records_of_other_makers_are_read_as_far_as_they_go():
    odd = make_trajectory()
    entry = {"content": [{"token": "x", "logprob": -1.0, "top_logprobs": [{"token": "y", "logprob": -0.5}]}]}
    odd.episode = [
        item("assistant", "x", logprobs=entry, tool_calls={"name": "alone"}),
        item("tool", "r", tool_call_id={"not": "hashable"}),
        item("assistant", "z", logprobs="?", tokens=7, conversation="first", seconds="fast"),
    ]
    body = rollout_body(odd)
    assert body.about["turns"][0]["calls"] == [{"name": None, "arguments": '{"name": "alone"}'}]
    assert texts(*body.columns[2:4])[0] == "x" and texts(*body.columns[7:9]) == ["y"]
    odd.episode = [DPOItem(prompt="p", chosen_response="good", rejected_response="bad")]
    assert "good" in texts(*rollout_body(odd).columns[:2])[0]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_can_be_packed(text):
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": text}}
    trajectory = make_trajectory(1.0, text, scores={text: 1.0}, reasonings={text: text}, reasoning=text)
    trajectory.episode = [
        item("user", text),
        item("assistant", text, logprobs=[-1.0], tokens=[text], tool_calls=[call]),
    ]
    body = rollout_body(trajectory)
    assert texts(*body.columns[2:4]) == [text.encode("utf-8", "backslashreplace").decode()]
    json.loads(rollout_json(trajectory))


def test_the_rows_of_a_file_are_read_one_by_one_and_its_last_parts_are_kept(tmp_path):
    failures = [failed("a", 2)]
    epoch = make_epoch({"a": [1, 0], "b": [0, 1]}, failures=failures)
    (record,) = stored(tmp_path, epoch)
    reads = []
    read = record.row_group
    vars(record)["_row_group"] = lambda row, names: reads.append(row) or read(row, names)
    for source in (record, epoch):
        rows = RolloutRows()
        found = [rows.rollout(source, row) for row in range(5)]
        assert [each.metadata["id"] for each in found[:4]] == ["a", "a", "b", "b"]
        assert [each.reward for each in found[:4]] == [1, 0, 0, 1] and found[4].error == failures[0].error
    assert reads == [0]


def test_token_ids_are_read_only_for_the_whole_record(tmp_path):
    (record,) = stored(tmp_path, epoch_of([[with_tool()]]))
    turns = [RolloutRows().rollout(record, 0, whole).episode[2].metadata for whole in (False, True)]
    assert "token_ids" not in turns[0] and turns[0]["tokens"] == turns[1]["tokens"]
    assert turns[1]["token_ids"] == [7, 8] and turns[1]["prompt_token_ids"] == [1, 2, 3]


def test_the_record_as_json_is_whole():
    assert json.loads(rollout_json(with_tool()))["episode"][2]["metadata"]["tokens"] == ["<ca", "ll>"]
    assert json.loads(rollout_json(failed()))["steps"][0]["payload"]["event_type"] == "LLM_END"


def test_the_entropy_that_was_recorded_comes_with_its_token(tmp_path):
    trajectory = with_tool()
    trajectory.episode[2].metadata["entropies"] = [0.5, 0.25]
    (record,) = stored(tmp_path, epoch_of([[trajectory]]))
    found = np.frombuffer(rollout_body(RolloutRows().rollout(record, 0)).columns[5], "<f4")
    assert found[:2].tolist() == [0.5, 0.25] and np.isnan(found[2])
