"""Frames of messages and tokens, filters of all frames, and what is read from the disk for them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from factories import item, make_epoch, make_trajectory
from records import Views, epoch_of, failed, stored, with_tool

from finetune_nb import frames
from finetune_nb.errors import ConfigError
from finetune_nb.types import (
    DPOItem,
    OpenAIMessage,
    RolloutFailure,
    Trajectory,
)


def test_a_row_is_a_message_in_the_order_of_its_episode():
    frame = frames.messages([epoch_of([[with_tool(), with_tool(generation=1)]])])
    assert frame.trajectory.tolist() == ["e0/q0/0"] * 5 + ["e0/q0/1"] * 5
    assert frame.message.tolist() == [0, 1, 2, 3, 4] * 2
    assert frame.role[:5].tolist() == ["user", "assistant", "assistant", "tool", "assistant"]
    assert frame.content[:5].tolist() == ["2+2", "hm", "", "4", "4"]
    assert frame.role.dtype == "category" and frame.finish_reason.dtype == "category"


def test_a_message_says_what_it_calls_what_it_answers_and_what_it_cost():
    frame = frames.messages([epoch_of([[with_tool()]])])
    assert frame.tool_calls.notna().tolist() == [False, False, True, False, False]
    assert '"name":"add"' in frame.tool_calls[2]
    assert (frame.tool_call_id[3], frame.name[3]) == ("c1", "add")
    assert frame.finish_reason[[2, 4]].tolist() == ["tool_calls", "stop"]
    assert (frame.prompt_tokens[2], frame.seconds[2], frame.mean_logprob[2]) == (3, 0.5, -2.0)


def test_a_turn_that_was_not_sampled_has_no_tokens_and_other_roles_have_none_to_speak_of():
    frame = frames.messages([epoch_of([[with_tool()]])])
    assert frame.tokens.tolist() == [pd.NA, 0, 2, pd.NA, 1]
    assert frame.mean_logprob.isna().tolist() == [True, True, False, True, False]


def test_messages_of_a_failed_rollout_stand_there_as_far_as_its_model_call_tells_them():
    frame = frames.messages([make_epoch([[1.0]], failures=[failed(), RolloutFailure("q0", 10, "E")])])
    assert frame.failed.tolist() == [False, False, True, True]
    last = frame.iloc[-1]
    assert (last.trajectory, last.role, last.content, last.finish_reason) == ("e0/q0/9", "assistant", "5", "length")
    assert (last.tokens, last.prompt_tokens, last.mean_logprob, last.seconds) == (2, 2, -1.5, 0.25)


def test_a_preference_is_one_row_with_the_pair():
    pair = DPOItem(prompt=[OpenAIMessage(role="user", content="?")], chosen_response="yes", rejected_response="no")
    frame = frames.messages([epoch_of([[Trajectory(episode=[pair], reward=1.0, metadata={"id": "q"})]])])
    assert frame.role.tolist() == ["preference"]
    assert '"chosen_response":"yes"' in frame.content[0]
    assert len(frames.tokens([epoch_of([[Trajectory(episode=[pair], reward=1.0)]])])) == 0


def test_a_row_is_a_sampled_token():
    frame = frames.tokens([epoch_of([[with_tool(), with_tool(generation=1)]], index=3)])
    assert frame.trajectory.tolist() == ["e3/q0/0"] * 3 + ["e3/q0/1"] * 3
    assert frame.message.tolist() == [2, 2, 4] * 2
    assert frame.position.tolist() == [0, 1, 0] * 2
    assert frame.token_id.tolist() == [7, 8, 9] * 2
    assert frame.token.tolist() == ["<ca", "ll>", "4"] * 2
    assert frame.logprob.tolist() == [-1.0, -3.0, -0.25] * 2


def test_tokens_come_in_whatever_form_their_logprobs_did():
    openai = {"content": [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]}
    episode = [item("assistant", "ab", logprobs=openai), item("assistant", "xy", logprobs=[-1.0, -1.0], token_ids=[5])]
    frame = frames.tokens([epoch_of([[Trajectory(episode=episode, reward=1.0)]])])
    assert frame.token.tolist()[:2] == ["a", "b"] and frame.token[2:].isna().all()
    assert frame.logprob.tolist() == [-1.0, -2.0, -1.0, -1.0]
    assert frame.token_id.isna().all()  # one id for two tokens belongs to neither


def test_tokens_are_joined_with_what_their_trajectory_was_worth():
    epochs = [make_epoch([[1, 0]], 0), make_epoch([[0, 1]], 1)]
    worth = frames.trajectories(epochs, columns=["trajectory", "advantage"])
    both = frames.tokens(epochs).merge(worth, on="trajectory")
    assert len(both) == 4
    assert np.sign(both.advantage).tolist() == [1, -1, -1, 1]


@pytest.mark.parametrize("make", [frames.messages, frames.tokens])
def test_no_epoch_gives_the_same_columns_and_dtypes_without_rows(make):
    full, empty = make([epoch_of([[with_tool()]])]), make([])
    assert len(empty) == 0
    assert empty.columns.tolist() == full.columns.tolist()
    assert [str(t) for t in empty.dtypes] == [str(t) for t in full.dtypes]


ODD = [
    make_epoch({"a": [1.0, None], 7: [0.0], "7": [0.25], None: [0.1]}, failures=[failed("a"), failed("alone", 1)]),
    epoch_of([[with_tool(), with_tool("q0", None)], [], [with_tool(["t", 1])]], 1),
    epoch_of([[make_trajectory(1.0, "q", reply="half a character: \ud800")]], 2),
    epoch_of([[Trajectory(episode=[item("assistant", "ab", logprobs={"content": [{"token": "ab", "logprob": -1.0}]})],
                          reward=1.0)]], 3),
    epoch_of([[Trajectory(episode=[item("assistant", "ab", logprobs=[-0.1], token_ids=[2**40], tokens=["\ud800"])],
                          reward=1.0, metadata={"id": "big"})]], 4),
    epoch_of([[with_tool(), make_trajectory(0.0, "q0", 1)]], 5),
    make_epoch([], 6),
]  # fmt: skip


@pytest.mark.parametrize("make", [frames.trajectories, frames.messages, frames.tokens, frames.groups])
def test_frames_from_the_disk_equal_those_from_memory(make, tmp_path):
    for epoch, read in zip(ODD, stored(tmp_path, *ODD), strict=True):
        pd.testing.assert_frame_equal(make([read]), make([epoch]))
        if epoch.index == 0:
            pd.testing.assert_frame_equal(make([read], "a"), make([epoch], "a"))


def test_no_trajectory_is_made_for_a_frame_of_a_stored_epoch_and_no_column_read_that_was_not_asked_for(
    tmp_path, monkeypatch
):
    from finetune_nb.store import reader as run_reader

    read = []
    columns = run_reader.read_columns
    monkeypatch.setattr(run_reader, "read_trajectories", lambda *_: 1 / 0)
    monkeypatch.setattr(run_reader, "read_columns", lambda *args: read.append(set(args[-1])) or columns(*args))
    epochs = stored(
        tmp_path, epoch_of([[with_tool(), with_tool(generation=1)]]), make_epoch([[1]], 1, failures=[failed()])
    )
    for make in (frames.trajectories, frames.messages, frames.tokens, frames.groups, frames.epochs):
        assert len(make(epochs))
    read.clear()
    frames.trajectories(epochs[:1], columns=["example", "reward", "advantage", "selected", "reason"])
    frames.groups(epochs[:1])
    frames.epochs(epochs)
    assert read == []
    frames.trajectories(epochs[:1], columns=["tokens"])
    assert read == [{"tokens"}]
    read.clear()
    frames.tokens(epochs[:1], columns=["trajectory", "logprob"])
    assert set().union(*read) == {"generation", "roles", "logprobs", "others"}


# ── filters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_come_in_the_order_in_which_they_are_asked_for():
    epochs = [make_epoch([[1, 0]], scores={"a": 0.5}, failures=[failed()])]
    frame = frames.trajectories(epochs, columns=["reward", "score_a", "epoch"])
    assert frame.columns.tolist() == ["reward", "score_a", "epoch"]
    assert frames.groups(epochs, columns="spread").columns.tolist() == ["spread"]
    assert frames.epochs(epochs, columns=["train_loss"]).train_loss.tolist() == [0.25]
    assert frames.messages(epochs, columns=["tokens"]).tokens.tolist() == [pd.NA, 1, pd.NA, 1, pd.NA, 2]
    assert frames.journal([], columns=["new"]).columns.tolist() == ["new"]


def test_a_column_that_there_is_not_is_named_with_the_nearest_one():
    epochs = [make_epoch([[1, 0]], scores={"correct": 1.0})]
    for make, wrong in [(frames.trajectories, "rewrad"), (frames.tokens, "logprobs"), (frames.epochs, "mean")]:
        with pytest.raises(ConfigError, match=f"there is no column '{wrong}'"):
            make(epochs, columns=[wrong])
    with pytest.raises(ConfigError, match="no epoch has 'score_corect'. Did you mean 'score_correct'"):
        frames.trajectories(epochs, columns=["score_correct", "score_corect"])
    assert frames.trajectories([], columns=["score_any"]).score_any.dtype == np.float64


def test_an_example_is_found_by_the_text_of_its_id():
    epochs = [make_epoch({7: [1.0, 0.0], "a": [0.25], True: [0.2]})]
    assert frames.trajectories(epochs, 7).reward.tolist() == [1, 0]
    assert len(frames.trajectories(epochs, 1)) == 0
    assert len(frames.trajectories(epochs, 7.0)) == 0
    assert frames.trajectories(epochs, "7").reward.tolist() == [1, 0]
    assert frames.groups(epochs, ["7", "a"])["mean"].tolist() == [0.5, 0.25]
    assert len(frames.messages(epochs, "a")) == 2
    assert frames.trajectories([make_epoch([[1]], failures=[failed("alone")])], "alone").error.tolist() == [
        "TimeoutError: too slow"
    ]


def test_a_run_is_asked_for_epochs_as_it_is_indexed():
    run = Views(*(make_epoch([[1, 0]], index) for index in range(3, 8)))
    assert run.trajectories(epoch=-1).epoch.unique().tolist() == [7]
    assert run.groups(epoch=slice(4, 6)).epoch.tolist() == [4, 5]
    assert run.messages(epoch=[3, 7]).epoch.unique().tolist() == [3, 7]
    assert run.tokens(epoch=range(3, 5), example="q0").epoch.unique().tolist() == [3, 4]
    assert run.epochs(epoch=np.int64(5), columns=["epoch"]).epoch.tolist() == [5]
    with pytest.raises(IndexError, match="has epochs 3 to 7"):
        run.trajectories(epoch=1)


def test_an_example_that_no_epoch_has_is_an_error_and_one_that_was_not_drawn_gives_no_rows():
    run = Views(make_epoch({"q17": [1, 0]}, 0), make_epoch({"b": [1, 0]}, 1))
    assert len(run.trajectories(epoch=1, example="q17")) == 0
    with pytest.raises(ConfigError, match=r"run 'run' has no example 'q71'; it has 'q17', 'b', ... Did you mean 'q17'"):
        run.trajectories(example="q71")
    assert len(Views().groups(example="q71")) == 0


def test_hostile_messages_make_no_frame_fail():
    episode = [item("assistant", "\x00\ud800", logprobs="no list", tokens=3, token_ids="7", tool_calls={1, 2})]
    episode += [
        item("assistant", "b", logprobs=[math.nan, "x"], tokens=[None, 1], finish_reason=["odd"], seconds="now")
    ]
    epochs = [epoch_of([[Trajectory.model_construct(episode=episode, reward=1.0, metadata={"id": "q"})]])]
    frame = frames.messages(epochs)
    assert frame.content[0] == "␀[U+D800]"
    assert frame.seconds.isna().all()
    assert frames.tokens(epochs).logprob.isna().all()
