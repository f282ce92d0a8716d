"""A sampled turn: what the record of a message says, read in one place and written under the same keys."""

from __future__ import annotations

import math
import re

import pytest
from factories import collected, item, make_trajectory

from finetune_nb.analysis.learning_signal import learning_signal
from finetune_nb.analysis.rollout_group import rollout_group
from finetune_nb.errors import BackendError, MissingLogprobs
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.rollouts.episodes import SampledTurn, chat_fields, episode_from_steps
from finetune_nb.training.batch import token_sequences, training_batch
from finetune_nb.training.curriculum import group_statistics, select
from finetune_nb.training.jobs import check_exact
from finetune_nb.training.metrics import epoch_metrics
from finetune_nb.training.preview import preview_input
from finetune_nb.types import (
    CurriculumSettings,
    CurriculumState,
    DPOItem,
    EpisodeItem,
    EpisodeKey,
    Epoch,
    EvalInputItem,
    LLMCall,
    MessageKey,
    SamplingParams,
    Trajectory,
    finish_reason,
    sampled_tokens,
)
from finetune_nb.views.rollout import RolloutView

TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def call(**changes) -> LLMCall:
    """A recorded call that has everything that a call can have."""
    values = {
        "episode": None,
        "sequence": 0,
        "model": "policy",
        "messages": [{"role": "user", "content": "1+1"}],
        "tools": None,
        "reply": {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL], "reasoning_content": "one more"},
        "prompt_ids": [7, 8],
        "response_ids": [9, 10],
        "tokens": ["ad", "d"],
        "logprobs": [-0.5, -0.25],
        "finish_reason": "length",
        "policy_version": 3,
        "sampling": SamplingParams(temperature=0.7),
        "seconds": 1.5,
        "exact": True,
        "top_logprobs": [{"ad": -0.5}, {"d": -0.25}],
        "entropies": [0.5, 0.75],
    }
    return LLMCall(**{**values, **changes})


def episode(*calls: LLMCall) -> list[EpisodeItem]:
    steps = CallRecorder(EpisodeKey("train", 0, 0, 0), calls=list(calls)).steps()
    row = EvalInputItem(id="q", input_obj="", expected_output_obj="", full_dataset_entry={}, trajectory=steps)
    return episode_from_steps(row.trajectory)[0]


def test_a_sampled_turn_says_all_that_the_recorded_call_said():
    question, answer = episode(call())
    assert SampledTurn.of(question) is None
    assert SampledTurn.of(answer) == SampledTurn(
        ids=[9, 10],
        prompt_ids=[7, 8],
        tokens=["ad", "d"],
        logprobs=[-0.5, -0.25],
        alternatives=[{"ad": -0.5}, {"d": -0.25}],
        entropies=[0.5, 0.75],
        temperature=0.7,
        finish_reason="length",
        seconds=1.5,
        exact=True,
        drifted=False,
        conversation=0,
        tool_calls=[TOOL_CALL],
        reasoning="one more",
    )


def test_what_a_record_does_not_say_is_none_and_never_zero():
    turn = SampledTurn.of(item("assistant", "4"))
    assert turn is not None
    assert (turn.ids, turn.prompt_ids, turn.tokens, turn.alternatives, turn.entropies) == (None,) * 5
    assert (turn.temperature, turn.finish_reason, turn.seconds, turn.exact, turn.reasoning) == (None,) * 5
    assert (turn.logprobs, turn.drifted, turn.conversation, turn.tool_calls) == ([-0.5], False, 0, [])


def test_a_conversation_begun_anew_and_a_prompt_rendered_anew_are_said_of_the_turn():
    first = call(reply={"role": "assistant", "content": "2"})
    drifted = call(messages=[*first.messages, first.reply, {"role": "user", "content": "+1"}], prompt_ids=[70, 80])
    anew = call(messages=[{"role": "user", "content": "1+2"}])
    turns = [turn for turn in map(SampledTurn.of, episode(first, drifted, anew)) if turn is not None]
    assert [(turn.conversation, turn.drifted) for turn in turns] == [(0, False), (0, True), (1, False)]


@pytest.mark.parametrize(
    "message",
    [
        EpisodeItem(role="user", content="a", logprobs=[-1.0]),
        EpisodeItem(role="assistant", content="a", logprobs=[]),
        EpisodeItem(role="assistant", content="a", logprobs={"content": []}),
        DPOItem(prompt="a", chosen_response="b", rejected_response="c"),
    ],
)
def test_a_message_that_the_policy_did_not_sample_is_no_sampled_turn(message):
    assert SampledTurn.of(message) is None


@pytest.mark.parametrize("logprobs", ["high", 7, {"content": [{"p": 1}]}, [object()], [10**400]])
def test_logprobs_that_nobody_can_read_raise_only_where_they_are_trained_on(logprobs):
    message = EpisodeItem(role="assistant", content="a", logprobs=logprobs)
    turn = SampledTurn.of(message)
    assert turn is not None
    assert turn.logprobs is None
    with pytest.raises(MissingLogprobs, match="turn 0 of example 'q'"):
        token_sequences(Trajectory(episode=[message], reward=1.0, metadata={"id": "q"}))


def test_logprobs_of_a_chat_completion_are_read_as_floats():
    message = EpisodeItem(role="assistant", content="a", logprobs={"content": [{"token": "a", "logprob": -2}]})
    turn = SampledTurn.of(message)
    assert turn is not None
    assert turn.logprobs == [-2.0]


def test_missing_ids_are_named_by_the_key_under_which_they_were_expected():
    message = item("assistant", "4", token_ids=[52])
    with pytest.raises(BackendError, match=r"has 1 logprobs but no metadata\['prompt_token_ids'\]"):
        token_sequences(Trajectory(episode=[message], reward=1.0))
    message = item("assistant", "4", prompt_token_ids=[50])
    with pytest.raises(BackendError, match=r"has 1 logprobs but no metadata\['token_ids'\]"):
        token_sequences(Trajectory(episode=[message], reward=1.0))


def test_a_turn_that_is_not_trained_on_may_have_ids_that_are_not_exact():
    trajectory = make_trajectory()
    masked = EpisodeItem(role="assistant", content="an example", logprobs=[], metadata={MessageKey.EXACT: False})
    trajectory.episode.insert(1, masked)  # type: ignore[arg-type]
    check_exact([trajectory], allow_inexact=False)


def test_fields_of_a_chat_message_are_those_that_are_there():
    answer = {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "", "tool_calls": None, "seconds": math.nan}
    assert chat_fields(answer) == {"tool_call_id": "c1"}
    assert chat_fields(None) == {}


def test_each_key_of_a_message_is_a_key_of_its_own():
    keys = [value for name, value in vars(MessageKey).items() if name.isupper()]
    assert len(keys) == len(set(keys)) == 16


# ── a trajectory ─────────────────────────────────────────────────────────────────────────────────────────────────────


def epoch_of(*trajectories: Trajectory) -> Epoch:
    """An epoch with these rollouts."""
    collection = collected(trajectories)
    statistics = group_statistics(collection.trajectories)
    settings = CurriculumSettings()
    selection = select(statistics, settings, CurriculumState(settings.percentile), 0, seed=0)
    return Epoch(
        index=0,
        run_id="run",
        collection=collection,
        statistics=statistics,
        selection=selection,
        job=None,
        reason=None,
        metrics=epoch_metrics(collection, statistics, selection),
        validations=(),
        policy_versions=(0, 0),
        started_at=0.0,
        seconds={},
    )


def said(*messages: EpisodeItem | DPOItem, reward: float = 0.0, generation: int = 0) -> Trajectory:
    return Trajectory(episode=list(messages), reward=reward, metadata={"id": "q", "generation": generation})  # type: ignore[arg-type]


QUESTION = item("user", "2+2")
CUT = item("assistant", "it is", finish_reason="length", token_ids=[1, 2, 3, 4, 5], prompt_token_ids=[0])
DONE = item("assistant", "4", finish_reason="stop", token_ids=[6], prompt_token_ids=[0, 1])
SILENT = item("assistant", "4", token_ids=[6], prompt_token_ids=[0, 1])
MASKED = EpisodeItem(role="assistant", content="three tokens long", logprobs=[], metadata={"finish_reason": "length"})
AS_OPENAI = EpisodeItem(
    role="assistant", content="4", logprobs={"content": [{"token": "4", "logprob": -0.5}]}, metadata={}
)


@pytest.mark.parametrize(
    ("messages", "tokens", "reason"),
    [
        ([QUESTION, DONE], 1, "stop"),
        ([QUESTION, DONE, QUESTION, CUT], 6, "length"),
        ([QUESTION, CUT, QUESTION, DONE], 6, "stop"),
        ([QUESTION, CUT, QUESTION, SILENT], 6, None),  # what an earlier turn said is not how this one ended
        ([QUESTION, DONE, MASKED], 1, "stop"),  # nor is that of a turn that somebody else wrote
        ([QUESTION, CUT, QUESTION, AS_OPENAI], 6, None),
        ([QUESTION, MASKED], 0, None),
        ([DPOItem(prompt="a", chosen_response="b", rejected_response="c")], 0, None),
        ([], 0, None),
    ],
)
def test_every_reader_counts_the_same_tokens_and_sees_the_same_end(messages, tokens, reason):
    first, second = said(*messages), said(*messages, generation=1)
    assert (sampled_tokens(first), finish_reason(first)) == (tokens, reason)
    better = Trajectory(episode=[QUESTION], reward=1.0, metadata={"id": "r", "generation": 0})
    epoch = epoch_of(first, second, better)
    assert epoch.metrics.sampled_tokens == 2 * tokens
    assert preview_input(epoch).tokens.tolist() == [2 * tokens, 0]
    assert training_batch(epoch.collection).truncated == 2 * (reason == "length")
    assert learning_signal(epoch).cut == 2 * (reason == "length")
    shown = RolloutView(rollout_group(epoch, "q"), 0)._repr_html_()
    assert f"<td>{tokens}</td><td>{reason or ''}</td>" in re.sub(r"<td [^>]*>", "<td>", shown)


def test_a_trajectory_whose_last_reply_was_cut_is_masked_where_that_is_asked_for():
    cut = [said(QUESTION, CUT, reward=1.0), said(QUESTION, DONE, reward=0.0, generation=1)]
    assert len(training_batch(collected(cut), truncated="train").trajectories) == 2
    assert len(training_batch(collected(cut), truncated="mask").trajectories) == 1
