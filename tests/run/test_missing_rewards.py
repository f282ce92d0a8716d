"""A reward that fails is said wherever an epoch is shown, with how many are missing and why."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import time

import pytest
from factories import make_epoch
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb import tripwires
from finetune_nb.engine.sinks import metrics_of
from finetune_nb.notebook.panel_html import record_html, status_html
from finetune_nb.rollouts.preferences import PreferenceBuilder, PreferenceBuilderConfig
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.text import most_frequent_error
from finetune_nb.training.metrics import epoch_metrics


class RateLimitError(Exception):
    pass


def failing(most, of=4, error=RateLimitError):
    """A reward that fails for `most` of every `of` items, each with a text of its own."""
    turns = itertools.count()

    def reward(item):
        turn = next(turns)
        if turn % of < most:
            raise error(f"try again in {turn % 3} s")
        return float(turn % 2)

    return reward


def words(markup):
    return " ".join(re.sub(r"<style.*?</style>|<[^>]+>", " ", markup, flags=re.S).split())


@pytest.mark.slow
@pytest.mark.proof
async def test_a_few_missing_rewards_are_said_in_every_place(make_run, caplog, tmp_path):
    run = make_run(reward=failing(3))
    with caplog.at_level(logging.WARNING, "finetune_nb"):
        epoch = await run.next_epoch()
    said = "rewards missing 18 of 24: RateLimitError: try again in"
    assert int(run.trajectories().reward.isna().sum()) == 18
    assert f"epoch 0: {said}" in caplog.text
    assert any(said in line for line in run.log_lines())
    shown = {
        "card": words(epoch._repr_html_()),
        "text": repr(epoch),
        "run's text": repr(run),
        "panel": words(record_html([epoch], [])),
        "panel's head": words(status_html(run.status, 1)),
        "report": words(run.export(tmp_path / "report.html").read_text()),
    }
    assert [place for place, text in shown.items() if said not in text] == []
    assert "18 of 24: RateLimitError" in words(run._repr_html_())
    row = run.epochs().iloc[0]
    assert row.rewards_missing == 18 and row.reward_error.startswith("RateLimitError: try again in")
    assert metrics_of(epoch)["rollouts/rewards_missing"] == 18
    line = json.loads((run.folder / "training_metrics.jsonl").read_text())
    assert line["rewards_missing"] == 18 and line["reward_error"].startswith("RateLimitError")
    run.close()
    again = ft.Run.open(run.folder)
    assert said in repr(again[0]) and again.epochs().rewards_missing.tolist() == [18]


async def test_where_no_reward_is_missing_nothing_is_said(make_run):
    run = make_run()
    epoch = await run.next_epoch()
    for text in (words(epoch._repr_html_()), repr(epoch), words(run._repr_html_())):
        assert "missing" not in text
    assert run.epochs().rewards_missing.tolist() == [0] and run.epochs().reward_error.isna().all()


RETURNED = {
    "None": (lambda item: None, "the reward is None"),
    "NaN": (lambda item: math.nan, "the reward is NaN"),
    "text": (lambda item: "good", "the reward is 'good'"),
    "exception": (failing(4), "RateLimitError: try again in"),
}


@pytest.mark.parametrize("curriculum", [None, {}], ids=["curriculum off", "curriculum on"])
@pytest.mark.parametrize(("reward", "why"), RETURNED.values(), ids=RETURNED)
def test_a_run_in_the_background_stops_when_all_rewards_are_missing(make_run, reward, why, curriculum):
    run = make_run(reward=reward, curriculum=curriculum)
    run.start(5)
    with pytest.raises(ft.RunError, match=r"epoch 0: rewards missing 24 of 24: ") as told:
        run.wait(60)
    assert why in str(told.value) and "run.start()" in str(told.value)
    assert (run.state, len(run)) == ("failed", 1)
    assert run[0].reason.startswith("rewards missing 24 of 24: ") and why in run[0].reason
    assert run.epochs().reason.tolist() == [run[0].reason]
    assert repr(run[0]).count("rewards missing") == 1  # its reason says it already
    assert f"not trained: {run[0].reason}"[:60] in repr(run[0])


def test_a_run_that_was_stopped_so_goes_on_once_the_reward_is_mended(make_run):
    broken = [True]

    def reward(item):
        if broken[0]:
            raise RateLimitError("quota")
        return right(item)

    run = make_run(reward=reward)
    run.start(2)
    with pytest.raises(ft.RunError, match="RateLimitError: quota"):
        run.wait(60)
    broken[0] = False
    run.start(2)
    run.wait(60)
    assert [epoch.metrics.rewards_missing for epoch in run] == [24, 0, 0] and run.state == "ready"


async def test_a_cell_that_runs_one_epoch_gets_its_record(make_run):
    epoch = await make_run(reward=failing(4)).next_epoch()
    assert epoch.job is None and "rewards missing 24 of 24: RateLimitError" in repr(epoch)


async def test_an_epoch_that_trained_nothing_names_both_reasons(make_run):
    def reward(item):
        if item.id == "sum-0":
            raise RateLimitError("quota")
        return 1.0

    epoch = await make_run(reward=reward, curriculum={}).next_epoch()
    assert epoch.reason == (
        "no group is left to train on: 1 with no reward, 5 with no reward spread; "
        "rewards missing 4 of 24: RateLimitError: quota"
    )


def test_the_most_frequent_kind_of_error_is_named_whatever_its_texts_say():
    errors = [f"RateLimitError: wait {n} s" for n in range(5)] + ["KeyError: 'a'"] * 3 + [None, ""]
    assert most_frequent_error(errors).startswith("RateLimitError: wait")
    assert most_frequent_error(["E: a", "E: b", "E: b"]) == "E: b"
    assert most_frequent_error(["line one\n  line \x1b[31m two"]) == "line one line ␛[31m two"
    assert most_frequent_error([None]) is None and most_frequent_error([]) is None


def test_a_reward_without_a_recorded_reason_is_missing_all_the_same():
    epoch = make_epoch([[None, 1.0]])
    for group in epoch.collection.trajectories:
        group[0].metadata.pop("reward_error", None)
    found = epoch_metrics(epoch.collection, epoch.statistics, epoch.selection)
    assert found.rewards_missing_text == "rewards missing 1 of 2: no reason was recorded"


def test_a_tripwire_pauses_where_too_many_are_missing(make_run):
    run = make_run(reward=failing(1))
    run.tripwires.append(ft.tripwires.rewards_missing(0.2))
    run.start(3)
    deadline = time.monotonic() + 30
    while run.state != "paused" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run.state == "paused"
    assert "rewards missing 6 of 24: RateLimitError" in run.notice and "more than 20 %" in run.notice
    run.stop()
    run.wait(30)


@pytest.mark.parametrize(("share", "pauses"), [(0.0, True), (0.24, True), (0.25, False), (0.9, False)])
def test_the_tripwires_share_is_the_largest_that_may_be_missing(share, pauses):
    epoch = make_epoch([[None, 1.0], [0.0, 1.0]])
    assert bool(tripwires.rewards_missing(share)(epoch)) is pauses
    assert tripwires.rewards_missing(share)(make_epoch([[1.0, 0.0]])) is None


@pytest.mark.parametrize("share", [-0.1, 1, 20, math.nan, "0.2", None])
def test_a_tripwires_share_is_checked(share):
    with pytest.raises(ft.ConfigError, match=r"rewards_missing: share is .*from 0 to below 1"):
        tripwires.rewards_missing(share)


# ── validation, preferences ──────────────────────────────────────────────────────────────────────────────────────────


async def test_rewards_that_are_missing_in_a_validation_are_counted(make_run):
    def reward(item):
        if item.id in ("v-0", "v-1"):
            raise RateLimitError("quota")
        return right(item)

    async def solve(item, llm):
        if item.id == "v-2":
            raise OSError("gone")
        return await guess(item.input_obj, llm)

    rows = [{**row, "id": f"v-{i}"} for i, row in enumerate(sums(5, seed=9))]
    run = make_run(solve, reward, validation=rows)
    epoch = await run.next_epoch()
    (validation,) = epoch.validations
    assert (validation.examples, validation.rewards_missing) == (2, 3)
    assert validation.reward_error == "RateLimitError: quota"
    assert "on 2 examples, rewards missing 3: RateLimitError: quota" in words(epoch._repr_html_())
    assert "(3 rewards missing)" in repr(epoch)
    assert run.epochs().validation_missing.tolist() == [3]


async def test_a_validation_without_any_reward_says_why(make_run):
    epoch = await make_run(reward=failing(4), validation=sums(3, seed=9)).next_epoch()
    assert "RateLimitError: try again in" in epoch.validations[0].error


async def test_a_rollout_that_makes_no_preference_for_want_of_a_reward_is_a_failure(make_run):
    adapter = FakeAdapter(policy=ScriptedPolicy(coin))
    builder = PreferenceBuilder(PreferenceBuilderConfig(num_generations=4))
    run = make_run(reward=failing(1), builder=builder, adapter=adapter)
    epoch = await run.next_epoch()
    assert epoch.metrics.failures == 6
    errors = [failure.error for failure in epoch.collection.failures]
    assert all(error.startswith("no reward: RateLimitError: try again in") for error in errors)
