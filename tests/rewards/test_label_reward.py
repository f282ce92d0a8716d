"""Labels as a reward of recorded rollouts, and as what a judge is held against."""

import math

import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


@pytest.fixture
def run(tmp_path):
    policy = ScriptedPolicy(lambda messages, seed: f"reply {seed % 1009}")
    run = ft.Run(
        solve,
        lambda item: 1.0,
        sums(2),
        generations=3,
        output_dir=tmp_path,
        name="run",
        adapter=FakeAdapter(policy=policy),
    )
    ft.run_sync(run.next_epoch())
    run.label("e0/sum-0/0", "good", score=0.75, author="ann")
    run.label("e0/sum-0/0", "good", score=0.25, author="bob")
    run.label("e0/sum-0/1", "hacked")
    run.label(["e0/sum-0/2", "e0/sum-1", "e0"], "good")  # a label of a group is of none of its rollouts
    run.label("e0/sum-1/0", "hacked")
    run.label("e0/sum-1/0", "good", score=0.5)
    yield run
    run.close()


def rewards(rescoring):
    (epoch,) = rescoring.epochs
    return [None if math.isnan(value) else value for value in epoch.after.rewards.tolist()]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (ft.label_reward("good"), [0.5, None, 1.0, 0.5, None, None]),
        (ft.label_reward({"good": 1, "hacked": 0}), [1.0, 0.0, 1.0, 0.5, None, None]),
        (ft.label_reward(["good", "hacked"]), [0.5, 1.0, 1.0, 0.75, None, None]),
        (ft.label_reward({"hacked": -1}, otherwise=0.0), [0.0, -1.0, 0.0, -1.0, 0.0, 0.0]),
        (ft.label_reward("never given"), [None] * 6),
        ({"label": (ft.label_reward("good"), 2.0), "one": lambda output: 1.0}, [2.0, None, 3.0, 2.0, None, None]),
        (lambda item: float(len(item.labels)), [1.0, 1.0, 1.0, 2.0, 0.0, 0.0]),
    ],
)
def test_labels_are_the_reward_of_the_rollouts_that_have_them_and_the_others_have_none(run, reward, expected):
    assert rewards(run.rescore(reward)) == expected


def test_a_label_that_is_given_later_counts_in_the_next_rescoring(run):
    run.label("e0/sum-1/1", "good")
    assert rewards(run.rescore(ft.label_reward("good")))[4] == 1.0


def test_a_rollout_that_has_just_been_made_has_no_label(run, tmp_path):
    policy = ScriptedPolicy(lambda messages, seed: "reply")
    again = ft.Run(
        solve, ft.label_reward("good"), sums(2), generations=2, output_dir=tmp_path, adapter=FakeAdapter(policy=policy)
    )
    epoch = ft.run_sync(again.next_epoch())
    assert epoch.metrics.rewards_missing == 4
    again.close()
    fork = run.fork(reward=ft.label_reward("hacked", otherwise=0.5), adapter=FakeAdapter(policy=policy))
    assert ft.run_sync(fork.next_epoch()).metrics.mean_reward == 0.5
    fork.close()


def test_labels_stay_with_rollouts_that_get_them_as_their_reward(tmp_path):
    policy = ScriptedPolicy(lambda messages, seed: f"reply {seed % 1009}")
    run = ft.Run(
        solve, lambda output: None, sums(2), generations=2, output_dir=tmp_path, adapter=FakeAdapter(policy=policy)
    )
    ft.run_sync(run.next_epoch())
    run.label("e0/sum-0/0", "good")
    run.label("e0/sum-0/1", "hacked")
    run.rescore(ft.label_reward({"good": 1, "hacked": 0})).apply()
    epoch = ft.run_sync(run.next_epoch())
    assert epoch.index == 0 and epoch.trained
    frame = run.trajectories(example="sum-0")
    assert frame.reward.tolist() == [1.0, 0.0] and frame.labels.tolist() == [("good",), ("hacked",)]
    run.close()


@pytest.mark.parametrize("tags", ["", [], {}, 3, {"good": "high"}, {"good": math.nan}, [1], None])
def test_tags_that_are_none_are_refused(tags):
    if tags == "":
        ft.label_reward(tags)  # no label has it
        return
    with pytest.raises(ConfigError, match="expected a tag"):
        ft.label_reward(tags)


def test_otherwise_is_a_number():
    with pytest.raises(ConfigError, match="otherwise"):
        ft.label_reward("good", otherwise="no")


# ── a judge against labels ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_judge_is_held_against_the_labels_as_the_run_returns_them(run):
    found = run.agreement(lambda output: 0.5, run.labels())  # the scores of the one tag that has any
    assert dict(zip(found.frame.trajectory, found.frame.label, strict=True)) == {"e0/sum-0/0": 0.5, "e0/sum-1/0": 0.5}
    found = run.agreement(lambda output: 0.0, run.labels(), tags={"good": 1, "hacked": 0})
    assert dict(zip(found.frame.trajectory, found.frame.label, strict=True)) == {
        "e0/sum-0/0": 1.0,
        "e0/sum-0/2": 1.0,
        "e0/sum-1/0": 0.5,
        "e0/sum-0/1": 0.0,
    }
    labels = run.labels()
    assert len(run.agreement(lambda output: 1.0, labels[labels.author == "ann"])) == 1


def test_labels_that_do_not_say_what_counts_are_refused(run):
    labels = run.labels()
    run.label("e0/sum-1/2", "other", score=1)
    for frame, options, said in (
        (run.labels(), {}, "scores of 'good', 'other'; expected those of one tag"),
        (labels[labels.tag == "hacked"], {}, "no label with a score"),
        (labels, {"tags": "never given"}, "no label has one of the tags 'never given'"),
        ({"e0/sum-0/0": 1}, {"tags": "good"}, "leave it out"),
    ):
        with pytest.raises(ConfigError, match=said):
            run.agreement(lambda output: 1.0, frame, **options)
