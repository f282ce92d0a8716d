"""The public fakes do what they stand in for: other people's tests rest on them."""

from __future__ import annotations

import asyncio
import inspect

import pytest

import finetune_nb as ft
from finetune_nb.interfaces import Policy
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, make_trajectory, sums
from finetune_nb.types import EpisodeKey, SamplingParams

QUESTION = [{"role": "user", "content": "3+4"}]


def collection(*groups: list[ft.Trajectory]) -> ft.TrajectoryCollection:
    return ft.TrajectoryCollection(trajectories=list(groups), run_id="run")


# ── ScriptedPolicy ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_scripted_policy_has_every_method_of_a_policy_with_its_parameters():
    wanted = {name: method for name, method in vars(Policy).items() if inspect.isfunction(method) and name[0] != "_"}
    assert wanted.keys() == {"render", "sample", "parse", "tokens", "encode", "decode", "episode"}
    for name, method in wanted.items():
        found = getattr(ScriptedPolicy, name)
        assert inspect.iscoroutinefunction(found) == inspect.iscoroutinefunction(method), name
        parameters, expected = ([*inspect.signature(f).parameters.values()] for f in (found, method))
        more = parameters[len(expected) :]  # what a policy may take beyond the protocol
        assert [(p.name, p.default) for p in more] == ([("version", None)] if name == "sample" else []), name
        parameters = parameters[: len(expected)]
        assert [(p.name, p.default) for p in parameters] == [(p.name, p.default) for p in expected], name
    assert ScriptedPolicy().version == 0


async def test_a_scripted_policy_says_what_the_script_says():
    policy = ScriptedPolicy(lambda messages, seed: f"{messages[-1]['content']}={seed}")
    ids = policy.render(QUESTION)
    sample = await policy.sample(ids, SamplingParams(), seed=7)
    assert policy.parse(sample.ids) == {"role": "assistant", "content": "3+4=7"}
    assert "".join(policy.tokens(sample.ids)) == "3+4=7"
    assert sample.logprobs == [-1.0] * len(sample.ids)
    assert await policy.sample(ids, SamplingParams(), seed=7) == sample


async def test_a_scripted_policy_carries_on_behind_the_ids_it_sampled():
    policy = ScriptedPolicy()
    ids = policy.render(QUESTION)
    sample = await policy.sample(ids, SamplingParams(), seed=0)
    previous = [*ids, *sample.ids]
    messages = [*QUESTION, policy.parse(sample.ids), {"role": "user", "content": "sure?"}]
    carried_on = policy.render(messages, None, previous)
    assert carried_on[: len(previous)] == previous
    assert "".join(map(chr, carried_on[len(previous) :])) == "<user>sure?"


async def test_a_reply_longer_than_allowed_is_cut_and_its_finish_reason_says_so():
    policy = ScriptedPolicy(lambda messages, seed: "12345678")
    ids = policy.render(QUESTION)
    cut = await policy.sample(ids, SamplingParams(max_tokens=3), seed=0)
    assert (policy.parse(cut.ids)["content"], cut.finish_reason) == ("123", "length")
    whole = await policy.sample(ids, SamplingParams(max_tokens=8), seed=0)
    assert (policy.parse(whole.ids)["content"], whole.finish_reason) == ("12345678", "stop")


def test_live_episodes_are_counted_also_where_a_rollout_raises():
    policy, key = ScriptedPolicy(), EpisodeKey("train", 0, 0, 0)

    def rollout():
        with policy.episode(key):
            assert policy.live == {key}
            raise LookupError

    with pytest.raises(LookupError):
        rollout()
    assert policy.live == set()


# ── FakeAdapter ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("outcome", "version"), [("completed", 1), ("failed", 0), ("canceled", 0)])
async def test_a_job_runs_and_then_ends_as_told(outcome, version):
    adapter = FakeAdapter(outcome=outcome, delay=0.05, message="as told")
    ref = await adapter.submit(collection([make_trajectory(1.0)]))
    assert (await adapter.status(ref)).status == "running"
    assert adapter.policy.version == 0
    status = await adapter.wait_until_complete(ref)
    assert (status.status, status.message, status.run_id) == (outcome, "as told", "run")
    assert [await adapter.status(ref) for _ in range(3)] == [status] * 3
    assert adapter.policy.version == version
    assert bool(status.metadata) == (outcome == "completed")


async def test_every_job_has_its_own_id_and_status():
    adapter = FakeAdapter(delay=0.05)
    first, second = [await adapter.submit(collection([make_trajectory(1.0)])) for _ in range(2)]
    assert first.metadata["job_id"] != second.metadata["job_id"]
    await adapter.cancel(first)
    assert (await adapter.wait_until_complete(first)).status == "canceled"
    assert (await adapter.wait_until_complete(second)).status == "completed"
    assert adapter.policy.version == 1
    assert len(adapter.submitted) == 2


async def test_closing_cancels_what_runs_and_leaves_what_has_ended():
    adapter = FakeAdapter()
    ended = await adapter.submit(collection([make_trajectory(1.0)]))
    await adapter.wait_until_complete(ended)
    adapter.delay = 60
    running = await adapter.submit(collection([make_trajectory(1.0)]))
    await asyncio.wait_for(adapter.aclose(), 2)
    assert (await adapter.status(running)).status == "canceled"
    assert (await adapter.status(ended)).status == "completed"


async def test_a_job_that_is_not_there_is_an_error_of_its_kind():
    adapter = FakeAdapter()
    ref = ft.TrainingJobRef(run_id="run", backend="fake", metadata={"job_id": "elsewhere"})
    for ask in (adapter.status, adapter.wait_until_complete, adapter.cancel):
        with pytest.raises(ft.UnknownJob, match="elsewhere"):
            await ask(ref)


async def test_an_unhealthy_adapter_says_so():
    assert await FakeAdapter().is_healthy()
    assert not await FakeAdapter(healthy=False).is_healthy()


def test_an_outcome_that_is_no_status_is_refused():
    with pytest.raises(ValueError, match="exploded"):
        FakeAdapter(outcome="exploded")


# ── ScriptedBuilder, datasets ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_scripted_builder_deals_out_rewards_by_example_and_failures_for_none():
    builder = ScriptedBuilder(lambda epoch: {"a": [0, 1], "b": [None, 0.5], "c": [None]} if epoch == 4 else {})
    await builder.start_run("run", {"epoch": 4})
    dealt = await builder.finalize("run", {"epoch": 4})
    found = [[(t.metadata["id"], t.metadata["generation"], t.reward) for t in group] for group in dealt.trajectories]
    assert found == [[("a", 0, 0), ("a", 1, 1)], [("b", 1, 0.5)]]
    assert [(f.example_id, f.generation) for f in dealt.failures] == [("b", 0), ("c", 0)]
    assert (await builder.finalize("run", {"epoch": 5})).trajectories == []


def test_a_made_trajectory_is_one_that_can_be_trained_on():
    question, answer = make_trajectory(0.5, "q1", 3, reply="seven", policy_version=2).episode
    assert (question.content, answer.content) == ("q1", "seven")
    assert len(answer.logprobs) == len(answer.metadata["token_ids"]) == 5
    assert make_trajectory(0.5, policy_version=2).metadata["policy_version"] == 2


def test_sums_are_right_and_repeatable():
    rows = sums(20, seed=3)
    assert rows == sums(20, seed=3) != sums(20, seed=4)
    assert len({row["id"] for row in rows}) == 20
    for row in rows:
        a, b = row["question"].split("+")
        assert int(row["answer"]) == int(a) + int(b)
