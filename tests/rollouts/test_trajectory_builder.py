"""Collecting: groups by example, failures as data, rewards that are missing but never zero."""

import asyncio
import math

import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.rollouts.trajectory_builder import EvalTrajectoryBuilder, EvalTrajectoryBuilderConfig, draw_examples
from finetune_nb.testing import ScriptedPolicy, sums
from finetune_nb.types import (
    EpisodeItem,
    EvalInput,
    EvalInputItem,
    EvalOutput,
    EvalOutputItem,
    EvaluationRunOutput,
    IntermediateStep,
)


async def ask(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


async def collect(workflow=ask, reward=lambda item: 1.0, policy=None, rows=3, make=EvalTrajectoryBuilder, **config):
    settings = ft.load_config(
        {
            "workflow": {"_type": "python_function"},
            "eval": {"evaluators": {"reward": {"_type": "python_function"}, "length": {"_type": "python_function"}}},
            "finetuning": {"reward_function": {"name": "reward"}, **config.pop("finetuning", {})},
        }
    )
    async with ft.Builder(settings) as components:
        settings.builder = components
        settings.finetuning.run_configuration = ft.FinetuneRunConfig(config_file=settings)
        components.add("function", "workflow", workflow)
        components.add("evaluator", "reward", reward)
        components.add("evaluator", "length", lambda item: len(str(item.output_obj)))
        components.add("dataset", "train", sums(rows) if isinstance(rows, int) else rows)
        components.add("llm_provider", "policy", PolicyLLM(policy or ScriptedPolicy(), "policy"))
        builder = make(EvalTrajectoryBuilderConfig(**{"num_generations": 2, **config}))
        await builder.initialize(settings.finetuning)
        await builder.start_run("run", {"epoch": 0})
        return await builder.finalize("run", {"epoch": 0})


def rewards(collection):
    return [[t.reward for t in group] for group in collection.trajectories]


async def test_one_group_is_one_example_in_the_order_of_the_dataset():
    collection = await collect()
    assert [[(t.metadata["id"], t.metadata["generation"]) for t in g] for g in collection.trajectories] == [
        [(f"sum-{i}", 0), (f"sum-{i}", 1)] for i in range(3)
    ]
    assert collection.trajectories[0][0].metadata["scores"] == {"reward": 1.0, "length": 2.0}


async def test_one_generation_still_gives_one_group_an_example():
    assert [len(group) for group in (await collect(num_generations=1)).trajectories] == [1, 1, 1]


async def test_a_trajectory_keeps_what_training_needs():
    trajectory = (await collect()).trajectories[0][0]
    user, assistant = trajectory.episode
    assert (user.role, user.logprobs) == ("user", None)
    assert assistant.logprobs == [-1.0, -1.0]
    assert assistant.metadata["token_ids"] == [ord("o"), ord("k")]
    assert assistant.metadata["tokens"] == ["o", "k"]
    assert assistant.metadata["prompt_token_ids"] == [ord(c) for c in f"<user>{user.content}"]
    assert (assistant.metadata["temperature"], assistant.metadata["finish_reason"]) == (1.0, "stop")
    assert trajectory.metadata["policy_version"] == 0


async def test_an_example_in_the_prompt_is_masked_and_no_error():
    async def shots(question, llm):
        messages = [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": question},
        ]
        return (await llm.chat(messages)).content

    episode = (await collect(shots)).trajectories[0][0].episode
    assert [(item.role.value, item.logprobs) for item in episode] == [
        ("user", None),
        ("assistant", []),
        ("user", None),
        ("assistant", [-1.0, -1.0]),
    ]


async def test_turns_of_one_conversation_are_one_episode_and_a_new_one_is_counted():
    async def talk(question, llm):
        messages = [{"role": "user", "content": question}]
        messages += [await llm.chat(messages), {"role": "user", "content": "next"}]
        await llm.chat(messages)
        await llm.chat([{"role": "user", "content": "something else"}])
        return "done"

    episode = (await collect(talk)).trajectories[0][0].episode
    assert [item.content for item in episode][1:] == ["ok", "next", "ok", "something else", "ok"]
    assert [(item.metadata or {}).get("conversation", 0) for item in episode] == [0, 0, 0, 0, 1, 1]


async def test_the_user_may_say_the_same_thing_twice():
    async def talk(question, llm):
        messages = [{"role": "user", "content": "next"}, {"role": "user", "content": "next"}]
        messages += [await llm.chat(messages), {"role": "user", "content": "next"}]
        return (await llm.chat(messages)).content

    episode = (await collect(talk)).trajectories[0][0].episode
    assert [item.content for item in episode] == ["next", "next", "ok", "next", "ok"]


async def test_tool_messages_can_be_left_out():
    async def tools(question, llm):
        messages = [{"role": "user", "content": question}]
        messages += [await llm.chat(messages), {"role": "tool", "tool_call_id": "c", "content": "42"}]
        return (await llm.chat(messages)).content

    with_tools = (await collect(tools)).trajectories[0][0].episode
    without = (await collect(tools, include_tool_calls=False)).trajectories[0][0].episode
    assert [item.role.value for item in with_tools] == ["user", "assistant", "tool", "assistant"]
    assert [item.role.value for item in without] == ["user", "assistant", "assistant"]


async def test_failed_rollouts_are_failures_and_the_rest_stays():
    async def solve(question, llm, item):
        if item.id == "sum-1":
            raise ValueError("no idea")
        return await ask(question, llm)

    collection = await collect(solve)
    assert [group[0].metadata["id"] for group in collection.trajectories] == ["sum-0", "sum-2"]
    assert [(f.example_id, f.generation, f.error) for f in collection.failures] == [
        ("sum-1", 0, "ValueError: no idea"),
        ("sum-1", 1, "ValueError: no idea"),
    ]
    assert "failures" not in collection.model_dump()


async def test_a_workflow_without_a_model_call_has_nothing_to_train_on():
    collection = await collect(lambda question: "42")
    assert collection.trajectories == []
    assert "no model call" in collection.failures[0].error


async def test_a_sampled_turn_without_logprobs_is_a_failure_that_says_so():
    class Silent(PolicyLLM):
        async def _call(self, *args):
            from dataclasses import replace

            return replace(await super()._call(*args), logprobs=None)

    async def solve(question, llm):
        return (await Silent(llm.policy).chat([{"role": "user", "content": question}])).content

    collection = await collect(solve, rows=1, num_generations=1)
    assert collection.failures[0].error.startswith("MissingLogprobs: turn 0")


@pytest.mark.parametrize("value", [None, float("nan"), "good"])
async def test_a_missing_reward_is_nan_with_its_reason_never_zero(value):
    collection = await collect(reward=lambda item: value if item.id == "sum-0" else 0.5)
    first = collection.trajectories[0][0]
    assert math.isnan(first.reward)
    assert "the reward is" in first.metadata["reward_error"]
    assert rewards(collection)[1:] == [[0.5, 0.5]] * 2


async def test_an_overridden_compute_reward_sees_unscored_items_too():
    class Shaped(EvalTrajectoryBuilder):
        async def compute_reward(self, output_item, meta=None):
            return -1.0 if output_item.score is None else output_item.score * 2

    collection = await collect(reward=lambda item: None if item.id == "sum-0" else 0.5, make=Shaped)
    assert rewards(collection) == [[-1.0, -1.0], [1.0, 1.0], [1.0, 1.0]]


async def test_a_compute_reward_that_raises_leaves_a_trajectory_without_reward():
    class Broken(EvalTrajectoryBuilder):
        async def compute_reward(self, output_item, meta=None):
            raise KeyError("shape")

    trajectory = (await collect(make=Broken)).trajectories[0][0]
    assert math.isnan(trajectory.reward)
    assert trajectory.metadata["reward_error"] == "KeyError: 'shape'"


async def test_one_failed_generation_leaves_the_others():
    class Flaky(EvalTrajectoryBuilder):
        runs = 0

        async def run_eval(self):
            self.runs += 1
            if self.runs == 2:
                raise ConnectionError("lost")
            return await super().run_eval()

    collection = await collect(make=Flaky, num_generations=3)
    assert [[t.metadata["generation"] for t in group] for group in collection.trajectories] == [[0, 2]] * 3
    assert [(f.example_id, f.generation, f.error) for f in collection.failures] == [(None, 1, "ConnectionError: lost")]


async def test_all_generations_failing_is_their_error_and_the_run_can_start_again():
    class Broken(EvalTrajectoryBuilder):
        async def run_eval(self):
            raise ConnectionError("lost")

    builder = Broken(EvalTrajectoryBuilderConfig(num_generations=2))
    for _ in range(2):
        await builder.start_run("run")
        with pytest.raises(ConnectionError):
            await builder.finalize("run")
    assert builder.evaluation_runs == {}


async def test_starting_twice_and_finalizing_nothing_are_errors():
    builder = EvalTrajectoryBuilder(EvalTrajectoryBuilderConfig(num_generations=1))
    with pytest.raises(ValueError, match="start_run first"):
        await builder.finalize("run")

    async def never():
        await asyncio.sleep(60)

    builder.run_eval = never
    await builder.start_run("run")
    with pytest.raises(ValueError, match="already in progress"):
        await builder.start_run("run")
    await builder.aclose()
    assert builder.evaluation_runs == {}


async def test_a_misspelt_reward_name_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'reward'"):
        await collect(finetuning={"reward_function": {"name": "rewrad"}})


async def test_target_model_leaves_other_models_out():
    async def two(question, llm):
        judge = PolicyLLM(ScriptedPolicy(lambda messages, seed: "judged"), "judge")
        await judge.chat([{"role": "user", "content": "judge this"}])
        return await ask(question, llm)

    both = (await collect(two)).trajectories[0][0].episode
    assert [item.content for item in both][-1:] == ["ok"]
    assert len(both) == 4
    one = (await collect(two, finetuning={"target_model": "policy"})).trajectories[0][0].episode
    assert [item.role.value for item in one] == ["user", "assistant"]


async def test_an_episode_that_is_too_short_is_a_failure():
    collection = await collect(min_episode_length=3)
    assert "has 2 messages; min_episode_length is 3" in collection.failures[0].error


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_draws_use_the_dataset_up_before_they_repeat():
    drawn = [draw_examples(10, 3, epoch, seed=1) for epoch in range(6)]
    for first in (0, 3):
        used = [i for epoch in range(first, first + 3) for i in drawn[epoch]]
        assert len(set(used)) == 9
    assert drawn[0] != drawn[3]
    assert drawn == [draw_examples(10, 3, epoch, seed=1) for epoch in range(6)]
    assert drawn != [draw_examples(10, 3, epoch, seed=2) for epoch in range(6)]


def test_a_draw_larger_than_the_dataset_is_an_error():
    with pytest.raises(ConfigError, match="examples_per_epoch is 11, but the dataset has 10 rows"):
        draw_examples(10, 11, 0, 0)


async def test_all_generations_of_an_epoch_draw_the_same_examples():
    collection = await collect(rows=12, examples_per_epoch=5, num_generations=3)
    assert [len(group) for group in collection.trajectories] == [3] * 5


# ── steps that someone else recorded ─────────────────────────────────────────────────────────────────────────────────


def foreign_step(payload, **data):
    return IntermediateStep.model_validate(
        {
            "parent_id": "root",
            "function_ancestry": {"function_id": "f", "function_name": "<workflow>"},
            "payload": {"event_type": "LLM_END", "name": "gpt", "data": {**data, "payload": payload}},
        }
    )


async def test_foreign_steps_with_openai_logprobs_become_an_episode():
    logprobs = {"content": [{"token": "4", "logprob": -0.5}, {"token": "2", "logprob": -0.25}]}
    item = EvalInputItem(
        id=1,
        input_obj="q",
        expected_output_obj="42",
        output_obj="42",
        full_dataset_entry={},
        trajectory=[foreign_step({"response_metadata": {"logprobs": logprobs}}, input="what?", output="42")],
    )
    verdict = EvalOutput(average_score=1.0, eval_output_items=[EvalOutputItem(id=1, score=1.0, reasoning="")])
    output = EvaluationRunOutput(
        workflow_output_file=None,
        evaluator_output_files=[],
        workflow_interrupted=False,
        eval_input=EvalInput(eval_input_items=[item]),
        evaluation_results=[("r", verdict)],
    )
    builder = EvalTrajectoryBuilder(EvalTrajectoryBuilderConfig())
    (trajectory,) = (await builder.collect([output], "run")).trajectories[0]
    assert trajectory.episode == [
        EpisodeItem(role="user", content="what?"),
        EpisodeItem(role="assistant", content="42", logprobs=[-0.5, -0.25], metadata=trajectory.episode[1].metadata),
    ]
