"""The Tinker backend where its SDK is missing, what goes into a Datum, and the way to the tests with the real SDK, whose newest
and oldest versions live in environments of their own: FINETUNE_NB_TINKER_PYTHON and FINETUNE_NB_TINKER_OLDEST_PYTHON name their
pythons."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sampled_turns import collection, trajectory, turn

import finetune_nb as ft
from finetune_nb.backends.tinker.adapter import TinkerAdapter
from finetune_nb.backends.tinker.config import TinkerConfig
from finetune_nb.backends.tinker.saved import Manifest, read_manifest, write_manifest
from finetune_nb.backends.tinker.training import advantage_scales, check, loss_inputs
from finetune_nb.errors import BackendError, ConfigError, MissingExtra
from finetune_nb.training.batch import training_batch

STATE = Manifest(state="tinker://m-1/weights/a-b", model="m", rank=32, service=None, policy_version=3, jobs=4)


def learned(*groups):
    return training_batch(collection(*groups), scale_rewards=False)


def test_inputs_of_the_loss_are_shifted_by_one_and_zero_where_nothing_was_sampled():
    turns = [turn([3, 9], [5, 6], [-1.0, -2.0]), turn([3, 9, 5, 6, 8], [7], [-3.0])]
    first, second = learned([trajectory(1.0, *turns), trajectory(0.0, turn([3], [5], [-0.5]))]).sequences()
    inputs = loss_inputs(first, scale=0.25, weights=True)
    assert inputs["target_tokens"].tolist() == first.ids[1:] == [9, 5, 6, 8, 7]
    assert inputs["logprobs"].tolist() == [0.0, -1.0, -2.0, 0.0, -3.0]
    assert inputs["advantages"].tolist() == [0.0, 0.125, 0.125, 0.0, 0.125]
    assert inputs["weights"].tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert loss_inputs(second, 0.25, weights=False).keys() == {"target_tokens", "logprobs", "advantages"}
    assert loss_inputs(second, 0.25, weights=False)["advantages"].tolist() == [-0.125]
    assert {name: array.dtype for name, array in inputs.items()} == {
        "target_tokens": np.int64,
        "logprobs": np.float32,
        "advantages": np.float32,
        "weights": np.float32,
    }


def test_either_reduction_of_a_service_gives_the_mean_over_all_sampled_tokens():
    replies = [turn([3, 9], [5, 6, 7], [-1.0, -2.0, -1.0]), turn([3, *range(20, 60)], [5], [-1.0])]
    sequences = list(learned([trajectory(float(i), reply) for i, reply in enumerate(replies)]).sequences())
    advantages = np.array([*[-0.5] * 3, 0.5])  # of all sampled tokens
    found = {}
    for reduction in ("sum", "sequence_mean"):
        scales = advantage_scales(TinkerConfig(model="m", loss_reduction=reduction), sequences)
        given = [loss_inputs(sequence, scale, True) for sequence, scale in zip(sequences, scales, strict=True)]
        sums = [(each["weights"] * each["advantages"]).sum() for each in given]
        if reduction == "sequence_mean":
            sums = [total / each["weights"].sum() / len(given) for total, each in zip(sums, given, strict=True)]
        found[reduction] = sum(sums)
    assert found["sum"] == pytest.approx(advantages.mean()) == found["sequence_mean"]


def test_what_the_service_would_train_otherwise_is_refused():
    def group(**metadata):
        return learned([trajectory(r, turn([3], [5], [-1.0], **metadata)) for r in (0.0, 1.0)])

    check(group(temperature=1.0), longest=2)
    check(group(temperature=0), longest=None)  # greedy: its logprobs are those of temperature 1
    with pytest.raises(BackendError, match=r"sampled at temperature 0\.7"):
        check(group(temperature=0.7), longest=None)
    with pytest.raises(BackendError, match="the model holds 1"):
        check(group(), longest=1)


def test_bounds_of_the_ratio_are_told_as_the_service_wants_them():
    assert TinkerConfig(model="m").loss_settings() is None
    settings = TinkerConfig(model="m", loss="ppo", clip_low=0.25, clip_high=0.5).loss_settings()
    assert settings == {"clip_low_threshold": 0.75, "clip_high_threshold": 1.5}


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    assert write_manifest(tmp_path / "c", STATE) == (tmp_path / "c" / "manifest.json").stat().st_size
    assert read_manifest(tmp_path / "c", "m", 32) == STATE
    write_manifest(tmp_path / "c", STATE.model_copy(update={"policy_version": 4}))
    assert read_manifest(tmp_path / "c", "m", 32).policy_version == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "https://elsewhere/state"}, "state: .*pattern"),
        ({"policy_version": -1}, "policy_version"),
        ({"format": "finetune_nb.local_grpo.checkpoint"}, "format"),
        ({"more": 1}, "more"),
        ({"model": "other"}, "of model 'other' with rank 32; expected 'm'"),
        ({"rank": 8}, "rank 8"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_with_a_reason(tmp_path, change, reason):
    import json

    (tmp_path / "manifest.json").write_text(json.dumps(STATE.model_dump() | change))
    with pytest.raises(BackendError, match=reason):
        read_manifest(tmp_path, "m", 32)


def test_a_config_can_name_it_where_the_sdk_is_missing_and_the_error_names_the_extra(monkeypatch):
    adapters = {"t": {"_type": "tinker", "model": "Qwen/Qwen3-8B", "api_key": "tml-top-secret"}}
    config = ft.load_config({"trainer_adapters": adapters})
    assert isinstance(config.trainer_adapters["t"], TinkerConfig)
    assert "tml-top-secret" not in repr(config)
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(MissingExtra, match=r"finetune_nb\[tinker\]"):
        _ = TinkerAdapter(config.trainer_adapters["t"]).policy


def test_mistakes_in_the_settings_are_told():
    with pytest.raises(ConfigError, match=r"Did you mean 'learning_rate'"):
        ft.load_config({"trainer_adapters": {"t": {"_type": "tinker", "model": "m", "learningrate": 1e-4}}})
    with pytest.raises(ConfigError, match="model"):
        ft.load_config({"trainer_adapters": {"t": {"_type": "tinker"}}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "named",
    [pytest.param("FINETUNE_NB_TINKER_PYTHON", marks=pytest.mark.proof), "FINETUNE_NB_TINKER_OLDEST_PYTHON"],
)
def test_with_the_real_sdk_against_a_service_that_learns(named):
    python = os.environ.get(named)
    if not python:
        pytest.skip(f"{named} names no python that has the tinker SDK")
    command = [python, "-m", "pytest", "tests/support/tinker_sdk.py", "-m", "", "-q", "-s"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
