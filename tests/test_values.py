"""Small readers of any value, which several modules share: numbers, fields, JSON, a message's content, a mean."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from factories import make_epoch

import finetune_nb as ft
from finetune_nb import plots
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.chat_messages import content_text, field_of
from finetune_nb.rewards.numbers import mean
from finetune_nb.rollouts.episodes import episode_from_steps
from finetune_nb.text import as_json
from finetune_nb.types import EpisodeKey, EvalInputItem, LLMCall, RolloutFailure, SamplingParams, as_float


class Mute:
    """An object whose text cannot be made."""

    def __str__(self):
        raise RuntimeError("not now")


def circle() -> list:
    values: list = []
    values.append(values)
    return values


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, 7.0), (True, 1.0), (Fraction(1, 4), 0.25), (np.float32(0.5), 0.5), (np.int64(3), 3.0), (-math.inf, -math.inf)],
)
def test_every_kind_of_number_is_a_float(value, expected):
    assert as_float(value) == expected


@pytest.mark.parametrize("value", [None, "7", math.nan, 10**400, 1j, [1.0]])
def test_what_is_no_number_is_missing(value):
    assert math.isnan(as_float(value))


def test_a_training_metric_that_is_a_numpy_number_is_drawn():
    epoch = make_epoch([[1, 0]], train={"loss": np.float32(0.5)})  # type: ignore[dict-item]
    assert plots.plot_training([epoch]).axes[0].lines[0].get_ydata()[0] == 0.5


def test_a_field_is_a_key_of_a_mapping_and_an_attribute_of_anything_else():
    assert field_of({"name": "a"}, "name") == field_of(SimpleNamespace(name="a"), "name") == "a"
    assert field_of({}, "keys") is None
    assert field_of(None, "name") is None


def test_any_value_has_a_json():
    assert as_json({"ä": [1, None]}) == '{"ä": [1, null]}'
    assert "whose text cannot be made" in as_json([Mute()])
    assert as_json(circle()) == "[[...]]"


def test_the_content_of_a_message_is_its_text():
    assert content_text(None) == ""
    assert content_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"
    assert content_text([{"type": "image_url"}]) == '[{"type": "image_url"}]'


def test_content_that_has_no_json_does_not_cost_the_rollout():
    call = LLMCall(
        episode=None,
        sequence=0,
        model="policy",
        messages=[{"role": "user", "content": circle()}],
        tools=None,
        reply={"role": "assistant", "content": "4"},
        prompt_ids=[1],
        response_ids=[2],
        tokens=["4"],
        logprobs=[-0.5],
        finish_reason="stop",
        policy_version=0,
        sampling=SamplingParams(),
        seconds=0.1,
        exact=True,
    )
    steps = CallRecorder(EpisodeKey("train", 0, 0, 0), calls=[call]).steps()
    row = EvalInputItem(id="q", input_obj="", expected_output_obj="", full_dataset_entry={}, trajectory=steps)
    question, answer = episode_from_steps(row.trajectory)[0]
    assert (question.content, answer.content) == ("[[...]]", "4")
    failed = RolloutFailure("q", 0, "ValueError: no", steps)
    assert "[[...]]" in failed._repr_html_()


def test_nothing_has_no_mean():
    assert math.isnan(mean([]))
    assert math.isnan(mean(np.array([])))
    assert mean([1.0, 2.0]) == mean(np.array([1.0, 2.0])) == 1.5


def test_a_missing_reward_is_read_again_from_its_json():
    given = ft.Trajectory(episode=[], reward=math.nan, shaped_rewards=[math.inf])
    found = ft.Trajectory.model_validate_json(given.model_dump_json())
    assert math.isnan(found.reward)
    assert found.shaped_rewards == [math.inf]
