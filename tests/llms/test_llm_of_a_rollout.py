"""The llm that a workflow gets belongs to its rollout: in threads, on other event loops, and after the rollout's end."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import finetune_nb as ft
from finetune_nb.errors import RunError
from finetune_nb.llms.call_recorder import CallRecorder, current_episode
from finetune_nb.llms.client import LLM, PolicyLLM, RolloutLLM, SyncLLM
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.types import EpisodeKey, SamplingParams


def messages_of(question):
    return [{"role": "user", "content": question}]


class Slow(ScriptedPolicy):
    """Rollouts overlap while it samples."""

    async def sample(self, ids, params, seed):
        await asyncio.sleep(0.01)
        return await super().sample(ids, params, seed)


@pytest.fixture
def run_of(tmp_path, closing):
    """A run of 4 rows, 2 generations each, whose model answers with the question that it was asked."""

    def make(workflow, **options):
        adapter = FakeAdapter(policy=Slow(lambda messages, seed: "to " + messages[0]["content"]))
        return closing(
            ft.Run(workflow, lambda item: 1.0, sums(4), generations=2, output_dir=tmp_path, adapter=adapter, **options)
        )

    return make


pool = ThreadPoolExecutor(4)
"""Threads that know no rollout."""


async def by_executor_and_asyncio_run(question, llm):
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, lambda: asyncio.run(llm.chat(messages_of(question))).content)


async def by_a_shared_pool(question, llm):
    asked = pool.submit(lambda: asyncio.run(llm.chat(messages_of(question))).content)
    return await asyncio.wrap_future(asked)


async def by_a_thread_with_a_loop(question, llm):
    answer = asyncio.get_running_loop().create_future()
    here = asyncio.get_running_loop()

    def serve():
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        content = loop.run_until_complete(llm.chat(messages_of(question))).content
        loop.close()
        here.call_soon_threadsafe(answer.set_result, content)

    threading.Thread(target=serve).start()
    return await answer


async def by_blocking_the_loop(question, llm):
    """The thread must not need the run's loop."""
    found = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(llm.chat(messages_of(question))).content))
    thread.start()
    thread.join()
    return found[0]


async def by_to_thread(question, llm):
    return await asyncio.to_thread(lambda: asyncio.run(llm.chat(messages_of(question))).content)


async def by_address_in_an_executor(question, llm):
    def ask():
        body = json.dumps({"messages": messages_of(question)}).encode()
        headers = {"Authorization": f"Bearer {llm.api_key}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{llm.base_url}/chat/completions", body, headers)
        ) as answer:
            return json.loads(answer.read())["choices"][0]["message"]["content"]

    return await asyncio.get_running_loop().run_in_executor(pool, ask)


async def by_openai_in_a_thread_with_a_loop(question, llm):
    async def ask():
        answer = await llm.openai().chat.completions.create(model="x", messages=messages_of(question))
        return answer.choices[0].message.content

    return await asyncio.wrap_future(pool.submit(lambda: asyncio.run(ask())))


def by_threads_of_a_sync_workflow(question, llm):
    return pool.submit(lambda: llm.chat(messages_of(question)).content).result()


def by_asyncio_run_in_a_sync_workflow(question, llm):
    async def ask():
        return await asyncio.to_thread(lambda: llm.chat(messages_of(question)).content)

    return asyncio.run(ask())


class ByCall:
    async def __call__(self, question, llm):
        return (await asyncio.wait_for(llm.chat(messages_of(question)), 20)).content


@pytest.mark.parametrize(
    "workflow",
    [
        by_executor_and_asyncio_run,
        by_a_shared_pool,
        by_a_thread_with_a_loop,
        by_blocking_the_loop,
        by_to_thread,
        by_address_in_an_executor,
        by_openai_in_a_thread_with_a_loop,
        by_threads_of_a_sync_workflow,
        by_asyncio_run_in_a_sync_workflow,
        ByCall(),
    ],
    ids=lambda workflow: getattr(workflow, "__name__", "an object"),
)
async def test_calls_are_recorded_in_their_rollout_wherever_they_are_made(run_of, workflow):
    run = run_of(workflow, max_concurrency=8)
    epoch = await run.next_epoch()
    assert epoch.metrics.failures == 0
    asked = {row["id"]: row["question"] for row in sums(4)}
    messages = run.messages()
    users = messages[messages.role == "user"]
    assert len(users) == 8
    assert [content == asked[example] for content, example in zip(users.content, users.example, strict=True)] == [
        True
    ] * 8


# ── what outlives its rollout ────────────────────────────────────────────────────────────────────────────────────────


async def outliving(run_of, start, **options):
    """The errors of calls that were made after their rollout, and the run."""
    errors, over = [], threading.Event()
    run = run_of(start(errors, over), **options)
    epoch = await run.next_epoch()
    over.set()
    for _ in range(1000):
        if len(errors) == 8:
            break
        await asyncio.sleep(0.01)
    assert len(errors) == 8
    return run, epoch, errors


def a_task(errors, over):
    async def late(llm):
        while not over.is_set():
            await asyncio.sleep(0.01)
        try:
            await llm.chat(messages_of("late"))
        except Exception as error:
            errors.append(error)

    async def solve(question, llm):
        await llm.chat(messages_of(question))
        tasks.append(asyncio.create_task(late(llm)))
        return "done"

    tasks = []
    return solve


def a_thread(errors, over):
    def late(llm):
        over.wait(20)
        try:
            asyncio.run(llm.chat(messages_of("late")))
        except Exception as error:
            errors.append(error)

    async def solve(question, llm):
        await llm.chat(messages_of(question))
        threading.Thread(target=late, args=(llm,)).start()
        return "done"

    return solve


def a_thread_of_a_sync_workflow(errors, over):
    def late(llm):
        over.wait(20)
        try:
            llm.chat(messages_of("late"))
        except Exception as error:
            errors.append(error)

    def solve(question, llm):
        llm.chat(messages_of(question))
        threading.Thread(target=late, args=(llm,)).start()
        return "done"

    return solve


def an_address(errors, over):
    def late(llm):
        over.wait(20)
        try:
            llm.base_url  # noqa: B018
        except Exception as error:
            errors.append(error)

    async def solve(question, llm):
        await llm.chat(messages_of(question))
        threading.Thread(target=late, args=(llm,)).start()
        return "done"

    return solve


@pytest.mark.parametrize("start", [a_task, a_thread, a_thread_of_a_sync_workflow, an_address])
async def test_a_call_after_the_rollouts_end_is_refused_with_the_reason_and_recorded_nowhere(run_of, start):
    run, epoch, errors = await outliving(run_of, start)
    assert epoch.metrics.failures == 0
    assert all(isinstance(error, RunError) for error in errors)
    assert all("has ended: its llm is not asked any more" in error for error in map(str, errors))
    assert "late" not in set(run.messages().content)


async def test_an_answer_that_comes_after_the_rollouts_end_is_refused_too():
    policy = Slow(lambda messages, seed: "seven")
    episode = CallRecorder(EpisodeKey("train", 0, 0, 0))
    with episode.recording():
        asking = asyncio.create_task(RolloutLLM(PolicyLLM(policy), episode).chat(messages_of("3+4")))
        unbound = asyncio.create_task(PolicyLLM(policy).chat(messages_of("3+4")))
        await asyncio.sleep(0)
    for task in (asking, unbound):
        with pytest.raises(RunError, match="generation 0 .* has ended: its llm is not asked any more"):
            await task
    assert episode.calls == []


async def test_calls_of_an_attempt_that_was_given_up_are_refused():
    episode = CallRecorder(EpisodeKey("train", 0, 0, 0))
    with episode.recording():
        first = RolloutLLM(PolicyLLM(Slow(lambda messages, seed: "seven")), episode)
        asking = asyncio.create_task(first.chat(messages_of("3+4")))
        await asyncio.sleep(0)
        episode.restart()
        second = RolloutLLM(PolicyLLM(Slow(lambda messages, seed: "seven")), episode)
        await second.chat(messages_of("3+4"))
        for refused in (asking, first.chat(messages_of("3+4"))):
            with pytest.raises(RunError, match="was begun again"):
                await refused
    assert [call.sequence for call in episode.calls] == [1]


async def test_a_rollout_that_timed_out_records_nothing_of_its_thread_that_runs_on(run_of):
    errors, go = [], threading.Event()

    def solve(question, llm):
        go.wait(20)
        try:
            llm.chat(messages_of(question))
        except RunError as error:
            errors.append(str(error))

    run = run_of(solve, item_timeout=0.2)
    failure = await run.rollout(0)
    go.set()
    for _ in range(1000):
        if errors:
            break
        await asyncio.sleep(0.01)
    assert "RolloutTimeout" in failure.error
    assert "has ended" in errors[0]


async def test_the_llm_of_a_rollout_looks_like_the_model():
    class Own(PolicyLLM):
        """A model of one's own, with more than ours have."""

        flavor = "sweet"

        async def chat(self, messages, tools=None, **sampling):
            self.seen = current_episode()
            return await super().chat(messages, tools, **sampling)

    model = Own(ScriptedPolicy(lambda messages, seed: "seven"), "tiny", SamplingParams(max_tokens=3))
    episode = CallRecorder(EpisodeKey("train", 0, 0, 0))
    llm = RolloutLLM(model, episode)
    assert isinstance(llm, LLM)
    assert (llm.name, llm.policy, llm.flavor, llm.takes_options) == ("tiny", model.policy, "sweet", False)
    model.sampling = SamplingParams(max_tokens=2)
    assert llm.sampling.max_tokens == 2  # a live change
    assert copy.copy(llm).name == "tiny"
    with pytest.raises(AttributeError, match="color"):
        llm.color  # noqa: B018
    await llm.chat(messages_of("3+4"))
    assert model.seen is episode
    assert len(episode.calls) == 1


async def test_a_chat_that_would_wait_for_its_own_loop_is_refused():
    episode = CallRecorder(EpisodeKey("train", 0, 0, 0))
    llm = SyncLLM(PolicyLLM(ScriptedPolicy()), asyncio.get_running_loop(), episode)
    with pytest.raises(RunError, match="Make the workflow an `async def`"):
        llm.chat(messages_of("3+4"))
