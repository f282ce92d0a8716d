"""Run folders that release 0.1.0 wrote can be read, continued and forked, with the public names alone.

tests/data/make_run_of_format_1.py says what is in the zip. Its frames/ folder has the tables that 0.1.0 made of these
runs: each of their columns must still be there, with the same values; columns may be added.
"""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import finetune_nb as ft
from finetune_nb.examples import calculator
from finetune_nb.examples.calculator.agent import kind_of, solve

DATA = Path(__file__).parent / "data"
FRAMES = ("trajectories", "messages", "tokens", "groups", "epochs", "journal")


@pytest.fixture
def runs(tmp_path):
    """The folder `runs` of the zip."""
    with zipfile.ZipFile(DATA / "run_of_format_1.zip") as file:
        file.extractall(tmp_path)
    return tmp_path / "runs"


def rows(name, count):
    return json.loads((calculator.CONFIG.parent / "data" / name).read_text(encoding="utf-8"))[:count]


def last_digit(item):
    """A reward that differs within nearly every group, so that there is always something to train on."""
    text = str(item.output_obj)
    return float(text[-1]) if text[-1:].isdigit() else 0.0


def used_tool(item):
    return float(kind_of(item) == "used_tool")


def functions():
    """What no file can hold, given again. The workflow and the reward are others than the runs were made with."""
    return {
        "workflow": solve,
        "reward": last_digit,
        "dataset": rows("train.json", 6),
        "validation": rows("held_out.json", 4),
        "evaluators": {"used_tool": used_tool},
    }


def adapter_weights(directory):
    """The LoRA weights in a saved adapter or in a checkpoint, by layer and matrix."""
    from safetensors.numpy import load_file

    (path,) = [*Path(directory).glob("adapter_model.safetensors"), *Path(directory).glob("weights.safetensors")]
    return {name.replace(".default", ""): matrix for name, matrix in load_file(path).items() if "lora_" in name}


def same(found, expected):
    """Whether both have the same matrices under the same names."""
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("name", ["first", "first-fork", "named"])
def test_every_frame_of_an_old_run_has_the_values_that_it_had(runs, tmp_path, name, frame):
    options = {"partial": True} if frame == "trajectories" else {}
    getattr(ft.Run.open(runs / name), frame)(**options).to_csv(tmp_path / "now.csv", index=False)
    expected = pd.read_csv(tmp_path / "frames" / f"{name}-{frame}.csv")
    found = pd.read_csv(tmp_path / "now.csv")
    assert len(expected.columns) > 5
    pd.testing.assert_frame_equal(found[expected.columns], expected)


def test_an_old_run_opens_with_its_epochs_its_settings_and_its_journal(runs):
    run = ft.Run.open(runs / "first")
    assert (run.id, len(run), run.next_index, run.state, run.writer) == ("first", 4, 4, "interrupted", None)
    assert [epoch.metrics.failures for epoch in run] == [2, 2, 1, 6]
    assert [epoch.policy_versions for epoch in run] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [epoch.selection.kept.tolist() for epoch in run] == [[4, 0], [0, 4], [4, 2], [2, 4]]
    assert run[3].metrics.mean_reward == pytest.approx(11 / 28)
    assert [round(v.mean_reward, 3) for epoch in run for v in epoch.validations] == [0.0, 0.5]
    assert (run.curriculum.percentile, run.curriculum.schedule, run.curriculum.expansion_interval) == (0.8, "manual", 3)
    assert run.live["adapter.learning_rate"] == 0.002
    assert [(change.field, change.old, change.new, change.epoch) for change in run.changes] == [
        ("percentile", 0.5, 0.8, 2),
        ("schedule", "automatic", "manual", 2),
        ("adapter.learning_rate", 0.003, 0.002, 2),
    ]
    table = ft.runs(runs).set_index("run")
    assert table.epochs.to_dict() == {"named": 1, "first-fork": 1, "first": 4}
    assert (table.parent["first-fork"], table.parent_epoch["first-fork"]) == ("first", 1)


def test_failures_and_missing_rewards_of_an_old_run_are_still_no_zeros(runs):
    run = ft.Run.open(runs / "first")
    frame = run.trajectories()
    assert len(frame) == 4 * 36
    failed = frame.error.str.startswith("ValueError", na=False)
    missing = frame.error.str.startswith("the reward is None", na=False)
    assert (failed.sum(), missing.sum()) == (11, 16)
    assert frame.reward.isna().equals(failed | missing)
    failure = run[3].collection.failures[0]
    assert (failure.example_id, failure.generation) == ("train-0003", 1)
    assert failure.error == "ValueError: the answer -3 ends with 3"
    assert failure.steps
    without = next(t for group in run[0].collection.trajectories for t in group if math.isnan(t.reward))
    assert without.metadata["reward_error"]


def test_the_conversations_of_an_old_run_have_their_tool_calls_and_sampled_tokens(runs):
    run = ft.Run.open(runs / "first")
    messages = run.messages()
    assert len(messages) == 412
    assert (messages.tool_calls.notna().sum(), (messages.role == "tool").sum(), messages.failed.sum()) == (62, 62, 36)
    trajectory = run.show(0, "train-0001", 2).trajectory
    user, call, result, answer = trajectory.episode
    assert user.content == "18+14"
    assert call.metadata["tool_calls"][0]["function"] == {
        "name": "calculator",
        "arguments": '{"expression": "18+14"}',
    }
    assert (result.content, answer.content, trajectory.reward) == ("32", "=32", 1.0)
    assert len(call.logprobs) == len(call.metadata["token_ids"]) == 7
    assert answer.metadata["prompt_token_ids"][:20] == call.metadata["prompt_token_ids"]
    assert len(run.tokens()) == sum(epoch.metrics.sampled_tokens for epoch in run) == 902


def test_the_epoch_in_which_the_process_was_killed_is_shown_as_far_as_it_came(runs):
    rolled_out = ft.Run.open(runs / "first").partial
    assert (rolled_out.index, rolled_out.job, rolled_out.policy_versions) == (4, None, (4, None))
    assert [len(group) for group in rolled_out.collection.trajectories] == [4, 6, 6, 5, 6]
    assert len(rolled_out.collection.failures) == 3
    assert all(math.isnan(t.reward) for group in rolled_out.collection.trajectories for t in group)
    assert rolled_out.validations[0].mean_reward == pytest.approx(1 / 3)
    submitted = ft.Run.open(runs / "first-fork").partial
    assert (submitted.index, submitted.job, submitted.selection.kept.tolist()) == (3, None, [4, 2])
    assert (submitted.metrics.trajectories, submitted.metrics.failures) == (30, 6)


def test_an_old_run_is_shown_compared_and_previewed(runs):
    run = ft.Run.open(runs / "first")
    view = run.show(3, "train-0003")
    assert view.trajectory.reward == 1.0
    assert "12-17+15-15" in view._repr_html_()
    assert run.show(3, "train-0003", 1).failure.error == "ValueError: the answer -3 ends with 3"
    assert "8-6-13-16+4" in run.show(4, "train-0004")._repr_html_()
    pair = run.compare_group(3, "train-0003")
    assert (pair.divergence.turn, pair.divergence.character, pair.divergence.token) == (1, 2, 2)
    assert "train-0003" in pair._repr_html_()
    signal = run.signal(3)
    assert signal.groups.signal.tolist() == ["all_best", "all_worst", "teaches", "all_worst", "teaches", "all_worst"]
    preview = run.preview(percentile=0.3)
    assert (preview.enters, preview.leaves, preview.groups) == ([], ["train-0005"], (1, 2))
    assert "first" in run._repr_html_()


@pytest.mark.slow
@pytest.mark.proof
def test_an_old_run_is_plotted_and_exported(runs, tmp_path):
    run, other = ft.Run.open(runs / "first"), ft.Run.open(runs / "first-fork")
    for plot in (
        run.plot_rewards,
        run.plot_reward_distribution,
        run.plot_curriculum,
        run.plot_groups,
        run.plot_advantages,
        run.plot_lengths,
        run.plot_training,
        run.plot_scores,
    ):
        assert plot(others=[other]).axes
    page = run.export(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "train-0003" in page
    lines = run.export(tmp_path / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 * 36
    journal = run.export(tmp_path / "journal.yaml").read_text(encoding="utf-8")
    assert "adapter.learning_rate" in journal


def test_an_old_fork_is_compared_with_its_parent_on_the_epochs_of_both(runs):
    run, fork = ft.Run.open(runs / "first"), ft.Run.open(runs / "first-fork")
    assert (len(fork), fork[2].policy_versions, fork.curriculum.percentile) == (1, (2, 3), 1.0)
    assert fork.journal()[["source", "field", "new"]].values.tolist() == [
        ["fork", "percentile", 1.0],
        ["fork", "schedule", "manual"],
    ]
    found = ft.compare([run, fork])
    assert (found.differences[0].mean, found.differences[0].pairs) == (0.0, 6)
    assert found.frame["first"].tolist() == pytest.approx([1, 0, 0.6, 0, 5 / 6, 0])


# ── continuing ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_old_run_continues_from_its_weights_and_runs_the_unfinished_epoch_again(runs, tmp_path, closing):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    run = closing(ft.Run.open(runs / "first", **functions(), trust=True))
    stored = adapter_weights(runs / "first" / "checkpoints" / "epoch-000003")
    assert any(matrix.any() for name, matrix in stored.items() if "lora_B" in name)
    assert same(adapter_weights(run.save_model(tmp_path / "before")), stored)
    assert run.next_index == 4
    epoch = await run.next_epoch()
    assert (epoch.index, epoch.policy_versions, len(run)) == (4, (4, 5), 5)
    assert (epoch.metrics.trajectories, epoch.metrics.failures) == (36, 0)
    assert (epoch.curriculum.percentile, epoch.train_metrics["learning_rate"]) == (0.8, 0.002)
    assert epoch.train_metrics["logprob_gap"] < 0.1
    assert epoch.validations[0].policy_version == 4
    assert run.partial is None
    assert not same(adapter_weights(run.save_model(tmp_path / "after")), stored)
    assert len(run.trajectories()) == 5 * 36


async def test_an_old_run_is_forked_and_the_fork_trains_from_the_weights_of_that_epoch(runs, tmp_path, closing):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    run = closing(ft.Run.open(runs / "first", **functions(), trust=True))
    fork = closing(run.fork(epoch=2, curriculum={"percentile": 0.4}, training={"learning_rate": 0.0005}, name="new"))
    stored = adapter_weights(runs / "first" / "checkpoints" / "epoch-000002")
    assert same(adapter_weights(fork.save_model(tmp_path / "before")), stored)
    epoch = await fork.next_epoch()
    assert (epoch.index, epoch.policy_versions) == (3, (3, 4))
    assert (epoch.curriculum.percentile, epoch.train_metrics["learning_rate"]) == (0.4, 0.0005)
    assert ft.compare([run, fork]).frame[["epoch", "example"]].values.tolist() == [
        [3, f"train-000{place}"] for place in range(1, 7)
    ]
    assert len(run) == 4 and run.partial.index == 4


async def test_an_old_fork_continues_after_its_parents_epoch(runs, closing):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    run, fork = ft.Run.open(runs / "first"), closing(ft.Run.open(runs / "first-fork", **functions(), trust=True))
    epoch = await fork.next_epoch()
    assert (epoch.index, epoch.policy_versions, len(fork), fork.partial) == (3, (3, 4), 2, None)
    assert (epoch.curriculum.percentile, epoch.train_metrics["learning_rate"]) == (1.0, 0.001)
    assert ft.compare([run, fork]).differences[0].pairs == 12


async def test_an_old_run_from_yaml_continues_with_nothing_given_again(runs, monkeypatch, closing):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    monkeypatch.chdir(runs.parent)  # its config names the dataset relative to this folder
    run = closing(ft.Run.open("runs/named", trust=True))
    assert run[0].metrics.mean_reward == 0.74375
    epoch = await run.next_epoch()
    assert (epoch.index, epoch.policy_versions, epoch.metrics.trajectories) == (1, (1, 2), 12)
    scores = ["reward", "correct", "close", "exact", "number", "contained", "used_tool"]
    assert list(epoch.metrics.scores) == list(run[0].metrics.scores) == scores
