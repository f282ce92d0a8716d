"""Recorded rollouts under another reward: what is predicted is what an epoch with that reward would have been."""

from __future__ import annotations

import math

import numpy as np
import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError, RunError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.training.metrics import advantages

ROWS = sums(12)


async def solve(question, llm):
    messages = [{"role": "user", "content": question}]
    for _ in range(1 + len(question) % 2):
        reply = await llm.chat(messages)
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": "again"}]
    return {"value": reply.content, "tries": len(messages) // 2}


def make_run(reward, folder, **options):
    policy = ScriptedPolicy(lambda messages, seed: str(seed % 40))
    settings = {
        "generations": 4,
        "examples_per_epoch": 6,
        "curriculum": {"initial_percentile": 0.4, "expansion_interval": 2, "min_reward_diff": 0.05},
        "adapter": FakeAdapter(policy=policy),
        "deterministic": True,
        "output_dir": folder,
        **options,
    }
    return ft.Run(solve, reward, ROWS, **settings)


def epochs(run, count=4):
    for _ in range(count):
        ft.run_sync(run.next_epoch())
    return run


def close_to(output, answer):
    return -abs(int(output["value"]) - int(answer)) / 10


def sometimes(output):
    return None if int(output["value"]) % 7 == 0 else float(int(output["value"]) % 3)


@ft.group_reward
def ranked(outputs):
    values = [int(output["value"]) for output in outputs]
    return [sum(other < value for other in values) / len(values) for value in values]


async def turns(trajectory):
    return [0.1 * len(item.content) for item in trajectory.episode if item.role == "assistant"]


REWARDS = {
    "a number": close_to,
    "missing": sometimes,
    "of a group": ranked,
    "of turns": turns,
    "by name": {"close": (close_to, 0.3), "missing": (sometimes, 1.7), "ranked": ranked},
    "turns in a sum": {"turns": (turns, 2.0), "close": close_to},
    "scores": lambda output: {"value": int(output["value"]) / 40, "tries": output["tries"]},
}


def same(found, expected):
    assert np.array_equal(found, expected, equal_nan=True)


def check_prediction(rescored, real):
    """Everything that the rescoring says of each epoch, to the last digit."""
    for epoch in real:
        predicted = rescored[epoch.index]
        statistics = epoch.statistics
        assert predicted.after.example_ids == statistics.example_ids
        same(predicted.after.rewards, statistics.rewards)
        same(predicted.after.spreads, statistics.spreads)
        same(advantages(predicted.after), advantages(statistics))
        selection = rescored.selection(epoch.index)
        same(selection.kept, epoch.selection.kept)
        same(selection.reasons, epoch.selection.reasons)
        assert selection.state == epoch.selection.state
        recorded = [trajectory for group in epoch.collection.trajectories for trajectory in group]
        assert predicted.turns == [trajectory.shaped_rewards for trajectory in recorded]
        assert predicted.errors == [(each.metadata or {}).get("reward_error") for each in recorded]
        for place, each in enumerate(recorded):
            scores = {
                name: None if math.isnan(values[place]) else values[place] for name, values in predicted.scores.items()
            }
            assert scores.items() <= each.metadata["scores"].items()


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("name", REWARDS)
def test_what_is_predicted_is_what_a_run_with_that_reward_records(tmp_path, closing, name, reopened):
    run = closing(epochs(make_run(lambda output: int(output["value"]) % 2, tmp_path, name="old")))
    real = closing(epochs(make_run(REWARDS[name], tmp_path, name="new")))
    if reopened:
        run.close()
        run = closing(ft.Run.open(run.folder, dataset=ROWS))
    check_prediction(run.rescore(REWARDS[name]), real)


@pytest.mark.parametrize("name", REWARDS)
def test_the_runs_own_reward_changes_nothing(tmp_path, closing, name):
    run = closing(epochs(make_run(REWARDS[name], tmp_path), 2))
    rescored = run.rescore()
    check_prediction(rescored, run)
    assert not len(rescored.moved())
    assert (rescored.gained, rescored.lost) == (0, 0)


def test_other_weights_add_up_the_recorded_scores_and_call_nothing(tmp_path, closing):
    calls = []

    def counted(output):
        calls.append(output)
        return sometimes(output)

    parts = {"close": (close_to, 0.3), "counted": (counted, 1.7), "ranked": ranked}
    run = closing(epochs(make_run(parts, tmp_path, name="old")))
    made = len(calls)
    rescored = run.rescore(weights={"close": 2.5})
    assert len(calls) == made
    real = closing(epochs(make_run(parts | {"close": (close_to, 2.5)}, tmp_path, name="new")))
    for epoch in real:
        same(rescored[epoch.index].after.rewards, epoch.statistics.rewards)
        same(rescored.selection(epoch.index).kept, epoch.selection.kept)


def test_a_set_percentile_holds_under_the_new_reward_too(tmp_path, closing):
    def steered(reward, name):
        run = closing(make_run(reward, tmp_path, name=name))
        for epoch in range(6):
            if epoch == 2:
                run.curriculum = {"percentile": 0.9}
            if epoch == 4:
                run.curriculum = {"percentile": 0.2, "schedule": "automatic"}
            ft.run_sync(run.next_epoch())
        return run

    run, real = steered(lambda output: int(output["value"]) % 2, "old"), steered(close_to, "new")
    check_prediction(run.rescore(close_to), real)


# ── only what failed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_rollouts_without_a_reward_are_scored_and_the_others_keep_theirs(tmp_path, closing):
    run = closing(epochs(make_run({"judge": sometimes, "close": close_to}, tmp_path), 2))
    before = run.trajectories()
    missing = before.reward.isna()
    assert 0 < missing.sum() < len(before)
    scored = []

    def patient(output):
        scored.append(output)
        return 5.0

    rescored = run.rescore({"judge": patient, "close": close_to}, only="failed")
    assert len(scored) == missing.sum()
    after = rescored.rollouts()
    assert rescored.rewards_missing == (missing.sum(), 0)
    assert (after.new_reward[~missing] == before.reward[~missing]).all()
    assert (after.new_reward[missing] == 5.0 + after.score_close[missing]).all()
    assert (after.score_judge[~missing] == before.score_judge[~missing]).all()


def test_a_group_that_lacks_a_reward_is_ranked_as_a_whole(tmp_path, closing):
    run = closing(epochs(make_run(sometimes, tmp_path), 1))
    statistics = run[0].statistics
    rescored = run.rescore(ranked, only="failed")[0]
    for group in range(len(statistics)):
        rows = slice(statistics.offsets[group], statistics.offsets[group + 1])
        if np.isnan(statistics.rewards[rows]).any():
            assert sorted(rescored.after.rewards[rows])[0] == 0.0
        else:
            same(rescored.after.rewards[rows], statistics.rewards[rows])


# ── what is refused, and what it says ────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_scored_anew_says_why(tmp_path, closing):
    run = closing(make_run(close_to, tmp_path))
    with pytest.raises(RunError, match="no epoch has ended yet"):
        run.rescore()
    epochs(run, 1)
    with pytest.raises(ConfigError, match="wants 'anwser'.*Did you mean 'answer'"):
        run.rescore(lambda output, anwser: 1.0)
    with pytest.raises(ConfigError, match="expected 'failed'"):
        run.rescore(only="missing")
    with pytest.raises(ConfigError, match="not a weighted sum"):
        run.rescore(weights={"close": 1.0})
    with pytest.raises(ConfigError, match="leave reward= and only= out"):
        run.rescore(close_to, weights={"close": 1.0})
    with pytest.raises(IndexError, match="epoch 3 was not scored anew. Known: 0"):
        run.rescore()[3]


def test_a_moved_weight_is_previewed_beside_those_that_are_asked_for(tmp_path, closing):
    parts = {"close": (close_to, 0.3), "ranked": (ranked, 1.0)}
    run = closing(epochs(make_run(parts, tmp_path, name="old"), 1))
    other = closing(epochs(make_run(parts | {"close": (close_to, 2.0)}, tmp_path, name="new"), 1))
    preview = run.preview(weights={"close": 2.0}, percentile=0.5)
    same(preview.basis.statistics.rewards, other[0].statistics.rewards)
    same(preview.selection.kept, other.preview(percentile=0.5).selection.kept)
    same(preview.unchanged.kept, run.preview().selection.kept)
    assert dict(preview.weights) == {"close": 2.0, "ranked": 1.0} and "2 close + 1 ranked" in preview._repr_html_()
    run.live["reward.close"] = 2.0
    same(run.preview().basis.statistics.rewards, other[0].statistics.rewards)
    back = run.preview(weights={"close": 0.3})
    same(back.basis.statistics.rewards, run[0].statistics.rewards)
    same(back.unchanged.kept, other.preview().selection.kept)
    with pytest.raises(ConfigError, match="no part 'clos'"):
        run.preview(weights={"clos": 1.0})


def test_an_unknown_weight_is_refused(tmp_path, closing):
    run = closing(epochs(make_run({"close": close_to, "ranked": ranked}, tmp_path), 1))
    with pytest.raises(ConfigError, match="no part 'clos'. Did you mean 'close'"):
        run.rescore(weights={"clos": 1.0})


def test_rows_that_are_not_known_here_are_asked_for(tmp_path, closing):
    run = epochs(make_run(close_to, tmp_path), 1)
    run.close()
    again = closing(ft.Run.open(run.folder))
    with pytest.raises(ConfigError, match=r"The run's dataset is not known here: pass dataset=\."):
        again.rescore(close_to)
    assert again.rescore(close_to, dataset=ROWS).rollouts().new_reward.notna().all()
    assert again.rescore(lambda output: 1.0).rollouts().new_reward.eq(1.0).all()


def test_what_was_not_recorded_is_an_error_and_not_empty(tmp_path, closing):
    run = closing(epochs(make_run(close_to, tmp_path), 1))
    frame = run.rescore(lambda item: float(len(item.trajectory))).rollouts()
    assert frame.new_reward.isna().all()
    assert frame.error.str.contains("Take the parameter `trajectory` instead").all()


def test_a_reward_that_raises_is_a_missing_reward_with_its_error(tmp_path, closing):
    run = closing(epochs(make_run(close_to, tmp_path), 1))
    rescored = run.rescore(lambda output: 1 / 0)
    assert rescored.rewards_missing == (0, 24)
    assert rescored.rollouts().error.unique().tolist() == ["ZeroDivisionError: division by zero"]
    assert rescored.lost > 0


def test_a_closed_run_is_scored_anew_too(tmp_path):
    run = epochs(make_run(close_to, tmp_path), 1)
    run.close()
    assert not len(run.rescore(close_to, dataset=ROWS).moved())
    with pytest.raises(RunError, match="this run is closed, and its own reward with it"):
        run.rescore()


# ── what it shows ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("reopened", [False, True])
def test_an_epoch_that_was_not_trained_on_is_given_the_rewards_that_were_missing(tmp_path, closing, index, reopened):
    def everything_missing(output, answer):
        raise ConnectionError("the judge cannot be reached")

    judge = close_to

    def reward(output, answer):
        return judge(output, answer)

    run = epochs(make_run(reward, tmp_path, name="late"), index)
    judge = everything_missing
    epochs(run, 1)
    assert run[index].job is None and run[index].metrics.rewards_missing == 24
    judge = close_to
    rescored = run.rescore(epochs=index, only="failed")
    rescored.apply()
    assert len(run) == index
    assert [each.reward for group in run.partial.collection.trajectories for each in group] == (
        rescored[index].after.rewards.tolist()
    )
    if reopened:  # what was put in place is in the folder
        run.close()
        run = ft.Run.open(
            run.folder,
            solve,
            reward,
            dataset=ROWS,
            adapter=FakeAdapter(policy=ScriptedPolicy(lambda _, seed: str(seed % 40))),
        )
    epochs(closing(run), 2)
    real = closing(epochs(make_run(close_to, tmp_path, name="real"), index + 2))
    for late, never in zip(run, real, strict=True):
        same(late.statistics.rewards, never.statistics.rewards)
        same(late.selection.kept, never.selection.kept)
        assert late.selection.state == never.selection.state and late.curriculum == never.curriculum
        assert late.trained == never.trained
    found = [each.metadata.get("rescored") for each in run[index].collection.trajectories[0]]
    assert found == [True] * 4 and run.trajectories(index).error.isna().all()
    old = ft.Run.open(next((tmp_path / "archive").glob(f"late-until-{index}*")))
    assert old[index].metrics.rewards_missing == 24


def test_rewards_of_an_epoch_that_was_trained_on_stay(tmp_path, closing):
    run = closing(epochs(make_run(close_to, tmp_path), 2))
    with pytest.raises(RunError, match=r"epoch 1 was trained on .* run\.fork\(epoch=0, reward=\.\.\.\)"):
        run.rescore(sometimes).apply()
    with pytest.raises(RunError, match="epoch 0 is not the newest"):
        run.rescore(sometimes).apply(0)
    run.close()
    with pytest.raises(RunError, match="closed"):
        run.rescore(sometimes).apply()


def test_it_shows_itself_with_the_rollouts_that_moved_most(tmp_path, closing):
    run = closing(epochs(make_run(close_to, tmp_path), 2))
    rescored = run.rescore(lambda output: int(output["value"]) % 2)
    html, moved = rescored._repr_html_(), rescored.moved(10)
    assert len(moved) == 10
    for name in moved.trajectory:
        assert name in html
    assert html.count("<summary><strong>e") == 10
    assert "epoch 1: mean reward" in repr(rescored)
    groups = rescored.groups()
    assert groups.flips.sum() > 0
    assert (groups.new_teaches & ~groups.teaches).sum() == rescored.gained
    assert len(html) < 200_000


def test_a_preview_says_what_the_curriculum_would_choose(tmp_path, closing):
    run = closing(epochs(make_run(close_to, tmp_path), 2))
    preview = run.rescore(lambda output: int(output["value"]) % 2).preview(percentile=1.0)
    assert preview.kept_groups[0] == int(preview.basis.teaches.sum())
    assert "preview on the rewards of epoch 1" in repr(preview)


def test_flips_are_the_pairs_that_a_plain_loop_counts(tmp_path, closing):
    run = closing(epochs(make_run(sometimes, tmp_path), 2))
    for epoch in run.rescore(close_to).epochs:
        for group, found in enumerate(epoch.flips.tolist()):
            rows = range(epoch.before.offsets[group], epoch.before.offsets[group + 1])
            old, new = epoch.before.rewards, epoch.after.rewards
            count = sum((old[a] - old[b]) * (new[a] - new[b]) < 0 for a in rows for b in rows if a < b)
            assert found == count


# ── going on with it ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fork_continues_with_another_reward_and_the_epochs_before_keep_theirs(tmp_path, closing):
    run = closing(epochs(make_run({"odd": lambda output: int(output["value"]) % 2, "close": close_to}, tmp_path), 2))
    other = {"close": (close_to, 3.0), "ranked": ranked}
    fork = closing(
        run.fork(0, reward=other, adapter=FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: str(seed % 40))))
    )
    ft.run_sync(fork.next_epoch())
    frame = fork.trajectories(epoch=1)
    assert (frame.reward == 3 * frame.score_close + frame.score_ranked).all()
    assert "score_odd" not in frame
    assert dict(fork.live)["reward.close"] == 3.0
    expected = run.rescore(other, 1)[1].after.rewards
    assert frame.reward.tolist() == expected.tolist()
    change = next(change for change in fork.changes if change.field == "evaluator.reward")
    assert (change.source, change.epoch) == ("fork", 1)
    assert change.old != change.new
    assert "score_odd" in run.trajectories(epoch=1)


def test_a_fork_of_a_plain_reward_may_have_several(tmp_path, closing):
    run = closing(epochs(make_run(close_to, tmp_path, evaluators={"other": lambda output: 0.0}), 1))
    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: str(seed % 40)))
    with pytest.raises(ConfigError, match="evaluator 'other' has the name of a part of the new reward"):
        run.fork(reward={"other": close_to}, adapter=adapter)
    fork = closing(run.fork(reward=[close_to, ranked], adapter=adapter))
    ft.run_sync(fork.next_epoch())
    assert {"score_reward", "score_close_to", "score_ranked", "score_other"} <= set(fork.trajectories())


def test_a_group_reward_with_another_source_is_noted_when_the_run_is_resumed(tmp_path, closing):
    run = epochs(make_run(ranked, tmp_path, name="r"), 1)
    run.close()

    @ft.group_reward
    def other(outputs):
        return [0.0 for _ in outputs]

    run = closing(make_run(other, tmp_path, name="r", resume="auto"))
    epochs(run, 1)
    assert [change.field for change in run.changes if change.source == "resume"] == ["evaluator.reward"]


def accurate(output, answer):
    """Another reward for the demo's questions: how near, by the share of right digits from the left."""
    found, right = str(output), str(answer)
    return sum(a == b for a, b in zip(found, right, strict=False)) / max(len(found), len(right), 1)


@ft.group_reward
def rarest(outputs):
    counts = [sum(other == output for other in outputs) for output in outputs]
    return [None if count == 1 else 1.0 / count for count in counts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "reward"), [(0, accurate), (1, rarest), (2, {"near": (accurate, 0.7), "rare": (rarest, 0.3)})]
)
def test_the_demo_with_another_reward_is_what_was_predicted(tmp_path, closing, seed, reward):
    """A fork before epoch k has the weights and the seeds of epoch k: with another reward it makes the same rollouts."""
    from finetune_nb.examples import calculator

    settings = {"run__seed": seed, "run__deterministic": True, "finetuning__output_dir": str(tmp_path)}
    run = closing(ft.Run.from_config(calculator.CONFIG, **settings))
    epochs(run, 3)
    for index in (1, 2):
        fork = closing(run.fork(epoch=index - 1, reward=reward))
        ft.run_sync(fork.next_epoch())
        assert fork.trajectories(index).output.tolist() == run.trajectories(index).output.tolist()
        check_prediction(run.rescore(reward, epochs=[index]), fork)
