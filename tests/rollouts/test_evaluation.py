"""The evaluation run: every callable is a workflow, whatever goes wrong in a rollout stays in it."""

import asyncio
import threading
import time

import pytest

from finetune_nb.components.builder import Builder
from finetune_nb.components.loading import load_config
from finetune_nb.errors import WorkflowError
from finetune_nb.llms.call_recorder import CallRecorder, current_episode
from finetune_nb.llms.client import ChatReply, PolicyLLM
from finetune_nb.rollouts.evaluation import (
    EvaluationContext,
    EvaluationRun,
    Progress,
    dataset_of,
    evaluation_context,
    progress,
)
from finetune_nb.rollouts.executor import LocalExecutor
from finetune_nb.rollouts.workflow import Workflow
from finetune_nb.testing import ScriptedPolicy, sums
from finetune_nb.types import EpisodeKey, EvalInputItem, EvaluationRunConfig, LLMCall, RolloutRequest


def item(**row):
    row = {"id": "a", "question": "3+4", "answer": "7", **row}
    return EvalInputItem(
        id=row["id"], input_obj=row["question"], expected_output_obj=row["answer"], full_dataset_entry=row
    )


async def evaluate(workflow, rows=4, reward=lambda item: 1.0, policy=None, **general):
    config = load_config(
        {
            "workflow": {"_type": "python_function"},
            "eval": {"general": general, "evaluators": {"reward": {"_type": "python_function"}}},
        }
    )
    async with Builder(config) as builder:
        config.builder = builder
        builder.add("function", "workflow", workflow)
        builder.add("evaluator", "reward", reward)
        builder.add("dataset", "train", sums(rows) if isinstance(rows, int) else rows)
        if policy is not None:
            builder.add("llm_provider", "policy", PolicyLLM(policy))
        return await EvaluationRun(EvaluationRunConfig(config_file=config)).run_and_evaluate()


def outputs(result):
    return [item.output_obj for item in result.eval_input.eval_input_items]


def scores(result):
    return [verdict.score for verdict in result.evaluation_results[0][1].eval_output_items]


# ── calling workflows ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_parameters_are_filled_by_name():
    async def solve(question, item, level, extra="default"):
        return question, item.id, level, extra

    assert await Workflow(solve)(item(level=3)) == ("3+4", "a", 3, "default")


async def test_a_single_parameter_gets_the_question_whatever_its_name():
    assert await Workflow(lambda text: text.upper())(item(question="abc")) == "ABC"


async def test_keyword_catch_all_gets_the_row():
    async def solve(question, **row):
        return row["level"]

    assert await Workflow(solve)(item(level=3)) == 3


async def test_callable_objects_sync_and_async_are_workflows():
    class Sync:
        def __call__(self, question):
            return question + "!"

    class Async:
        async def __call__(self, question):
            return question + "?"

    assert await Workflow(Sync())(item()) == "3+4!"
    assert await Workflow(Async())(item()) == "3+4?"


async def test_an_unknown_parameter_names_the_columns():
    async def solve(question, levle):
        return question

    with pytest.raises(WorkflowError, match="Did you mean 'level'"):
        Workflow(solve).check([item(level=3)])


async def test_a_workflow_that_wants_an_llm_where_there_is_none_is_told():
    async def solve(question, llm):
        return question

    with pytest.raises(WorkflowError, match="names no llm"):
        await Workflow(solve)(item())


async def test_a_sync_workflow_leaves_the_event_loop_free():
    main = threading.get_ident()

    def solve(question):
        time.sleep(0.1)
        return threading.get_ident() != main

    beats = 0

    async def heart():
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    task = asyncio.create_task(heart())
    assert await Workflow(solve)(item()) is True
    task.cancel()
    assert beats >= 4


async def test_a_sync_workflow_talks_to_the_policy_with_a_blocking_chat():
    def solve(question, llm):
        return llm.chat([{"role": "user", "content": question}]).content

    result = await evaluate(solve, policy=ScriptedPolicy(lambda messages, seed: messages[0]["content"] + "?"))
    assert outputs(result) == [row["question"] + "?" for row in sums(4)]


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_workflow_that_raises_leaves_the_others():
    async def solve(question, item):
        if item.id == "sum-1":
            raise ValueError("no idea")
        return "ok"

    result = await evaluate(solve)
    assert outputs(result) == ["ok", None, "ok", "ok"]
    (failure,) = result.failures
    assert (failure.example_id, failure.error) == ("sum-1", "ValueError: no idea")
    assert len(scores(result)) == 3  # no evaluator sees it


@pytest.mark.parametrize("bad", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError("inside")])
async def test_not_even_an_exit_takes_the_run_down(bad):
    async def solve(question, item):
        if item.id == "sum-0":
            raise bad
        return "ok"

    result = await asyncio.wait_for(evaluate(solve), 5)
    assert outputs(result)[1:] == ["ok"] * 3
    assert type(bad).__name__ in result.failures[0].error


async def test_a_workflow_that_returns_nothing_is_a_failure():
    result = await evaluate(lambda question: None, rows=1)
    assert "returned nothing" in result.failures[0].error


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_workflow_that_hangs_is_timed_out(kind):
    if kind == "async":

        async def solve(question, item):
            await asyncio.sleep(60 if item.id == "sum-0" else 0)
            return "ok"

    else:

        def solve(question, item):
            time.sleep(1.0 if item.id == "sum-0" else 0)
            return "ok"

    started = time.monotonic()
    result = await evaluate(solve, item_timeout=0.2)
    assert time.monotonic() - started < 0.9
    assert outputs(result)[1:] == ["ok"] * 3
    assert result.failures[0].error.startswith("RolloutTimeout: no answer after 0.2 s")


async def test_a_row_without_its_question_is_a_failure_that_names_the_columns():
    result = await evaluate(lambda question: "ok", rows=[{"id": 1, "question": None, "answer": 2}, *sums(1)])
    assert outputs(result) == [None, "ok"]
    assert "no question. Its columns: id, question, answer" in result.failures[0].error


async def test_transient_failures_are_tried_again_and_others_are_not():
    tries = {"sum-0": 0, "sum-1": 0}

    async def solve(question, item):
        tries[item.id] += 1
        if item.id == "sum-0" and tries[item.id] < 3:
            raise ConnectionError("gone")
        if item.id == "sum-1":
            raise ValueError("wrong")
        return "ok"

    result = await evaluate(solve, rows=2, retries=2)
    assert tries == {"sum-0": 3, "sum-1": 1}
    assert outputs(result) == ["ok", None]


# ── evaluators ───────────────────────────────────────────────────────────────────────────────────────────────────────


def raises(item):
    raise RuntimeError("broken reward")


@pytest.mark.parametrize(
    ("reward", "error"),
    [
        (raises, "RuntimeError: broken reward"),
        (lambda item: None, "the reward is None"),
        (lambda item: "good", "the reward is 'good'"),
        (lambda item: float("nan"), "the reward is NaN"),
        (lambda item: {1.0}, "of type set"),
        (lambda item: [1.0, None], "turn 1: the reward is None"),
        (lambda item: {"a": 1.0, "b": None}, "b: the reward is None"),
        (lambda item: {}, "an empty dict"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_reward_that_is_no_number_is_no_score(reward, error, asynchronous):
    async def later(item):
        return reward(item)

    result = await evaluate(lambda question: "ok", rows=2, reward=later if asynchronous else reward)
    verdicts = result.evaluation_results[0][1].eval_output_items
    assert [v.score for v in verdicts] == [None, None]
    assert all(error in v.error for v in verdicts)
    assert result.evaluation_results[0][1].average_score is None


async def test_infinite_rewards_numpy_numbers_and_booleans_stay():
    import numpy as np

    values = iter([float("inf"), np.float32(0.5), True, 2])
    result = await evaluate(lambda question: "ok", reward=lambda item: next(values))
    assert scores(result) == [float("inf"), 0.5, 1.0, 2.0]


async def test_a_slow_sync_reward_leaves_the_event_loop_free():
    late = []

    async def heart():
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            late.append(time.monotonic() - before)

    task = asyncio.create_task(heart())
    await evaluate(lambda question: "ok", rows=1, reward=lambda item: time.sleep(0.8) or 1.0)
    task.cancel()
    assert max(late) < 0.6  # a busy machine may hold it up for a while by itself


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_type": "exact_match"}, [1.0, 0.0]),
        ({"_type": "numeric_closeness", "scale": 2.0}, [1.0, 0.5]),
        ({"_type": "numeric_closeness"}, [1.0, 0.0]),
        ({"_type": "contains"}, [1.0, 0.0]),
        ({"_type": "regex", "pattern": "^[78]$"}, [1.0, 1.0]),
        ({"_type": "weighted", "weights": {"a": 0.25, "b": 0.75}}, [1.0, 0.75]),
    ],
)
async def test_built_in_evaluators(config, expected):
    settings = load_config(
        {
            "workflow": {"_type": "python_function"},
            "eval": {
                "evaluators": {"x": config, "a": {"_type": "exact_match"}, "b": {"_type": "regex", "pattern": "8|7"}}
            },
        }
    )
    async with Builder(settings) as builder:
        settings.builder = builder
        builder.add("function", "workflow", lambda item: "7" if item.id == 0 else "8")
        builder.add("dataset", "train", [{"id": i, "question": "3+4", "answer": "7"} for i in (0, 1)])
        result = await EvaluationRun(EvaluationRunConfig(config_file=settings)).run_and_evaluate()
    assert [v.score for v in dict(result.evaluation_results)["x"].eval_output_items] == expected


# ── concurrency ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_bound_on_concurrency_holds_over_all_maps():
    executor, running, most = LocalExecutor(3), 0, 0

    async def rollout(request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return request

    requests = [RolloutRequest(EpisodeKey("train", 0, n, 0), item()) for n in range(8)]
    results = await asyncio.gather(executor.map(rollout, requests), executor.map(rollout, requests[::-1]))
    assert most == 3
    assert results[0] == requests
    assert results[1] == requests[::-1]


async def test_cancelling_one_map_leaves_the_other():
    executor, ended = LocalExecutor(2), []

    async def rollout(request):
        await asyncio.sleep(0.05)
        ended.append(request.key.epoch)
        return request

    def requests(epoch):
        return [RolloutRequest(EpisodeKey("train", epoch, n, 0), item()) for n in range(4)]

    first = asyncio.create_task(executor.map(rollout, requests(0)))
    second = asyncio.create_task(executor.map(rollout, requests(1)))
    await asyncio.sleep(0.02)
    first.cancel()
    assert len(await asyncio.wait_for(second, 2)) == 4
    assert ended == [1, 1, 1, 1]
    assert first.cancelled()


async def test_progress_counts_rollouts_and_failures():
    meter = Progress()
    progress.set(meter)

    async def solve(question, item):
        if item.id == "sum-2":
            raise ValueError
        return "ok"

    await evaluate(solve, rows=5)
    assert (meter.done, meter.failed, meter.total) == (5, 1, 5)


# ── recording ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_call_is_recorded_exactly_and_the_next_turn_stands_on_its_ids():
    async def solve(question, llm):
        messages = [{"role": "user", "content": question}]
        reply = await llm.chat(messages)
        messages += [reply, {"role": "user", "content": "sure?"}]
        return (await llm.chat(messages, temperature=0.5, max_tokens=3)).content

    result = await evaluate(solve, rows=1, policy=ScriptedPolicy(lambda messages, seed: f"turn {len(messages)}"))
    first, second = (step.data.payload for step in result.eval_input.eval_input_items[0].trajectory)
    assert isinstance(first, LLMCall)
    assert (first.sequence, second.sequence) == (0, 1)
    assert first.reply["content"] == "turn 1"
    assert "".join(first.tokens) == "turn 1"
    assert second.reply["content"] == "tur"
    assert second.sampling.temperature == 0.5
    assert second.prompt_ids[: len(first.prompt_ids) + len(first.response_ids)] == first.prompt_ids + first.response_ids
    assert first.exact
    assert first.policy_version == 0


async def test_seeds_depend_on_run_episode_and_turn_alone():
    def seeds(seed, *key):
        episode = CallRecorder(EpisodeKey(*key), seed)
        return [episode.next_call()[1] for _ in range(3)]

    base = seeds(0, "train", 1, 2, 3)
    assert base == seeds(0, "train", 1, 2, 3)
    others = [seeds(1, "train", 1, 2, 3), seeds(0, "validation", 1, 2, 3), seeds(0, "train", 2, 2, 3)]
    assert len({*base, *(s for other in others for s in other)}) == 12


async def test_concurrent_episodes_each_record_their_own_calls():
    async def solve(question, llm):
        await asyncio.gather(*(llm.chat([{"role": "user", "content": f"{question} {n}"}]) for n in range(3)))
        return current_episode().key.example

    result = await evaluate(solve, policy=ScriptedPolicy(), rows=6, max_concurrency=6)
    assert outputs(result) == list(range(6))
    for row, done in zip(sums(6), result.eval_input.eval_input_items, strict=True):
        asked = [step.data.payload.messages[0]["content"] for step in done.trajectory]
        assert asked == [f"{row['question']} {n}" for n in range(3)]


async def test_an_unknown_sampling_parameter_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'temperature'"):
        await PolicyLLM(ScriptedPolicy()).chat([{"role": "user", "content": "x"}], temprature=1)


async def test_a_message_without_a_role_is_refused():
    with pytest.raises(TypeError, match="a dict with a role"):
        await PolicyLLM(ScriptedPolicy()).chat(["x"])


async def test_tool_calls_are_parsed_and_bad_arguments_are_empty():
    class Caller(ScriptedPolicy):
        def parse(self, ids):
            function = {"name": "f", "arguments": "".join(map(chr, ids))}
            return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    for text, arguments in (('{"a": 1}', {"a": 1}), ("{oops", {}), ("[1]", {})):
        reply = await PolicyLLM(Caller(lambda messages, seed, text=text: text)).chat([{"role": "user", "content": "x"}])
        assert isinstance(reply, ChatReply)
        assert reply.tool_calls[0].arguments == arguments
        assert reply.tool_calls[0].id == "call_0_0"


async def test_context_draws_rows_and_names_the_generation():
    evaluation_context.set(EvaluationContext("train", 4, 2, draw=lambda rows: [len(rows) - 1, 0]))

    async def solve(question):
        return current_episode().key

    result = await evaluate(solve, rows=5)
    assert outputs(result) == [EpisodeKey("train", 4, 0, 2), EpisodeKey("train", 4, 1, 2)]
    assert [done.id for done in result.eval_input.eval_input_items] == ["sum-4", "sum-0"]


async def test_rows_become_items_once_for_all_generations_and_epochs_until_they_or_their_columns_change():
    config = load_config(
        {"workflow": {"_type": "python_function"}, "eval": {"general": {"dataset": {"_type": "json"}}}}
    )
    async with Builder(config) as builder:
        builder.add("dataset", "train", sums(3))
        first = dataset_of(config, builder)
        assert dataset_of(config, builder, "train") is first and [each.id for each in first] == [
            "sum-0",
            "sum-1",
            "sum-2",
        ]
        config.eval.general.dataset.structure.question_key = "answer"
        assert dataset_of(config, builder)[0].input_obj == first[0].expected_output_obj
        builder.add("dataset", "train", sums(4))
        assert len(dataset_of(config, builder)) == 4
