"""Anthropic's Messages API of the gateway, asked by Anthropic's client: what it gets, what is recorded, what is refused."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request

import pytest
from calling_policy import Caller, episode, says

from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.llms.rollout_transport import RolloutTransport

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

TOOL = {"name": "add", "input_schema": {"type": "object", "properties": {}}}
CHAT_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
QUESTION = [{"role": "user", "content": "3+4"}]


@pytest.fixture(scope="module")
def http():
    """One for all tests: an HTTP client takes a moment to make."""
    return anthropic.DefaultHttpxClient(trust_env=False)


@pytest.fixture
def client_of(http):
    return lambda llm, **options: anthropic.Anthropic(
        base_url=llm.base_url, api_key=llm.api_key, http_client=http, **options
    )


def ask(client, **options):
    """In a thread, as the gateway and the policy are elsewhere."""
    return asyncio.to_thread(
        client.messages.create, **{"model": "x", "max_tokens": 99, "messages": QUESTION, **options}
    )


def without_seconds(call):
    return [getattr(call, name) for name in call.__slots__ if name != "seconds"]


@pytest.mark.parametrize("system", ["be brief", [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]])
async def test_a_message_is_recorded_like_the_same_chat(client_of, system):
    llm = says("seven")
    with (by_chat := episode()).recording():
        messages = [{"role": "system", "content": "be brief"}, *QUESTION]
        await llm.openai().chat.completions.create(
            model="x", messages=messages, temperature=0.5, max_tokens=3, tools=[CHAT_TOOL]
        )
        await gateway().close_clients()
    with (by_messages := episode()).recording():
        extra = {"temperature": 0.5}
        answer = await ask(client_of(llm), system=system, max_tokens=3, tools=[TOOL], extra_body=extra)
    assert (answer.content[0].text, answer.stop_reason, answer.model) == ("sev", "max_tokens", "tiny")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len("<system>be brief<user>3+4"), 3)
    (chat,), (message,) = by_chat.calls, by_messages.calls
    assert without_seconds(chat) == without_seconds(message)


async def test_a_stream_has_the_events_of_the_same_message(client_of):
    llm = says('think|call {"a": 3}\ncall {"a": 4}')

    def streamed():
        with client_of(llm).messages.stream(model="x", max_tokens=99, messages=QUESTION, tools=[TOOL]) as stream:
            kinds = [event.type for event in stream if event.type.startswith(("message", "content"))]
            return kinds, stream.get_final_message()

    with (one := episode()).recording():
        kinds, message = await asyncio.to_thread(streamed)
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    thinking = [*block[:2], "content_block_delta", block[2]]
    assert kinds == ["message_start", *thinking, *block, *block, "message_delta", "message_stop"]
    thought, first, second = message.content
    assert (thought.thinking, message.stop_reason) == ("think", "tool_use")
    assert [(call.id, call.name, call.input) for call in (first, second)] == [
        ("call_0_0", "add", {"a": 3}),
        ("call_0_1", "add", {"a": 4}),
    ]
    assert len(one.calls) == 1


@pytest.mark.parametrize("made", ['call {"a": 3}\ncall {"a": 4}', "call {a:"])
async def test_blocks_that_come_back_are_the_turn_that_was_sampled(client_of, made):
    llm = PolicyLLM(Caller(lambda messages, seed: made if len(messages) == 1 else "done"))
    with (one := episode()).recording():
        client = client_of(llm)
        first = await ask(client, tools=[TOOL])
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "7"}]}
            for block in first.content
        ]
        more = [*results, {"type": "text", "text": "and?"}]
        messages = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": more}]
        await ask(client, messages=messages, tools=[TOOL])
    before, after = one.calls
    assert [message["role"] for message in after.messages[2:]] == ["tool"] * len(results) + ["user"]
    assert after.prompt_ids[: len(before.prompt_ids + before.response_ids)] == [
        *before.prompt_ids,
        *before.response_ids,
    ]


async def test_a_stop_sequence_ends_the_text_and_is_named(client_of):
    llm = says("one. two")
    with (one := episode()).recording():
        answer = await ask(client_of(llm), stop_sequences=[". "])
        whole = await ask(client_of(llm), stop_sequences=["three"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("one", "stop_sequence", ". ")
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
    assert one.calls[0].response_ids == [ord(c) for c in "one. two"]


async def test_tokens_are_counted_and_nothing_is_sampled(client_of):
    llm = says("seven")
    with (one := episode()).recording():
        count = await asyncio.to_thread(client_of(llm).messages.count_tokens, model="x", messages=QUESTION)
    assert count.input_tokens == len("<user>3+4")
    assert (one.calls, llm.policy.sampled) == ([], [])


async def test_both_ways_to_send_the_key_and_both_addresses_work(client_of):
    llm = says("seven")
    with (one := episode()).recording():
        await ask(client_of(llm))
        shorter = client_of(llm).copy(base_url=llm.base_url.removesuffix("/v1"))
        await ask(shorter)

        def plain(**headers):
            data = json.dumps({"messages": QUESTION, "max_tokens": 9}).encode()
            request = urllib.request.Request(f"{llm.base_url}/messages", data, headers)
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code, json.loads(error.read())["error"]["type"]

        assert await asyncio.to_thread(plain, **{"x-api-key": llm.api_key}) == 200
        assert await asyncio.to_thread(plain, Authorization=f"Bearer {llm.api_key}") == 200
        for wrong in ({"x-api-key": "wrong"}, {}):
            assert await asyncio.to_thread(plain, **wrong) == (401, "authentication_error")
    assert len(one.calls) == 4


async def test_a_key_of_another_rollout_is_refused(client_of):
    llm = says("seven")
    with episode().recording():
        kept = llm.api_key
        with (other := episode(1)).recording():
            client = client_of(llm).copy(api_key=kept)
            with pytest.raises(anthropic.PermissionDeniedError, match="another rollout's address"):
                await ask(client)
    assert other.calls == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"messages": []}, "messages is missing or empty"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "sev"}]}, "Leave the prefill out"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "reads text only"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "no tool of the type 'bash_20250124'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "cannot honour thinking="),
        ({"top_p": 0.5}, "cannot honour top_p=0.5"),
        ({"stop_sequences": [1]}, "stop_sequences is neither"),
        ({"tool_choice": {"type": "any"}, "tools": [TOOL]}, "cannot honour tool_choice"),
        ({"tool_choice": "any", "tools": [TOOL]}, "expected an object with the type"),
        ({"output_config": {"effort": "high"}}, "cannot honour output_config.effort="),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "cannot honour output_config.format="),
        ({"container": "c"}, "container is not offered here"),
        ({"temprature": 1}, "Did you mean 'temperature'"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_in_the_names_of_this_api(client_of, options, said):
    llm = says("seven")
    with (one := episode()).recording(), pytest.raises(anthropic.BadRequestError) as caught:
        await ask(client_of(llm), extra_body=options)
    assert said in caught.value.body["error"]["message"]
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert one.calls == []


async def test_what_changes_nothing_is_taken(client_of):
    llm = says("seven")
    with (one := episode()).recording():
        cached = [{"type": "text", "text": "3+4", "cache_control": {"type": "ephemeral"}}]
        answer = await ask(
            client_of(llm),
            messages=[{"role": "user", "content": cached}],
            tools=[{**TOOL, "cache_control": {"type": "ephemeral"}}],
            tool_choice={"type": "auto"},
            thinking={"type": "disabled"},
            metadata={"user_id": "me"},
            service_tier="auto",
        )
    assert answer.content[0].text == "seven"
    assert (one.calls[0].messages, one.calls[0].tools) == (QUESTION, [CHAT_TOOL])
    assert one.calls[0].ignored == ()


@pytest.mark.parametrize("base_url", [RolloutTransport.base_url, RolloutTransport.base_url.removesuffix("/v1")])
async def test_a_client_that_is_made_once_asks_the_rollout_that_uses_it(base_url):
    llm = says("seven")
    http = anthropic.DefaultAsyncHttpxClient(transport=RolloutTransport())
    async with anthropic.AsyncAnthropic(base_url=base_url, api_key="none", http_client=http, max_retries=0) as client:
        for n in range(2):
            with (one := episode(n)).recording():
                one.begin_workflow(llm)
                await client.messages.create(model="x", max_tokens=9, messages=QUESTION)
            assert len(one.calls) == 1
    await gateway().close_clients()
