"""Preferences out of the rollouts of one example: which pairs, at which turn, and the builder that makes them."""

from __future__ import annotations

import math

import pytest
from small_agents import right

import finetune_nb as ft
from finetune_nb.rollouts.preferences import PreferenceBuilder, PreferenceBuilderConfig, preference_pairs
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, make_trajectory, sums
from finetune_nb.types import EpisodeItem, Trajectory


def group(**rewards):
    """Rollouts of one question by what they reply."""
    return [make_trajectory(reward, "q", n, reply=reply) for n, (reply, reward) in enumerate(rewards.items())]


def said(pairs):
    return [(t.episode[0].chosen_response, t.episode[0].rejected_response, t.reward) for t in pairs]


def turns(*texts, reward=0.0, sampled=True):
    """user, assistant, user, ..."""
    return Trajectory(
        episode=[
            EpisodeItem(role="user", content=text)
            if n % 2 == 0
            else EpisodeItem(role="assistant", content=text, logprobs=[-1.0] if sampled else [])
            for n, text in enumerate(texts)
        ],
        reward=reward,
        metadata={"id": "q"},
    )


def test_best_against_worst_is_one_pair():
    (pair,) = preference_pairs(group(a=0.5, b=1.0, c=0.0))
    assert said([pair]) == [("b", "c", 1.0)]
    assert pair.episode[0].prompt[0].model_dump() == {"role": "user", "content": "q"}
    known = pair.metadata
    assert (known["chosen_reward"], known["rejected_reward"], known["generation"], known["rejected_generation"]) == (
        1,
        0,
        1,
        2,
    )


def test_all_pairs_come_with_the_largest_difference_first_up_to_the_cap():
    rollouts = group(a=0.0, b=0.4, c=1.0)
    assert said(preference_pairs(rollouts, "all_pairs")) == [("c", "a", 1.0), ("c", "b", 0.6), ("b", "a", 0.4)]
    assert len(preference_pairs(rollouts, "all_pairs", max_pairs=2)) == 2


def test_pairs_need_a_difference_of_finite_rewards():
    assert preference_pairs(group(a=1.0, b=1.0), "all_pairs") == []
    assert preference_pairs(group(a=1.0, b=0.9), min_reward_difference=0.2) == []
    assert said(preference_pairs(group(a=math.nan, b=1.0, c=0.5, d=math.inf))) == [("b", "c", 0.5)]
    assert preference_pairs(group(a=1.0)) == preference_pairs([]) == []


def test_the_same_two_responses_make_one_pair_also_the_other_way_round():
    rollouts = [
        make_trajectory(r, "q", n, reply=t) for n, (t, r) in enumerate([("a", 1), ("b", 0), ("b", 0.9), ("a", 0.2)])
    ]
    assert said(preference_pairs(rollouts, "all_pairs")) == [("a", "b", 1.0)]
    same = [make_trajectory(r, "q", n, reply="a") for n, r in enumerate([0.0, 1.0])]
    assert preference_pairs(same, "all_pairs") == []


def test_rollouts_are_compared_at_the_turn_where_they_part():
    (pair,) = preference_pairs([turns("q", "look", "seen", "yes", reward=1.0), turns("q", "look", "seen", "no")])
    assert [message.content for message in pair.episode[0].prompt] == ["q", "look", "seen"]
    assert said([pair]) == [("yes", "no", 1.0)]


def test_rollouts_that_part_where_the_policy_did_not_speak_make_no_pair():
    assert preference_pairs([turns("q", "a", "rain", "x", reward=1.0), turns("q", "a", "sun", "y")]) == []
    assert preference_pairs([turns("q", "a", reward=1.0, sampled=False), turns("q", "b", sampled=False)]) == []
    assert preference_pairs([turns("p", "a", reward=1.0), turns("q", "b")]) == []


def test_a_tool_call_is_compared_by_what_the_policy_wrote():
    def call(text, reward):
        found = make_trajectory(reward, "q", reply=text)
        found.episode[1].content = ""
        found.episode[1].metadata |= {"tool_calls": [{}], "tokens": [*text, "<end>"], "finish_reason": "stop"}
        return found

    assert said(preference_pairs([call(">1+2", 1.0), call(">2+1", 0.0)])) == [(">1+2", ">2+1", 1.0)]


@pytest.mark.parametrize("setting", [{"min_reward_difference": 0}, {"max_pairs_per_example": 0}, {"pairs": "some"}])
def test_settings_have_bounds(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PreferenceBuilderConfig(**setting)


async def test_a_run_hands_its_pairs_to_the_adapter(tmp_path, closing, caplog):
    async def solve(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    def script(messages, seed):
        a, b = messages[0]["content"].split("+")
        return str(int(a) + int(b) + (seed % 3 if a != "6" else 0))

    adapter = FakeAdapter(policy=ScriptedPolicy(script))
    builder = PreferenceBuilder(PreferenceBuilderConfig(num_generations=6, pairs="all_pairs"))
    run = closing(ft.Run(solve, right, sums(4), builder=builder, adapter=adapter, output_dir=tmp_path))
    epoch = await run.next_epoch()
    (submitted,) = adapter.submitted
    pairs = [t for g in submitted.trajectories for t in g]
    assert pairs
    for pair in pairs:
        (item,) = pair.episode
        a, b = item.prompt[0].content.split("+")
        assert int(item.chosen_response) == int(a) + int(b)
        assert item.rejected_response != item.chosen_response
        assert pair.reward == 1.0
    assert epoch.job.status == "completed"
    assert "chosen" in run.show(epoch=0)._repr_html_() if hasattr(run, "show") else True
    assert ft.Run.open(run.folder)[0].collection.trajectories[0][0].episode == submitted.trajectories[0][0].episode
