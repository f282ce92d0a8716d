"""The viewer: everything there is to know stands in it as text, and hostile text stays text."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from factories import item, make_epoch, make_trajectory
from hostile import HOSTILE, text_of, unsafe_tags
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_nb.analysis.reasons import REASONS
from finetune_nb.config import CurriculumSettings
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.notebook.panel_html import record_html
from finetune_nb.text import plain
from finetune_nb.types import (
    DPOItem,
    EpisodeItem,
    EpisodeKey,
    GroupReason,
    LLMCall,
    RolloutFailure,
    SamplingParams,
    Trajectory,
)
from finetune_nb.views.rollout import failure_html, trajectory_html
from finetune_nb.views.summary import epoch_html, epoch_text, run_html, run_text

ON = CurriculumSettings(enabled=True, percentile=0.5, min_reward_diff=0.1, expansion_interval=100)
ATTRIBUTES = {"class", "style", "scope", "dir", "role", "aria-label", "aria-hidden"} | {
    "src", "alt", "width", "height", "tabindex"}  # fmt: skip


def conversation_of(text: str) -> Trajectory:
    """A trajectory with this text in every place that others fill."""
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": text}}
    episode = [
        item("system", text),
        item("user", text),
        item("assistant", text, logprobs=[-1.0], tool_calls=[call, text, {"function": text}], finish_reason=text),
        item("tool", text, tool_call_id=text),
        item("other", text, name=text),
    ]
    metadata = {"id": text, "generation": text, "reward_error": text, "reasoning": text, "scores": {text: text}}
    return Trajectory(episode=episode, reward=math.nan, metadata=metadata)


def views_of(text: str) -> dict[str, Callable[[], str]]:
    failures = [RolloutFailure(text, 0, text)]
    epoch = make_epoch({text: [1, 0], "b": [0, 0]}, failures=failures, scores={text: 1.0}, settings=ON, message=text,
                       job="failed", validation_error=text, train={text: 1.0})  # fmt: skip
    idle = make_epoch([[0, 0]], 1, job=None, reason=text)
    return {
        "trajectory": lambda: trajectory_html(conversation_of(text)),
        "failure": lambda: failure_html(failures[0]),
        "epoch": lambda: epoch_html(epoch),
        "idle": lambda: epoch_html(idle),
        "run": lambda: run_html(name=text, state="ready", epochs=[epoch, idle], error=text, folder=text, model=text),
    }


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", ["trajectory", "failure", "epoch", "idle", "run"])
def test_hostile_text_is_shown_as_text(text: str, kind: str) -> None:
    markup = views_of(text)[kind]()
    markup.encode()
    assert " ".join(plain(text).split()) in text_of(markup)
    assert not unsafe_tags(markup)
    names = {name for element in ElementTree.fromstring(markup).iter() for name in element.attrib}
    assert not names - ATTRIBUTES


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("text", ["a" * 1_000_000, "\u202e" * 1_000_000, "'" * 1_000_000, "\U000e0041" * 300_000])
def test_every_view_of_a_megabyte_stays_below_200_kb_and_says_what_is_left_out(text: str) -> None:
    for kind, make in views_of(text).items():
        assert len(make().encode()) <= 200_000, kind
    assert "characters left out" in text_of(trajectory_html(conversation_of(text)))


@example(turns=3000, size=3000, letter="<")
@settings(deadline=None, max_examples=8)
@given(turns=st.integers(1, 3000), size=st.integers(0, 3000), letter=st.sampled_from("a<'\u202e\U000e0041"))
def test_a_conversation_of_any_length_stays_below_200_kb_and_keeps_its_end(turns: int, size: int, letter: str) -> None:
    episode: list[EpisodeItem] = [item("user", letter * size) for _ in range(turns)]
    markup = trajectory_html(Trajectory(episode=[*episode, item("user", "THE END")], reward=1.0))
    assert len(markup.encode()) <= 200_000
    assert "THE END" in markup
    shown = markup.count('class="ft-turn user"')
    assert shown == turns + 1 or f"{turns + 1 - shown:,} of {turns + 1:,} turns are left out" in text_of(markup)


def test_a_conversation_has_roles_tool_calls_results_and_how_it_ended() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "12+7"}'}}
    episode = [
        item("system", "You may use a calculator."),
        item("user", "12+7-3"),
        item("assistant", "", logprobs=[-0.1] * 12, tool_calls=[call], finish_reason="tool_calls"),
        item("tool", "19-3", tool_call_id="c1"),
        item("assistant", "by hand", logprobs=[]),
        item("assistant", "16", logprobs=[-0.1] * 2, finish_reason="length"),
    ]
    metadata = {"id": "q17", "generation": 2, "policy_version": 0, "scores": {"correct": 1.0, "short": None}}
    shown = text_of(trajectory_html(Trajectory(episode=episode, reward=0.5, metadata=metadata)))
    for part in (
        "example q17 · generation 2",
        "reward 0.5",
        "correct 1 · short –",
        "policy version 0",
        "system prompt, 25 characters You may use a calculator.",
        'assistant · 12 tokens, mean logprob -0.1 · finish: tool_calls → calls calculator {"expression": "12+7"}',
        "tool · calculator 19-3",
        "not sampled by the policy by hand",
        "2 tokens, mean logprob -0.1 · cut at the token limit 16",
    ):
        assert part in shown


def test_only_the_system_prompt_is_folded() -> None:
    root = ElementTree.fromstring(trajectory_html(conversation_of("hello")))
    assert len(root.findall(".//details")) == 1
    assert root.find(".//details").get("open") is None  # type: ignore[union-attr]


def test_a_missing_reward_shows_its_reason_and_no_number() -> None:
    shown = text_of(trajectory_html(make_trajectory(None)))
    assert "no reward: ValueError: no number in the reply" in shown
    assert "reward 0" not in shown
    assert "reward nan" not in shown


def test_a_preference_shows_both_responses() -> None:
    preference = DPOItem(prompt="2+2?", chosen_response="4", rejected_response="5")
    shown = text_of(trajectory_html(Trajectory(episode=[preference], reward=1.0)))
    assert "2+2? ✓ chosen: 4 ✗ rejected: 5" in shown


def test_records_show_themselves() -> None:
    trajectory, epoch = make_trajectory(), make_epoch([[1, 0]])
    assert trajectory._repr_html_() == trajectory_html(trajectory)
    assert epoch._repr_html_() == epoch_html(epoch)


def test_a_failed_rollout_shows_its_error_and_the_conversation_until_then() -> None:
    call = LLMCall(None, 0, "llm", [{"role": "user", "content": "2+2"}], None, {"role": "assistant", "content": "um"},
                   None, None, None, None, "stop", 0, SamplingParams(), 0.1, True)  # fmt: skip
    steps = CallRecorder(EpisodeKey("train", 0, 1, 3), calls=[call]).steps()
    shown = text_of(failure_html(RolloutFailure("q1", 3, "TimeoutError: 30 s", steps)))
    for part in ("example q1 · generation 3 · failed", "TimeoutError: 30 s", "1 model call until", "user 2+2", "um"):
        assert part in shown
    assert "no model call was recorded" in text_of(failure_html(RolloutFailure("q1", 3, "E")))


def test_an_epoch_says_what_was_kept_and_every_reason_in_words() -> None:
    rewards = [[1, 0], [0.5, 0], [1, 1], [None, None], [math.inf, 0]]
    epoch = make_epoch(rewards, 3, settings=ON, validation=0.5, train={"loss": 0.125}, scores={"short": 0.25})
    shown = text_of(epoch_html(epoch))
    for part in (
        "epoch 3",
        "1 of 5 kept",
        "1 left out: beyond the curriculum's percentile (q1)",
        "1 left out: their rewards hardly differ (q2)",
        "1 left out: no trajectory has a reward (q3)",
        "1 left out: a reward is infinite (q4)",
        "2 of 5 (their rewards differ)",
        "percentile 0.5, automatic",
        "short 0.25",
        "completed (fake) loss 0.125",
        "0.5 on 8 examples in 0.30 s",
        "3 sampled, 4 after training",
        "rollouts 0.70 s, training 0.50 s, total 1.2 s",
    ):
        assert part in shown
    assert set(REASONS) == set(GroupReason)


def test_an_epoch_counts_failures_by_their_error() -> None:
    failures = [RolloutFailure(f"q{i}", 0, "TimeoutError: 30 s") for i in range(7)] + [
        RolloutFailure("x", 0, "KeyError")
    ]
    shown = text_of(epoch_html(make_epoch([[1, 0]], failures=failures)))
    assert "8 failed 7 × TimeoutError: 30 s (q0, q1, q2, q3, q4, …) 1 × KeyError (x)" in shown


def test_an_epoch_without_a_job_says_why() -> None:
    epoch = make_epoch([[0, 0]], job=None, reason="no group has a spread of 0.1", validation_error="OSError: gone")
    assert "nothing was trained: no group has a spread of 0.1" in text_of(epoch_html(epoch))
    assert "failed: OSError: gone" in text_of(epoch_html(epoch))
    assert "not trained: no group has a spread of 0.1" in epoch_text(epoch)


def test_an_epoch_says_how_many_turns_have_drifted() -> None:
    epoch = make_epoch([[1, 0]])
    drifts = replace(epoch, metrics=replace(epoch.metrics, continued_turns=1_200, drifted_turns=3))
    sentence = "3 of 1,200 turns that carry a conversation on were rendered anew"
    assert sentence in text_of(epoch_html(drifts)) and "  3 turns drifted  " in epoch_text(drifts)
    assert f"drift in epoch {epoch.index}: {sentence}" in text_of(record_html([drifts], []))
    for shown in (epoch_html(epoch), epoch_text(epoch), record_html([epoch], [])):
        assert "drift" not in shown and "anew" not in shown


def test_an_epoch_is_one_line_of_text() -> None:
    epoch = make_epoch([[1, 0], [1, 1]], 3)
    assert epoch_text(epoch) == "epoch 3  reward 0.75  1/2 groups teach  0 failures  trained in 0.50 s  1.2 s"
    bad = make_epoch(
        [[None]], 4, job="failed", message="out of\nmemory \x1b[31m", failures=[RolloutFailure("q", 0, "E")]
    )
    assert epoch_text(bad) == (
        "epoch 4  reward –  0/1 groups teach  1 failure  rewards missing 1 of 1: ValueError: no number in the reply  "
        "training failed: out of memory ␛[31m  1.2 s"
    )


def test_a_run_shows_its_last_ten_epochs_and_the_course_of_all() -> None:
    epochs = [make_epoch([[i / 20, 0]], i) for i in range(20)]
    markup = run_html(name="demo", state="running", epochs=epochs, folder="runs/demo", model="embedded")
    shown = text_of(markup)
    assert "run demo · running · 20 epochs" in shown
    assert "the last 10 of 20 epochs" in shown
    rows = ElementTree.fromstring(markup).findall(".//tbody/tr")
    assert [row[0].text for row in rows if len(row) > 2] == [str(i) for i in range(10, 20)]
    course = "mean reward from 0 to 0.475, at best 0.475"
    assert ElementTree.fromstring(markup).find(".//img").get("alt") == course  # type: ignore[union-attr]


def test_a_run_shows_its_error_also_before_the_first_epoch() -> None:
    markup = run_html(name="demo", state="failed", epochs=[], error="BackendError: no GPU", folder="f", model=None)
    assert "error: BackendError: no GPU no epoch yet" in text_of(markup)
    assert run_text(name="demo", state="failed", epochs=[], error="BackendError: no\nGPU") == (
        "run demo  failed  0 epochs\n  error: BackendError: no GPU"
    )


def test_a_run_as_text_has_its_last_three_epochs() -> None:
    lines = run_text(name="demo", state="ready", epochs=[make_epoch([[1, 0]], i) for i in range(5)]).splitlines()
    assert lines[0] == "run demo  ready  5 epochs"
    assert [line.split()[1] for line in lines[1:]] == ["2", "3", "4"]


def test_circular_and_odd_values_of_others_are_shown() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    episode = [item("assistant", "x", logprobs=[-1.0], tool_calls=loop), item("assistant", "y", tool_calls=[None, 3])]
    metadata = {"scores": [1], "reasoning": {"a": np.float64(1)}, "policy_version": 0, "id": None}
    shown = text_of(trajectory_html(Trajectory(episode=episode, reward=1.0, metadata=metadata)))
    assert "'self': {...}" in shown
    assert "policy version 0" in shown
