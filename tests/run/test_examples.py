"""`run.examples`, and epochs whose examples are drawn by difficulty."""

import random

import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError, RunError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy

ROWS = [{"id": f"q{n}", "question": f"q{n}"} for n in range(24)]
RATES = (1.0, 0.0, 0.5, 0.25)


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def reward(output):
    return None if output == "?" else float(output)


def reply(messages, seed):
    return str(int(random.Random(seed).random() < RATES[int(messages[-1]["content"][1:]) % 4]))


def adapter():
    return FakeAdapter(policy=ScriptedPolicy(reply))


def new_run(folder, name="run", **options):
    options = {"draw": "difficulty", "generations": 4, "examples_per_epoch": 6, "num_epochs": 20} | options
    return ft.Run(solve, reward, ROWS, output_dir=folder, name=name, adapter=adapter(), **options)


def epochs(run, count):
    return [ft.run_sync(run.next_epoch(progress=False)) for _ in range(count)]


def drawn(epoch):
    return list(epoch.statistics.example_ids)


def test_each_epoch_draws_what_was_previewed(tmp_path):
    run = new_run(tmp_path)
    for _ in range(5):
        preview = run.preview_draw()
        (epoch,) = epochs(run, 1)
        assert drawn(epoch) == preview.example.tolist() and set(preview.change) == {""}
    run.close()


def test_the_frame_has_a_row_for_each_example_of_the_dataset(tmp_path):
    run = new_run(tmp_path)
    assert run.examples().state.tolist() == ["fresh"] * 24 and run.examples().pass_rate.isna().all()
    epochs(run, 4)
    frame = run.examples()
    assert frame.example.tolist() == [row["id"] for row in ROWS]
    assert frame.rollouts.sum() == 4 * 6 * 4 and frame.epochs.sum() == 4 * 6
    groups = run.groups()
    for row in frame[frame.epochs == 1].itertuples():
        (group,) = groups[groups.example == row.example].itertuples()
        assert (row.pass_rate, row.mean_reward, row.solved, row.last_epoch) == (*[group.mean] * 3, group.epoch)
    resting = frame[frame.state == "resting"]
    assert len(resting) and (resting.rests_until > 4).all() and resting.pass_rate.isin([0.0, 1.0]).all()
    assert not set(resting.example) & set(run.preview_draw().example)
    assert run.examples(["example", "state"]).columns.tolist() == ["example", "state"]
    with pytest.raises(ConfigError, match="stat"):
        run.examples("stat")
    run.close()


def test_a_continued_run_and_a_fork_draw_from_the_record(tmp_path):
    whole = new_run(tmp_path, "whole")
    expected = [drawn(epoch) for epoch in epochs(whole, 6)]
    continued = new_run(tmp_path, "continued")
    epochs(continued, 3)
    continued.close()
    continued = new_run(tmp_path, "continued", resume="auto")
    assert [drawn(epoch) for epoch in epochs(continued, 3)] == expected[3:]
    fork = whole.fork(epoch=3, adapter=adapter())
    assert fork.examples().rollouts.sum() == 4 * 6 * 4  # its parent's, up to where it begins
    assert [drawn(epoch) for epoch in epochs(fork, 1)] == expected[4:5]
    again = fork.fork(epoch=4, adapter=adapter())
    assert [drawn(epoch) for epoch in epochs(again, 1)] == expected[5:]
    other = whole.fork(epoch=3, adapter=adapter(), reward=lambda output: 0.5)
    assert set(other.examples().state) == {"fresh"}  # by another reward, nothing is known
    for run in (whole, continued, fork, again, other):
        run.close()


def test_target_width_and_rest_are_live(tmp_path):
    run = new_run(tmp_path, draw={"target_rate": 0.4, "rest_epochs": 1})
    names = {"builder.target_rate": 0.4, "builder.rate_width": 0.25, "builder.rest_epochs": 1}
    assert names.items() <= run.live.items()
    epochs(run, 4)
    preview = run.preview_draw(rest_epochs=50, rate_width=0.05)
    assert {"enters", "leaves"} <= set(preview.change) and run.live["builder.rest_epochs"] == 1
    run.live |= {"builder.rest_epochs": 50, "builder.rate_width": 0.05}
    asked = run.preview_draw()
    assert asked.example.tolist() == preview[preview.change != "leaves"].example.tolist()
    assert drawn(*epochs(run, 1)) == asked.example.tolist()
    assert run.changes[-1].epoch == 4
    for name, value in (("target_rate", 1.0), ("rate_width", 0), ("rest_epochs", -1)):
        with pytest.raises(ConfigError, match=name):
            run.live[f"builder.{name}"] = value
        with pytest.raises(ConfigError, match=name):
            run.preview_draw(**{name: value})
    run.close()


def test_drawn_evenly_they_are_those_of_before_and_have_no_settings(tmp_path):
    run = new_run(tmp_path, draw="uniform")
    assert not [name for name in run.live if "rate" in name or "rest" in name]
    assert run.preview_draw().example.tolist() == drawn(*epochs(run, 1))
    assert set(run.preview_draw(draw="difficulty").change) >= {"enters"}
    run.close()
    everything = new_run(tmp_path, "everything", draw="uniform", examples_per_epoch=None)
    assert len(everything.preview_draw()) == 24
    everything.close()


def test_rollouts_that_somebody_chose_and_warm_ups_are_no_visits(tmp_path):
    run = new_run(tmp_path)
    epochs(run, 1)
    before = run.examples().drop(columns=["rests_until", "state"])
    ft.run_sync(run.train_on(run.trajectories()))
    assert run.examples().drop(columns=["rests_until", "state"]).equals(before)
    run.close()


def test_a_run_that_is_read_has_the_examples_that_were_drawn(tmp_path):
    run = new_run(tmp_path)
    epochs(run, 1)
    run.close()
    read = ft.Run.open(run.folder)
    assert len(read.examples()) == 6
    with pytest.raises(RunError):
        read.preview_draw()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="examples_per_epoch is not given"):
        new_run(tmp_path, examples_per_epoch=None)
    with pytest.raises(ConfigError, match="difficlty"):
        new_run(tmp_path, draw="difficlty")
    with pytest.raises(ConfigError, match="target"):
        new_run(tmp_path, draw={"target": 0.5})
