"""Frames: tidy, with the same columns whatever there is, and with what is missing missing."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from factories import item, make_epoch, make_trajectory
from records import epoch_of

from finetune_nb import frames
from finetune_nb.config import CurriculumSettings
from finetune_nb.frames.columns import counts, floats
from finetune_nb.types import EpisodeItem, RolloutFailure, Trajectory

ON = CurriculumSettings(enabled=True, percentile=0.5, min_reward_diff=0.1, expansion_interval=100)


def test_a_row_is_a_trajectory_or_a_failed_rollout_in_the_order_of_the_epochs() -> None:
    first = make_epoch([[1, 0], [1, 1]], 0, failures=[RolloutFailure("q1", 2, "TimeoutError: 3 s")])
    frame = frames.trajectories([first, make_epoch([[0, None]], 1)])
    assert frame.trajectory.tolist() == ["e0/q0/0", "e0/q0/1", "e0/q1/0", "e0/q1/1", "e0/q1/2", "e1/q0/0", "e1/q0/1"]
    assert frame.reward.tolist()[:4] == [1, 0, 1, 1]
    assert frame.index.tolist() == list(range(7))


def test_a_failed_rollout_has_its_error_and_nothing_else() -> None:
    row = frames.trajectories([make_epoch([[1, 0]], failures=[RolloutFailure("q7", 3, "TimeoutError: 3 s")])]).iloc[-1]
    assert (row.example, row.generation, row.error, row.selected) == ("q7", 3, "TimeoutError: 3 s", False)
    empty = ["reward", "advantage", "reason", "turns", "tokens", "policy_version", "finish_reason"]
    assert row[empty].isna().all()


def test_a_missing_reward_is_nan_with_its_error_and_keeps_its_tokens() -> None:
    row = frames.trajectories([make_epoch([[1, 0, None]])]).iloc[2]
    assert math.isnan(row.reward)
    assert math.isnan(row.advantage)
    assert row.error == "ValueError: no number in the reply"
    assert (row.turns, row.tokens, row.policy_version, row.finish_reason) == (2, 1, 0, "stop")


def test_advantages_are_those_of_the_group_and_sum_to_zero() -> None:
    frame = frames.trajectories([make_epoch([[1, 0, 0, 0], [1, 1]])])
    assert frame.advantage[:4].sum() == pytest.approx(0)
    assert frame.advantage[0] == pytest.approx(0.75 / (0.5 + 1e-4))
    assert frame.advantage[4:].tolist() == [0, 0]


def test_every_trajectory_of_a_group_has_the_groups_reason() -> None:
    frame = frames.trajectories([make_epoch([[1, 0], [0, 0], [0.2, 0]], settings=ON)])
    assert frame.reason.tolist() == ["kept"] * 2 + ["no_reward_spread"] * 2 + ["beyond_percentile"] * 2
    assert frame.selected.tolist() == [True, True, False, False, False, False]
    assert "subsampled" in frame.reason.cat.categories


def test_scores_are_columns_and_what_is_no_number_is_missing() -> None:
    frame = frames.trajectories([make_epoch([[1]], scores={"correct": 1, "said": "yes", "none": None, "yes": True})])
    assert frame[["score_correct", "score_yes"]].iloc[0].tolist() == [1.0, 1.0]
    assert frame[["score_said", "score_none"]].isna().all(axis=None)
    assert (frame.filter(like="score_").dtypes == np.float64).all()


def test_numbers_that_fit_into_no_column_are_missing() -> None:
    assert counts([1, 2**70, None, True, 2.0, np.int64(3)]).tolist() == [1, pd.NA, pd.NA, pd.NA, pd.NA, 3]
    assert counts([1, 2**70]).isna().tolist() == [False, True]
    assert np.isnan(floats([10**999, "1", None, 1.0])).tolist() == [True, True, True, False]


def test_an_evaluator_that_came_later_is_missing_before() -> None:
    frame = frames.trajectories([make_epoch([[1]], 0), make_epoch([[1]], 1, scores={"new": 0.5})])
    assert frame.score_new.isna().tolist() == [True, False]


@pytest.mark.parametrize("make", [frames.trajectories, frames.groups, frames.epochs])
def test_no_epoch_gives_the_same_columns_and_dtypes_without_rows(make) -> None:
    epoch = make_epoch([[1, 0, None]], failures=[RolloutFailure("q0", 3, "E")], reason="because")
    full, empty = make([epoch]), make([])
    assert len(empty) == 0
    always = [name for name in full if not name.startswith(("score_", "train_", "seconds_"))]
    assert empty.columns.tolist() == always
    assert list(map(str, empty.dtypes)) == list(map(str, full[always].dtypes))


def test_example_ids_of_any_type_stay_as_they_are() -> None:
    ids = [7, "7", 7.5, (1, 2), None]
    for make in (frames.trajectories, frames.groups):
        frame = make([make_epoch({example: [1.0, 0.0] for example in ids})])
        assert frame.example.dtype == object
        assert frame.example.drop_duplicates().tolist() == ids
        assert make([make_epoch({"a": [1.0], "b": [1.0]})]).example.dtype == object


def test_a_trajectory_without_generation_is_named_by_its_place() -> None:
    group = [make_trajectory(1.0, "q", None), make_trajectory(0.0, "q", None), make_trajectory(0.0, "q", 7)]
    frame = frames.trajectories([epoch_of([group])])
    assert frame.trajectory.tolist() == ["e0/q/#0", "e0/q/#1", "e0/q/7"]
    assert frame.generation.isna().tolist() == [True, True, False]


def test_tokens_count_sampled_turns_only_in_whatever_form_their_logprobs_came() -> None:
    openai = {"content": [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]}
    episode = [
        item("user", "?"),
        item("assistant", "masked", logprobs=[]),
        item("assistant", "ab", logprobs=openai, finish_reason="tool_calls"),
        item("tool", "4"),
        item("assistant", "abc", logprobs=[-1.0, -1.0, -1.0], finish_reason="length"),
        item("tool", "5"),
    ]
    frame = frames.trajectories([epoch_of([[Trajectory(episode=episode, reward=1.0, metadata=None)]])])
    assert (frame.turns[0], frame.tokens[0], frame.finish_reason[0]) == (6, 5, "length")
    assert frame.policy_version.isna()[0]


def test_hostile_texts_and_numbers_of_others_make_no_frame_fail() -> None:
    group = [make_trajectory(None, "\ud800", 10**30, reward_error="\x00\udfff", policy_version="new", scores=[1])]
    group += [make_trajectory(1.0, "\ud800", True, scores={"\ud800": 1.0, 7: 2}, policy_version=np.int64(3))]
    group[1].episode[-1].metadata["finish_reason"] = ["odd"]  # type: ignore[index, union-attr]
    frame = frames.trajectories([epoch_of([group])])
    assert frame.error[0] == "␀[U+DFFF]"
    assert frame.generation.isna().all()
    assert frame.policy_version.tolist() == [pd.NA, 3]
    assert frame.finish_reason.tolist() == ["stop", "['odd']"]
    assert frame[["score_[U+D800]", "score_7"]].iloc[1].tolist() == [1.0, 2.0]


def test_groups_have_the_statistics_of_the_rewards_that_are_there() -> None:
    frame = frames.groups([make_epoch([[1, 0, None, 0.5], [None, None], [], [2.0], [math.inf, 1]])])
    first = frame.iloc[0]
    assert (first["mean"], first["min"], first["max"], first.spread, first.trajectories) == (0.5, 0, 1, 1, 4)
    assert first["std"] == pytest.approx(0.5)
    assert frame["mean"].isna().tolist() == [False, True, True, False, False]
    assert frame["std"].isna().tolist() == [False, True, True, True, True]
    assert frame.iloc[4]["max"] == math.inf


def test_groups_say_in_which_order_they_were_submitted() -> None:
    frame = frames.groups([make_epoch([[0.2, 0], [1, 0], [0, 0]], settings=CurriculumSettings(True, percentile=1.0))])
    assert frame.submitted_order.tolist() == [1, 0, pd.NA]
    assert frame.kept.tolist() == [True, True, False]
    assert frame.reason.tolist() == ["kept", "kept", "no_reward_spread"]


def test_no_failure_vanishes_from_the_groups() -> None:
    failures = [RolloutFailure(example, 0, "E") for example in ("q0", "q0", "alone", None, ["a", "list"])]
    frame = frames.groups([make_epoch([[1, 0], [1]], failures=failures)])
    assert frame.failures.tolist() == [2, 0, 1, 1, 1]
    assert frame.example.tolist() == ["q0", "q1", "alone", None, ["a", "list"]]
    assert frame.group.isna().tolist() == [False, False, True, True, True]
    assert frame["mean"].isna().tolist() == [False, False, True, True, True]
    assert frame.trajectories.sum() == 3


def test_an_epoch_row_has_metrics_curriculum_validation_job_and_times() -> None:
    trained = make_epoch([[1, 0], [0, 0]], 4, settings=ON, validation=0.5, train={"loss": 0.125}, scores={"a": 0.5})
    idle = make_epoch([[0, 0]], 5, job=None, reason="no group has a spread", validation_error="TimeoutError: 9 s")
    first, second = frames.epochs([trained, idle]).to_dict("records")
    assert (first["epoch"], first["mean_reward"], first["kept_mean_reward"], first["groups_with_spread"]) == (
        4,
        0.25,
        0.5,
        1,
    )
    assert (first["curriculum"], first["percentile"], first["schedule"]) == (True, 0.5, "automatic")
    assert not second["curriculum"] and math.isnan(second["percentile"])
    assert (first["validation_reward"], first["validation_examples"], first["job"]) == (0.5, 8, "completed")
    assert (first["train_loss"], first["score_a"], first["seconds_total"]) == (0.125, 0.5, 1.2)
    assert (first["policy_version"], first["policy_version_after"]) == (4, 5)
    assert first["started_at"] == pd.Timestamp("2027-01-15T08:04:00Z")
    assert pd.isna(first["reason"])
    assert (second["reason"], second["validation_error"]) == ("no group has a spread", "TimeoutError: 9 s")
    assert pd.isna([second["job"], second["validation_reward"], second["train_loss"]]).all()


@pytest.mark.slow
@pytest.mark.proof
def test_100000_trajectories_take_less_than_250_bytes_a_row() -> None:
    turn = EpisodeItem.model_construct(role="assistant", content="4", logprobs=[-1.0] * 8, metadata=None)
    groups = [
        [
            Trajectory.model_construct(
                episode=[turn], reward=float(k % 2), metadata={"id": g, "generation": k, "scores": {"a": 1.0}}
            )
            for k in range(8)
        ]
        for g in range(12_500)
    ]
    frame = frames.trajectories([epoch_of(groups)])
    assert frame.shape == (100_000, 17)
    assert frame.tokens.sum() == 800_000
    assert frame.memory_usage(deep=True).sum() < 25e6


@pytest.mark.slow
@pytest.mark.proof
def test_views_load_pandas_and_matplotlib_only_when_they_are_used() -> None:
    code = (
        "import sys, finetune_nb.frames.epochs, finetune_nb.views.summary, finetune_nb.plots.curves;"
        "print([m for m in ('pandas', 'matplotlib', 'torch', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_trajectories_read_from_their_files_equal_those_in_memory_and_make_none(tmp_path, monkeypatch):
    from finetune_nb.store import reader as run_reader
    from finetune_nb.store.store import RunStore

    rewards = {"a": [1.0, None, math.inf], 7: [0.0, 0.5], "7": [0.25, 0.25], None: [0.1, 0.9], "é\0\ud800": [0.5]}
    failures = [RolloutFailure(7, 3, "TimeoutError: too slow"), RolloutFailure("7", 1, "E")]
    epochs = [make_epoch(rewards, index=i, failures=failures, scores={"len": 2.0, "note": "x"}) for i in range(2)]
    with RunStore.create(tmp_path / "run", "run", {}) as store:
        for epoch in epochs:
            store.append(epoch, {})
    monkeypatch.setattr(run_reader, "read_trajectories", lambda *_: 1 / 0)
    read = RunStore.open(tmp_path / "run").epochs
    pd.testing.assert_frame_equal(frames.trajectories(read), frames.trajectories(epochs))
    assert (
        frames.trajectories(read).example.map(repr).tolist() == frames.trajectories(epochs).example.map(repr).tolist()
    )
    monkeypatch.undo()
    half = [make_epoch({"a": [1.0, 0.0]}, failures=[RolloutFailure("a", 1, "half a character: \ud800")])]
    with RunStore.create(tmp_path / "half", "half", {}) as store:
        store.append(half[0], {})
    pd.testing.assert_frame_equal(
        frames.trajectories(RunStore.open(tmp_path / "half").epochs), frames.trajectories(half)
    )
