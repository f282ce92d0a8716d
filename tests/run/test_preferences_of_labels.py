"""Preferences from what people say of recorded rollouts."""

import pytest
from factories import item, make_epoch
from records import Views, epoch_of, failed

import finetune_nb as ft
from finetune_nb.errors import ConfigError, RunError
from finetune_nb.types import Trajectory


def rollout(reply, example, generation, reward=0.0):
    episode = [item("user", f"question {example}"), item("assistant", reply, logprobs=[-1.0])]
    return Trajectory(episode=episode, reward=reward, metadata={"id": example, "generation": generation})


RUN = Views(
    epoch_of(
        [[rollout("a0", "a", 0, 1.0), rollout("a1", "a", 1, 0.5)], [rollout("b0", "b", 0), rollout("b1", "b", 1)]]
    ),
    epoch_of([[rollout("a2", "a", 0), rollout("a1", "a", 1)]], 1),
)


def responses(collection):
    found = []
    for group in collection.trajectories:
        for pair in group:
            (one,) = pair.episode
            found.append(
                (one.chosen_response, one.rejected_response, pair.metadata["chosen"], pair.metadata["rejected"])
            )
    return found


def test_the_better_labelled_rollout_of_an_example_is_chosen_also_across_epochs():
    pairs = RUN.preferences({"e0/a/0": 0, "e1/a/0": 1, "e0/b/0": 1, "e0/b/1": 0.5})
    assert responses(pairs) == [("a2", "a0", "e1/a/0", "e0/a/0"), ("b0", "b1", "e0/b/0", "e0/b/1")]
    (first,) = pairs.trajectories[0]
    assert (first.metadata["id"], first.metadata["chosen_reward"], first.metadata["rejected_reward"]) == ("a", 1.0, 0.0)
    assert first.episode[0].prompt[0].content == "question a" and first.reward == 1.0


def test_all_pairs_are_made_and_the_widest_come_first():
    values = {"e0/a/0": 0, "e0/a/1": 0.25, "e1/a/0": 1}
    found = responses(RUN.preferences(values, pairs="all_pairs"))
    assert [(chosen, rejected) for chosen, rejected, *_ in found] == [("a2", "a0"), ("a2", "a1"), ("a1", "a0")]
    assert len(responses(RUN.preferences(values, pairs="all_pairs", max_pairs_per_example=1))) == 1


def test_rewards_are_preferences_too():
    assert responses(RUN.preferences(RUN.trajectories(epoch=0))) == [("a0", "a1", "e0/a/0", "e0/a/1")]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"e0/a/0": 1}, "1 rollout of 1 example make no preference"),
        ({"e0/a/0": 1, "e0/b/0": 0}, "no preference"),
        ({"e0/a/0": 1, "e0/a/1": 1}, "no preference"),
        ({"e0/a/1": 1, "e1/a/1": 0}, "no preference"),  # both say the same
        ({"e0/a": 1, "e0/a/0": 0}, "the name of a group"),
        ({"e0": 1}, "the name of an epoch"),
        ({"e0/a/7": 1}, "has the generations 0, 1"),
    ],
)
def test_labels_that_make_no_pair_are_an_error(values, said):
    with pytest.raises(RunError, match=said):
        RUN.preferences(values)


def test_a_failed_rollout_makes_no_preference():
    run = Views(make_epoch({"q0": [1.0, 0.0]}, failures=[failed("q0")]))
    with pytest.raises(RunError, match="'e0/q0/9' failed"):
        run.preferences({"e0/q0/0": 1, "e0/q0/9": 0})


def test_labels_of_the_run_s_own_folder_are_the_default(tmp_path):
    from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

    async def solve(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    policy = ScriptedPolicy(lambda messages, seed: f"reply {seed}")
    adapter = FakeAdapter(policy=policy)
    run = ft.Run(solve, lambda item: 1.0, sums(2), generations=2, output_dir=tmp_path, adapter=adapter)
    ft.run_sync(run.next_epoch())
    with pytest.raises(ConfigError, match="no label with a score"):
        run.preferences()
    run.label("e0/sum-0/0", "bad")
    run.label("e0/sum-0/1", "good")
    (pair,) = responses(run.preferences(tags={"good": 1, "bad": 0}))
    assert pair[2:] == ("e0/sum-0/1", "e0/sum-0/0")
    run.close()
