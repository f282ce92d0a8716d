"""Preferences out of the rollouts of one example: which pairs, at which turn, and the builder that makes them."""

from __future__ import annotations

import math

import pytest
from small_agents import right

import finetune_nb as ft
from finetune_nb.llms.context import Context
from finetune_nb.rollouts.preferences import (
    Candidate,
    PreferenceBuilder,
    PreferenceBuilderConfig,
    candidate_pairs,
    preference_pairs,
)
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, make_trajectory, sums
from finetune_nb.types import EpisodeItem, IntermediateStepPayload, IntermediateStepType, Trajectory, TTCEventData


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


@pytest.mark.parametrize(
    "setting",
    [{"min_score_diff": -1}, {"max_pairs_per_turn": 0}, {"max_pairs": 0}, {"require_multiple_candidates": False}],
)
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
    builder = PreferenceBuilder(PreferenceBuilderConfig(num_generations=6))
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


# ── candidates of a turn ─────────────────────────────────────────────────────────────────────────────────────────────


def turn(**scores):
    """Candidates of one turn by what they reply."""
    return [Candidate("q", reply, score, n) for n, (reply, score) in enumerate(scores.items())]


def replies(pairs):
    return [better.response + worse.response for better, worse in pairs]


def test_candidates_are_compared_as_the_toolkits_builder_does():
    candidates = turn(a=0.5, b=0.9, c=0.7)
    assert replies(candidate_pairs(candidates)) == ["ba", "bc", "ca"]
    assert replies(candidate_pairs(candidates, exhaustive_pairs=False)) == ["ba"]
    assert replies(candidate_pairs(candidates, min_score_diff=0.3)) == ["ba"]
    assert replies(candidate_pairs(candidates, max_pairs=2)) == ["ba", "bc"]


def test_candidates_that_are_worth_the_same_or_say_the_same_make_no_pair():
    assert candidate_pairs(turn(a=0.5, b=0.5)) == []
    assert candidate_pairs([Candidate("q", "a", 1.0, 0), Candidate("q", "a", 0.0, 1)]) == []
    assert candidate_pairs(turn(a=1.0)) == []


@pytest.fixture
def choosing(tmp_path, closing):
    """Makes a run whose agent chooses twice among candidates that it pushes as steps, and submits its pairs."""

    def push(turn_index, index, text, score, **changes):
        prompt = [{"role": "user", "content": f"turn {turn_index}"}, {"role": "assistant", "content": text}]
        data = {"turn_id": f"t{turn_index}", "turn_index": turn_index, "candidate_index": index, "score": score}
        data |= {"input": prompt, "output": text, **changes}
        for kind, told in (("START", {}), ("END", data)):
            event_type = IntermediateStepType(f"TTC_{kind}")
            payload = IntermediateStepPayload(
                event_type=event_type, name="move", UUID=f"{turn_index}-{index}", data=TTCEventData(**told)
            )
            Context.get().intermediate_step_manager.push_intermediate_step(payload)

    async def choose(question, llm):
        if question == "1+1":
            raise RuntimeError("no answer")
        for turn_index in range(2):
            for index, (text, score) in enumerate([("bad", 0.25), ("good", 1.0), ("fair", 0.5)]):
                push(turn_index, index, text, score)
        push(2, 0, "alone", 1.0)
        push(3, 0, "unscored", None)
        return (await llm.chat([{"role": "user", "content": question}])).content

    def make(generations=1, **settings):
        adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "2"))
        config = PreferenceBuilderConfig(num_generations=generations, ttc_step_name="move", **settings)
        rows = sums(3)
        rows[1] = {**rows[1], "question": "1+1"}
        run = closing(
            ft.Run(choose, right, rows, builder=PreferenceBuilder(config), adapter=adapter, output_dir=tmp_path)
        )
        return run, adapter

    return make


async def test_the_candidates_of_each_turn_make_pairs_that_know_their_example_and_generation(choosing):
    run, adapter = choosing(max_pairs_per_turn=2, deduplicate_pairs=False)
    epoch = await run.next_epoch()
    (submitted,) = adapter.submitted
    first, last = submitted.trajectories
    assert said(first) == [("good", "bad", 0.75), ("good", "fair", 0.5)] * 2
    assert [m.model_dump() for m in first[0].episode[0].prompt] == [{"role": "user", "content": "turn 0"}]
    known = first[2].metadata
    assert (known["turn_id"], known["chosen_score"], known["rejected_score"]) == ("t1", 1.0, 0.25)
    assert (known["chosen_index"], known["rejected_index"], known["policy_version"]) == (1, 0, 0)
    assert [failure.error for failure in epoch.collection.failures] == ["RuntimeError: no answer"]
    frame = run.trajectories()
    pairs = frame[frame.error.isna()]
    assert set(pairs.example) == {first[0].metadata["id"], last[0].metadata["id"]}
    assert set(pairs.generation) == {0}


async def test_pairs_that_say_the_same_are_kept_once_and_the_better_score_may_be_the_reward(choosing):
    run, adapter = choosing(generations=2, reward_from_score_diff=False, min_score_diff=0.5)
    await run.next_epoch()
    (submitted,) = adapter.submitted
    assert [said(group) for group in submitted.trajectories] == [
        [("good", "bad", 1.0), ("good", "fair", 1.0), ("good", "bad", 1.0), ("good", "fair", 1.0)]
    ]


async def test_of_more_pairs_than_max_pairs_the_seed_draws(choosing):
    drawn = []
    for _ in range(2):
        run, adapter = choosing(deduplicate_pairs=False, max_pairs=5)
        await run.next_epoch()
        drawn.append([said(group) for group in adapter.submitted[0].trajectories])
    assert sum(map(len, drawn[0])) == 5
    assert drawn[0] == drawn[1]
