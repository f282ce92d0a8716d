"""A client that one rollout made and others use: no rollout holds another's turns, and the error says what to do."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
import urllib.error
import urllib.request

import pytest

import finetune_nb as ft
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.llms.rollout_transport import RolloutTransport
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.types import EpisodeKey

openai = pytest.importorskip("openai")


def messages_of(question):
    return [{"role": "user", "content": question}]


class Slow(ScriptedPolicy):
    """Rollouts overlap while it samples."""

    async def sample(self, ids, params, seed):
        await asyncio.sleep(0.02)
        return await super().sample(ids, params, seed)


@pytest.fixture
def run_of(tmp_path, closing):
    """A run of 4 rows, 2 generations each, whose model answers with the question that it was asked."""

    def make(workflow, concurrency=4):
        adapter = FakeAdapter(policy=Slow(lambda messages, seed: "to " + messages[0]["content"]))
        return closing(
            ft.Run(
                workflow,
                lambda item: 1.0,
                sums(4),
                generations=2,
                output_dir=tmp_path,
                adapter=adapter,
                max_concurrency=concurrency,
            )
        )

    return make


async def turns_and_errors(run):
    """The turns that rollouts hold of others, and how rollouts failed."""
    epoch = await run.next_epoch()
    asked = {row["id"]: row["question"] for row in sums(4)}
    messages = run.messages()
    users = messages[messages.role == "user"]
    foreign = [
        content for content, example in zip(users.content, users.example, strict=True) if content != asked[example]
    ]
    return epoch, foreign, run.trajectories().error.dropna().tolist()


class Once:
    """What the first rollout that comes by makes."""

    def __init__(self, make):
        self.make, self.made, self.lock = make, None, threading.Lock()

    def __call__(self, llm):
        with self.lock:
            if self.made is None:
                self.made = self.make(llm)
            return self.made


def header(llm):
    return {"Authorization": f"Bearer {llm.api_key}"}


def with_openai(client):
    async def solve(question, llm):
        for _ in range(2):
            await client(llm).chat.completions.create(model="x", messages=messages_of(question))
        return "done"

    return solve


def by_openai():
    return with_openai(Once(lambda llm: openai.AsyncOpenAI(base_url=llm.base_url, api_key=llm.api_key, max_retries=0)))


def by_llm_openai():
    return with_openai(Once(lambda llm: llm.openai()))


def by_copies():
    client = Once(lambda llm: openai.AsyncOpenAI(base_url=llm.base_url, api_key=llm.api_key, max_retries=0))
    return with_openai(lambda llm: client(llm).copy(max_retries=1))


def by_a_kept_address():
    """The key is the rollout's own, the address is not."""
    kept = Once(lambda llm: llm.base_url)
    return with_openai(lambda llm: openai.AsyncOpenAI(base_url=kept(llm), api_key=llm.api_key, max_retries=0))


def by_a_kept_key():
    """The address is the rollout's own, the key is not."""
    kept = Once(lambda llm: "".join(llm.api_key))
    return with_openai(lambda llm: openai.AsyncOpenAI(base_url=llm.base_url, api_key=kept(llm), max_retries=0))


def by_sync_openai():
    client = Once(lambda llm: openai.OpenAI(base_url=llm.base_url, api_key=llm.api_key, max_retries=0))

    def solve(question, llm):
        client(llm).chat.completions.create(model="x", messages=messages_of(question))
        return "done"

    return solve


def by_httpx():
    httpx = pytest.importorskip("httpx")
    client = Once(lambda llm: httpx.AsyncClient(base_url=llm.base_url, headers=header(llm), timeout=20))

    async def solve(question, llm):
        for _ in range(2):
            answer = await client(llm).post("/chat/completions", json={"messages": messages_of(question)})
            if answer.status_code != 200:
                raise RuntimeError(answer.text)
        return "done"

    return solve


def by_aiohttp():
    aiohttp = pytest.importorskip("aiohttp")
    client = Once(lambda llm: (aiohttp.ClientSession(headers=header(llm)), llm.base_url))

    async def solve(question, llm):
        session, address = client(llm)
        for _ in range(2):
            answer = await session.post(f"{address}/chat/completions", json={"messages": messages_of(question)})
            if answer.status != 200:
                raise RuntimeError(await answer.text())
            await answer.json()
        return "done"

    return solve


def by_langchain():
    langchain_openai = pytest.importorskip("langchain_openai")
    client = Once(
        lambda llm: langchain_openai.ChatOpenAI(
            model="x", base_url=llm.base_url, api_key=llm.api_key, max_retries=0, stream_usage=False
        )
    )

    async def solve(question, llm):
        for _ in range(2):
            await client(llm).ainvoke(question)
        return "done"

    return solve


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("concurrency", [1, 4, 8])
@pytest.mark.parametrize(
    "kind",
    [
        by_openai,
        by_llm_openai,
        by_copies,
        by_a_kept_address,
        by_a_kept_key,
        by_sync_openai,
        by_httpx,
        by_aiohttp,
        by_langchain,
    ],
)
async def test_a_client_made_once_gives_no_rollout_the_turns_of_another_and_says_why(run_of, kind, concurrency):
    epoch, foreign, errors = await turns_and_errors(run_of(kind(), concurrency))
    assert foreign == []
    assert epoch.metrics.failures == len(errors) >= 4
    for error in errors:
        assert "client" in error
        assert "another" in error
        assert "anew in each rollout" in error


async def test_an_llm_that_was_kept_asks_for_the_rollout_whose_own_task_uses_it(run_of):
    kept = Once(lambda llm: llm)

    async def solve(question, llm):
        return (await kept(llm).chat(messages_of(question))).content

    epoch, foreign, errors = await turns_and_errors(run_of(solve))
    assert (epoch.metrics.failures, foreign, errors) == (0, [], [])


async def test_an_llm_that_was_kept_is_refused_where_nobody_can_tell_who_asks(run_of):
    kept = Once(lambda llm: llm)

    async def solve(question, llm):
        return (await asyncio.create_task(kept(llm).chat(messages_of(question)))).content

    _, foreign, errors = await turns_and_errors(run_of(solve))
    assert foreign == []
    assert len(errors) >= 4
    assert all("this llm belongs to the rollout of example" in error for error in errors)


@pytest.mark.slow
@pytest.mark.proof
async def test_a_client_that_is_shared_without_an_address_serves_all_rollouts(run_of):
    """Its connections are used by one rollout after the other, each with its own address and key."""
    httpx = pytest.importorskip("httpx")
    client = httpx.AsyncClient(timeout=20)

    async def solve(question, llm):
        for _ in range(3):
            address = f"{llm.base_url}/chat/completions"
            answer = await client.post(address, json={"messages": messages_of(question)}, headers=header(llm))
            answer.raise_for_status()
        return "done"

    epoch, foreign, errors = await turns_and_errors(run_of(solve))
    assert (epoch.metrics.failures, foreign, errors) == (0, [], [])


async def test_the_key_of_a_rollout_that_has_ended_is_refused_with_that_reason():
    llm = PolicyLLM(ScriptedPolicy(lambda messages, seed: "seven"))

    def ask(address, key):
        body = json.dumps({"messages": messages_of("3+4")}).encode()
        request = urllib.request.Request(f"{address}/chat/completions", body, {"Authorization": f"Bearer {key}"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=20)
        return caught.value.code, json.loads(caught.value.read())["error"]["message"]

    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
        ended = "".join(llm.api_key)
    with CallRecorder(EpisodeKey("train", 0, 1, 0)).recording() as other:
        status, said = await asyncio.to_thread(ask, llm.base_url, ended)
        assert status == 410
        assert "the key is that of a rollout that has ended" in said
        running = "".join(llm.api_key)
        with CallRecorder(EpisodeKey("train", 0, 2, 0)).recording() as third:
            status, said = await asyncio.to_thread(ask, llm.base_url, running)
        assert status == 403
        assert "another rollout's address, that of example 2, generation 0" in said
    assert (other.calls, third.calls) == ([], [])


async def test_a_key_is_the_same_text_in_its_rollout_and_outside_of_any():
    llm = PolicyLLM(ScriptedPolicy(lambda messages, seed: "seven"))
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
        key = llm.api_key
        inside = [str(key), f"{key}", "%s" % key, "".join(key), "" + key]  # noqa: UP031
    outside = [str(key), f"{key}", "".join(key), json.loads(json.dumps(key)), pickle.loads(pickle.dumps(key))]
    assert len({*map("".join, inside), *map("".join, outside)}) == 1
    with CallRecorder(EpisodeKey("train", 0, 1, 0)).recording():
        assert f"{key}" != "".join(key)
        assert f"{key}".startswith("".join(key))


# ── a client for all rollouts ────────────────────────────────────────────────────────────────────────────────────────


def asks_async(client):
    async def solve(question, llm):
        for _ in range(2):
            answer = await client.chat.completions.create(model="x", messages=messages_of(question))
            assert answer.choices[0].message.content == f"to {question}"
        return "done"

    return solve


def asks_in_tasks(client):
    async def solve(question, llm):
        asking = [client.chat.completions.create(model="x", messages=messages_of(question)) for _ in range(3)]
        await asyncio.gather(*asking)
        return "done"

    return solve


def asks_in_a_thread(client):
    async def solve(question, llm):
        await asyncio.to_thread(lambda: asyncio.run(asks_async(client)(question, llm)))
        return "done"

    return solve


def async_client():
    http = openai.DefaultAsyncHttpxClient(transport=RolloutTransport())
    return openai.AsyncOpenAI(base_url=RolloutTransport.base_url, api_key="none", http_client=http, max_retries=0)


def sync_client():
    http = openai.DefaultHttpxClient(transport=RolloutTransport())
    return openai.OpenAI(base_url=RolloutTransport.base_url, api_key="none", http_client=http, max_retries=0)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("kind", [asks_async, asks_in_tasks, asks_in_a_thread])
async def test_one_client_with_the_transport_serves_all_rollouts(run_of, kind):
    epoch, foreign, errors = await turns_and_errors(run_of(kind(async_client())))
    assert (epoch.metrics.failures, foreign, errors) == (0, [], [])


async def test_one_sync_client_with_the_transport_serves_all_rollouts(run_of):
    client = sync_client()

    def solve(question, llm):
        answer = client.chat.completions.create(model="x", messages=messages_of(question))
        return answer.choices[0].message.content

    epoch, foreign, errors = await turns_and_errors(run_of(solve))
    assert (epoch.metrics.failures, foreign, errors) == (0, [], [])


async def test_the_workflow_does_not_have_to_take_the_llm_for_it(run_of):
    client = async_client()

    async def solve(question):
        await client.chat.completions.create(model="x", messages=messages_of(question))
        return "done"

    run = run_of(solve)
    epoch, foreign, errors = await turns_and_errors(run)
    assert (epoch.metrics.failures, foreign, errors) == (0, [], [])


async def test_langchain_and_httpx_take_the_transport(run_of):
    langchain_openai = pytest.importorskip("langchain_openai")
    httpx = pytest.importorskip("httpx")
    http = openai.DefaultAsyncHttpxClient(transport=RolloutTransport())
    model = langchain_openai.ChatOpenAI(
        model="x", base_url=RolloutTransport.base_url, api_key="none", http_async_client=http, max_retries=0
    )
    plain = httpx.AsyncClient(transport=RolloutTransport(), base_url=RolloutTransport.base_url)

    async def solve(question, llm):
        await model.ainvoke(question)
        answer = await plain.post("/chat/completions?a=b", json={"messages": messages_of(question)})
        answer.raise_for_status()
        return "done"

    epoch, foreign, errors = await turns_and_errors(run_of(solve))
    assert (epoch.metrics.failures, foreign, errors) == (0, [], [])


async def test_it_serves_the_cells_next_run_and_streams(run_of):
    client = async_client()
    for _ in range(2):  # each run has an event loop of its own

        async def solve(question, llm):
            stream = await client.chat.completions.create(model="x", messages=messages_of(question), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        run = run_of(solve)
        result = await run.rollout(0)
        assert getattr(result, "error", None) is None
        run.close()


async def test_outside_of_a_rollout_it_says_so_and_sends_nothing():
    before = repr(gateway())
    with pytest.raises(openai.PermissionDeniedError, match="no rollout runs here. Use it inside the workflow"):
        await async_client().chat.completions.create(model="x", messages=messages_of("3+4"))
    with pytest.raises(openai.PermissionDeniedError, match="no rollout runs here"):
        sync_client().chat.completions.create(model="x", messages=messages_of("3+4"))
    assert repr(gateway()) == before


async def test_after_the_end_of_its_rollout_it_says_so():
    client, llm = async_client(), PolicyLLM(ScriptedPolicy(lambda messages, seed: "seven"))
    episode = CallRecorder(EpisodeKey("train", 0, 0, 0))
    with episode.recording():
        episode.begin_workflow(llm)
        await client.chat.completions.create(model="x", messages=messages_of("3+4"))
    with episode.current(), pytest.raises(openai.PermissionDeniedError, match="has ended"):
        await client.chat.completions.create(model="x", messages=messages_of("3+4"))
    assert len(episode.calls) == 1
    await gateway().close_clients()


async def test_a_connection_of_another_event_loop_is_an_error_also_where_the_answer_would_be_fast():
    httpx = pytest.importorskip("httpx")
    llm = PolicyLLM(ScriptedPolicy(lambda messages, seed: "seven"))
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        address = f"{llm.base_url}/chat/completions"
        client = httpx.AsyncClient(headers=header(llm), limits=httpx.Limits(keepalive_expiry=600), timeout=20)

        async def ask():
            return await client.post(address, json={"messages": messages_of("3+4")})

        assert (await ask()).status_code == 200
        with pytest.raises(RuntimeError, match="opened on a different event loop"):
            await asyncio.to_thread(lambda: asyncio.run(ask()))
    assert len(episode.calls) == 1
