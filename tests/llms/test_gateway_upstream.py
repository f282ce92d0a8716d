"""The gateway over somebody else's server: what is asked of it, what is recorded, and what happens when it fails."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("openai")

import openai
from loopback import Fault, LoopbackServer, Refusal

import finetune_nb as ft
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.gateway import gateway
from finetune_nb.types import EpisodeKey

QUESTION = [{"role": "user", "content": "3+4"}]
KEY = "sk-upstream-58c1d0"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_7", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}


@pytest.fixture
async def remote():
    """`await remote(server, ...)` is an llm of that server and an episode that records it."""
    builders = []

    async def connect(server, **options):
        settings = {"_type": "openai", "model_name": "tiny", "base_url": server.base_url, "api_key": KEY, **options}
        builder = ft.Builder(ft.load_config({"llms": {"remote": settings}}))
        builders.append(builder)
        return await builder.get_llm("remote"), CallRecorder(EpisodeKey("train", 0, 0, 0))

    yield connect
    for builder in builders:
        await builder.close()


async def test_logprobs_ids_and_the_models_name_are_asked_for_whatever_the_client_asks(remote):
    with LoopbackServer() as server:
        llm, episode = await remote(server)
        with episode.recording():
            answer = await llm.openai().chat.completions.create(
                model="gpt-9", messages=QUESTION, tools=[TOOL], top_p=0.9, tool_choice="required", user="me", seed=3
            )
    (request,) = server.requests
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body.pop("seed") != 3
    assert request.body == {
        "model": "tiny",
        "messages": QUESTION,
        "tools": [TOOL],
        "temperature": 1.0,
        "max_tokens": 1024,
        "logprobs": True,
        "return_token_ids": True,
        "top_p": 0.9,
        "tool_choice": "required",
    }
    assert answer.choices[0].logprobs is None  # the client did not ask for them
    (call,) = episode.calls
    assert (call.exact, call.response_ids, len(call.logprobs)) == (True, [111, 107], 2)


async def test_tool_calls_streams_and_plain_prompts_pass_through(remote):
    def reply(request):
        messages = request.body.get("messages")
        return {"role": "assistant", "content": None, "tool_calls": [CALL]} if messages == QUESTION else "seven"

    with LoopbackServer(reply) as server:
        llm, episode = await remote(server)
        with episode.recording():
            client = llm.openai()
            stream = await client.chat.completions.create(model="x", messages=QUESTION, tools=[TOOL], stream=True)
            (call,) = [
                c for chunk in [chunk async for chunk in stream] for c in chunk.choices[0].delta.tool_calls or ()
            ]
            text = await client.completions.create(model="x", prompt="3+4=")
            ids = await client.completions.create(model="x", prompt=[51, 43])
    assert (call.id, call.function.name, call.function.arguments) == ("call_7", "add", '{"a": 3}')
    assert (text.choices[0].text, ids.choices[0].text) == ("seven", "seven")
    assert [call.prompt_ids for call in episode.calls] == [[51, 43, 52], [51, 43, 52, 61], [51, 43]]
    assert [call.exact for call in episode.calls] == [True] * 3
    assert [len(call.logprobs) for call in episode.calls] == [len(call.response_ids) for call in episode.calls]


async def test_a_client_that_asks_for_the_likeliest_tokens_gets_and_records_them(remote):
    with LoopbackServer() as server:
        llm, episode = await remote(server)
        with episode.recording():
            asked = {"model": "x", "messages": QUESTION, "logprobs": True}
            answer = await llm.openai().chat.completions.create(**asked, top_logprobs=2)
            plain = await llm.openai().chat.completions.create(**asked)
    first = answer.choices[0].logprobs.content[0]
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("o", -0.5), ("α", -3.0)]
    assert plain.choices[0].logprobs.content[0].top_logprobs == []
    assert [call.top_logprobs and call.top_logprobs[1] for call in episode.calls] == [{"k": -0.51, "α": -3.0}, None]


async def test_a_server_without_ids_is_warned_of_once_and_its_calls_are_not_exact(remote, caplog):
    with LoopbackServer(token_ids=False) as server:
        llm, episode = await remote(server)
        with episode.recording():
            for _ in range(2):
                answer = await llm.openai().chat.completions.create(model="x", messages=QUESTION)
    assert answer.usage is None  # not known is not zero
    assert [call.exact for call in episode.calls] == [False, False]
    assert caplog.text.count("gives no token ids") == 1


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(Refusal(429, "slow down"), id="429"),
        pytest.param(Refusal(500, "boom"), id="500"),
        pytest.param(Refusal(503, "busy"), id="503"),
        pytest.param(Fault(), id="closed before a byte"),
        pytest.param(Fault(sent=0.5), id="closed in the middle"),
        pytest.param(Fault(seconds=1.0), id="silent until the timeout"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_trouble_of_the_server_is_retried_out_of_sight_and_the_turn_recorded_once(remote, trouble, stream):
    troubles = [trouble]

    def reply(request):
        return troubles.pop() if troubles else "seven"

    with LoopbackServer(reply) as server:
        llm, episode = await remote(server, request_timeout=0.4, max_retries=2)
        with episode.recording():
            answer = await llm.openai(max_retries=0).chat.completions.create(
                model="x", messages=QUESTION, stream=stream
            )
            text = (
                "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
                if stream
                else answer.choices[0].message.content
            )
    assert text == "seven"
    assert len(server.requests) == 2
    assert len({request.body["seed"] for request in server.requests}) == 1
    assert [call.reply["content"] for call in episode.calls] == ["seven"]


@pytest.mark.parametrize(
    ("trouble", "status", "said"),
    [
        (Refusal(429, "slow down"), 429, "slow down"),
        (Refusal(500, f"boom {KEY}"), 500, "boom"),
        (Refusal(400, "too long"), 400, "too long"),
        (Fault(), 502, "cannot be reached"),
        (Fault(sent=0.5), 502, "cannot be reached"),
        (Fault(seconds=1.0), 504, "not answer in time"),
    ],
)
async def test_trouble_that_lasts_is_told_to_the_client_once_and_not_recorded(remote, trouble, status, said):
    with LoopbackServer(lambda request: trouble) as server:
        llm, episode = await remote(server, request_timeout=0.3, max_retries=0)
        started = time.monotonic()
        with episode.recording(), pytest.raises(openai.APIStatusError, match=said) as caught:
            await llm.openai().chat.completions.create(model="x", messages=QUESTION)
    assert caught.value.status_code == status
    assert KEY not in str(caught.value)
    assert len(server.requests) == 1  # the client would have asked again twice
    assert episode.calls == []
    assert time.monotonic() - started < 10


async def test_clients_are_closed_with_the_run():
    with LoopbackServer() as server:
        settings = {"_type": "openai", "model_name": "tiny", "base_url": server.base_url, "api_key": KEY}
        async with ft.Builder(ft.load_config({"llms": {"remote": settings}})) as builder:
            llm = await builder.get_llm("remote")
            with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
                client = llm.openai()
                await client.chat.completions.create(model="x", messages=QUESTION)
            (upstream,) = llm._clients.values()
    assert client._client.is_closed
    assert upstream.is_closed()
    assert "sk-" not in repr(gateway())
