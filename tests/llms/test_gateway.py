"""The gateway, asked by real clients over real sockets: what they get, what is recorded, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import random
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from small_agents import coin, right

import finetune_nb as ft
from finetune_nb.errors import RunError
from finetune_nb.llms import gateway as gateway_module
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM, SyncLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.types import EpisodeKey

openai = pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "3+4"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


class Caller(ScriptedPolicy):
    """A scripted policy that keeps what it sampled; a reply that begins with "call " is a call of the tool `add`."""

    def __init__(self, script=None):
        super().__init__(script)
        self.sampled = []

    async def sample(self, ids, params, seed):
        sample = await super().sample(ids, params, seed)
        self.sampled.append((list(ids), sample.ids))
        return sample

    def parse(self, ids):
        message = super().parse(ids)
        if not message["content"].startswith("call "):
            return message
        function = {"name": "add", "arguments": message["content"].removeprefix("call ")}
        return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def episode(n=0):
    return CallRecorder(EpisodeKey("train", 0, 0, n), seed=1)


def recorded(calls):
    return [(call.prompt_ids, call.response_ids) for call in calls]


@pytest.fixture
def seven():
    return PolicyLLM(Caller(lambda messages, seed: "seven"), "tiny")


@pytest.fixture(autouse=True)
async def close_clients():
    yield
    await gateway().close_clients()


def ask(address, key, body, **headers):
    """Status and answer of a plain POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Authorization": f"Bearer {key}", **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# ── what clients get ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_chat_is_answered_and_recorded_like_llm_chat(seven):
    by_chat, by_client = episode(), episode()
    with by_chat.recording():
        await seven.chat(QUESTION, temperature=0.5, max_tokens=3)
    with by_client.recording():
        answer = await seven.openai().chat.completions.create(
            model="whatever", messages=QUESTION, temperature=0.5, max_completion_tokens=3, logprobs=True
        )
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason, answer.model) == ("sev", "length", "tiny")
    assert [(entry.token, entry.logprob, entry.bytes) for entry in choice.logprobs.content] == [
        ("s", -1.0, [115]),
        ("e", -1.0, [101]),
        ("v", -1.0, [118]),
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 3)
    (mine,), (theirs,) = by_chat.calls, by_client.calls
    assert theirs.exact
    assert theirs.seconds > 0
    assert [getattr(mine, name) for name in mine.__slots__ if name != "seconds"] == [
        getattr(theirs, name) for name in theirs.__slots__ if name != "seconds"
    ]


async def test_logprobs_and_ids_are_in_the_answer_only_where_asked_for(seven):
    with episode().recording():
        create = seven.openai().chat.completions.create
        plain = await create(model="x", messages=QUESTION)
        full = await create(
            model="x",
            messages=QUESTION,
            logprobs=True,
            extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
        )
    assert plain.choices[0].logprobs is None
    assert not hasattr(plain, "prompt_token_ids")
    assert full.prompt_token_ids == [ord(c) for c in "<user>3+4"]
    assert full.choices[0].token_ids == [ord(c) for c in "seven"]
    assert [entry.token for entry in full.choices[0].logprobs.content][:2] == ["token_id:115", "token_id:101"]


async def test_a_stream_gives_the_same_in_pieces():
    llm = PolicyLLM(Caller(lambda messages, seed: 'call {"a": 3}'))
    with (one := episode()).recording():
        stream = await llm.openai().chat.completions.create(
            model="x",
            messages=QUESTION,
            tools=[TOOL],
            stream=True,
            logprobs=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    (call,) = [c for chunk in chunks for choice in chunk.choices for c in choice.delta.tool_calls or ()]
    assert (call.index, call.id, call.function.name, call.function.arguments) == (0, "call_0_0", "add", '{"a": 3}')
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, "tool_calls"]
    assert len(chunks[0].choices[0].logprobs.content) == len('call {"a": 3}')
    assert chunks[-1].usage.completion_tokens == len('call {"a": 3}')
    assert len(one.calls) == 1


async def test_completions_take_text_or_ids(seven):
    with (one := episode()).recording():
        create = seven.openai().completions.create
        text = await create(model="x", prompt="abc", logprobs=0)
        ids = await create(model="x", prompt=[97, 98], extra_body={"return_token_ids": True})
    assert (text.choices[0].text, text.choices[0].logprobs.text_offset) == ("seven", [0, 1, 2, 3, 4])
    assert ids.choices[0].prompt_token_ids == [97, 98]
    assert recorded(one.calls) == seven.policy.sampled
    assert [call.messages for call in one.calls] == [
        [{"role": "other", "content": "abc"}],
        [{"role": "other", "content": "ab"}],
    ]


async def test_a_text_prompt_that_carries_on_is_carried_on_behind_the_sampled_ids():
    class Wide(Caller):
        """Samples ids that its own encoding would never give."""

        async def sample(self, ids, params, seed):
            sample = await super().sample(ids, params, seed)
            self.sampled[-1] = (list(ids), [i + 1000 for i in sample.ids])
            return sample._replace(ids=self.sampled[-1][1])

        def tokens(self, ids):
            return [chr(i % 1000) for i in ids]

        def decode(self, ids):
            return "".join(self.tokens(ids))

    llm = PolicyLLM(Wide(lambda messages, seed: "seven"))
    with episode().recording():
        create = llm.openai().completions.create
        first = await create(model="x", prompt="3+4=")
        await create(model="x", prompt=f"3+4={first.choices[0].text} so")
    (prompt, reply), (second, _) = llm.policy.sampled
    assert second == [*prompt, *reply, *map(ord, " so")]


async def test_several_choices_are_several_calls():
    llm = PolicyLLM(Caller(lambda messages, seed: str(seed)))
    with (one := episode()).recording():
        answer = await llm.openai().chat.completions.create(model="x", messages=QUESTION, n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(call.reply["content"] for call in one.calls) == sorted(texts)
    assert sorted(call.sequence for call in one.calls) == [0, 1, 2]


async def test_the_text_ends_before_a_stop_text_and_the_ids_after_it():
    llm = PolicyLLM(Caller(lambda messages, seed: "one. two"))
    with (one := episode()).recording():
        create = llm.openai().chat.completions.create
        answer = await create(model="x", messages=QUESTION, stop=". ")
        turn = answer.choices[0].message
        await create(model="x", messages=[*QUESTION, turn, {"role": "user", "content": "and?"}])
    assert turn.content == "one"
    first, second = one.calls
    assert first.response_ids == [ord(c) for c in "one. two"]
    assert second.prompt_ids[: len(first.prompt_ids) + 8] == [*first.prompt_ids, *first.response_ids]


async def test_models_are_those_of_the_address(seven):
    with episode().recording():
        client = seven.openai()
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_a_client_may_send_messages_as_libraries_write_them(seven):
    with (one := episode()).recording():
        await seven.openai().chat.completions.create(
            model="x",
            messages=[
                {"role": "developer", "content": "be brief"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "3"}, {"type": "text", "text": "+4"}],
                    "name": None,
                },
                {"role": "assistant", "content": "no", "refusal": None, "annotations": [], "tool_calls": []},
            ],
        )
    assert one.calls[0].messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "3+4"},
        {"role": "assistant", "content": "no"},
    ]


async def test_a_seed_of_the_client_is_not_taken():
    """All rollouts of a group would be alike."""
    llm = PolicyLLM(Caller(lambda messages, seed: str(seed)))
    answers = set()
    for generation in range(3):
        with episode(generation).recording():
            answer = await llm.openai().chat.completions.create(model="x", messages=QUESTION, seed=42)
            answers.add(answer.choices[0].message.content)
    assert len(answers) == 3


# ── recording is exact ───────────────────────────────────────────────────────────────────────────────────────────────


def nonsense(rng):
    """A script that replies with any characters, or calls a tool with JSON that is formatted anyhow."""
    alphabet = 'ab 1"{}[]:,\\\n\t<>é\u2028\U0001f600\x00'

    def reply(messages, seed):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 12)))
        return rng.choice([text, "call " + json.dumps({"a": text}, indent=rng.choice([None, 1])), "call " + text])

    return reply


async def multi_turn(client, rng, turns, rewrites):
    """An agent that answers every tool call; rewrites: it parses arguments and writes them down again, as libraries do."""
    messages = [{"role": "user", "content": str(rng.random())}]
    for _ in range(turns):
        stream = rng.random() < 0.3
        answer = await client.chat.completions.create(model="x", messages=messages, tools=[TOOL], stream=stream)
        if stream:
            chunks = [chunk.choices[0].delta async for chunk in answer if chunk.choices]
            content = "".join(delta.content or "" for delta in chunks)
            calls = [call for delta in chunks for call in delta.tool_calls or ()]
        else:
            content, calls = answer.choices[0].message.content, answer.choices[0].message.tool_calls or []
        turn = {"role": "assistant", "content": content}
        if calls:
            turn["tool_calls"] = [call.model_dump(exclude_none=True, exclude={"index"}) for call in calls]
        for call in turn.get("tool_calls", ()) if rewrites else ():
            try:
                call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]))
            except ValueError:
                pass
        messages.append(turn)
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in calls]
        if not calls:
            messages.append({"role": "user", "content": "more"})


@pytest.mark.parametrize("rewrites", [False, True])
async def test_ids_recorded_are_the_ids_sampled_and_every_turn_carries_the_last_one_on(rewrites):
    rng = random.Random(7)

    async def one(n):
        policy = Caller(nonsense(rng))
        llm = PolicyLLM(policy)
        with episode(n).recording() as this:
            await multi_turn(llm.openai(), rng, rng.randrange(1, 6), rewrites)
        calls = sorted(this.calls, key=lambda call: call.sequence)
        assert recorded(calls) == policy.sampled
        assert all(call.exact for call in calls)
        for before, after in itertools.pairwise(calls):
            so_far = before.prompt_ids + before.response_ids
            assert after.prompt_ids[: len(so_far)] == so_far
        return len(calls)

    turns = [await one(n) for n in range(25)]
    assert sum(turns) > 50


@pytest.mark.slow
@pytest.mark.proof
async def test_concurrent_rollouts_are_kept_apart_also_in_threads_and_in_one_client():
    llm = PolicyLLM(Caller(lambda messages, seed: "to " + messages[0]["content"]))

    async def rollout(n, pool):
        with episode(n).recording() as this:
            client, address, key = llm.openai(), llm.base_url, llm.api_key
            body = {"model": "x", "messages": [{"role": "user", "content": f"{n}"}]}
            await asyncio.gather(*(client.chat.completions.create(**body) for _ in range(3)))
            in_thread = [pool.submit(ask, f"{address}/chat/completions", key, body) for _ in range(2)]
            for status, answer in [await asyncio.wrap_future(done) for done in in_thread]:
                assert (status, answer["choices"][0]["message"]["content"]) == (200, f"to {n}")
        assert [call.messages[0]["content"] for call in this.calls] == [f"{n}"] * 5
        assert sorted(call.sequence for call in this.calls) == [0, 1, 2, 3, 4]

    with ThreadPoolExecutor(8) as pool:
        await asyncio.gather(*(rollout(n, pool) for n in range(20)))


# ── addresses and keys ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_address_is_gone_when_its_rollout_has_ended(seven):
    with (one := episode()).recording():
        address, key = seven.base_url, seven.api_key
    body = {"messages": QUESTION}
    status, answer = await asyncio.to_thread(ask, f"{address}/chat/completions", key, body)
    assert (status, answer["error"]["code"]) == (410, "episode_closed")
    number, _, seal = address.rsplit("/", 2)[1].partition("-")
    for never in (f"{number}-{'0' * 24}", f"{int(number) + 10**6}-{seal}", "x", "9" * 5000):
        address = f"{gateway().url}/e/{never}/v1/chat/completions"
        status, answer = await asyncio.to_thread(ask, address, key, body)
        assert (status, answer["error"]["code"]) == (404, "unknown_episode")
    assert one.calls == []


@pytest.mark.parametrize("key", ["", "wrong", "é", None])
async def test_without_the_key_there_is_nothing(seven, key):
    with (one := episode()).recording():
        parts = urlsplit(seven.base_url)
        for method, path in (("POST", "chat/completions"), ("POST", "completions"), ("GET", "models"), ("GET", "x")):
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
            headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
            connection.request(
                method, f"{parts.path}/{path}", body=b"{}" if method == "POST" else None, headers=headers
            )
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["error"]["code"]) == (401, "invalid_api_key")
            connection.close()
    assert one.calls == []


async def test_it_listens_on_this_machine_alone_and_shows_its_key_nowhere(seven, caplog, monkeypatch):
    monkeypatch.setattr(gateway_module, "_gateway", None)  # a new one, whose key is a secret of this test

    def fail(messages, seed):
        raise RuntimeError(f"my environment: {gateway().api_key}")

    with caplog.at_level(logging.DEBUG), (one := episode()).recording():
        key = seven.api_key
        assert seven.base_url.startswith("http://127.0.0.1:")
        await seven.openai().chat.completions.create(model="x", messages=QUESTION)
        failing = PolicyLLM(Caller(fail))
        with pytest.raises(openai.InternalServerError, match="my environment") as caught:
            await failing.openai().chat.completions.create(model="x", messages=QUESTION)
        seen = [repr(gateway()), repr(one), repr(one.endpoints), str(caught.value), repr(one.steps())]
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("finetune_nb"))
    assert [text for text in (*seen, ours) if key in text] == []


async def test_an_address_outside_of_a_rollout_is_an_error_that_says_so(seven):
    with pytest.raises(RunError, match=r"no rollout runs here\. Ask for it inside the workflow"):
        seven.base_url  # noqa: B018
    with episode().recording() as this:
        pass
    with this.current(), pytest.raises(RunError, match="is running here any more"):
        seven.openai()


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "a JSON list; expected an object"),
        ({}, "messages is missing"),
        ({"messages": ["hi"]}, "no object with a role"),
        ({"messages": QUESTION, "tools": {}}, "no list of tool schemas"),
        ({"messages": QUESTION, "tools": 3}, "no list of tool schemas"),
        ({"messages": QUESTION, "n": 0}, "n is 0"),
        ({"messages": QUESTION, "n": 10**9}, "from 1 to 128"),
        ({"messages": QUESTION, "temperature": "hot"}, "temperature is"),
        ({"messages": QUESTION, "temperature": -1}, "expected 0 or more"),
        ({"messages": QUESTION, "max_tokens": 0}, "from 1 up"),
        ({"messages": QUESTION, "max_tokens": True}, "expected a number"),
        ({"messages": QUESTION, "stop": [1]}, "list of texts"),
        ({"messages": QUESTION, "top_p": 0.5}, "cannot honour top_p=0.5"),
        ({"messages": QUESTION, "response_format": {"type": "json_object"}}, "cannot honour response_format"),
        ({"messages": QUESTION, "tool_choice": "required"}, "cannot honour tool_choice"),
        ({"messages": QUESTION, "temprature": 1}, "Did you mean 'temperature'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text only"),
        ({"messages": [{"role": "user", "content": 3}]}, "reads text only"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 3}]}]}, "no list of calls"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "no list of calls"),
    ],
)
async def test_a_request_that_cannot_be_honoured_is_refused_with_the_reason(seven, body, said):
    with (one := episode()).recording():
        address = f"{seven.base_url}/chat/completions"
        status, answer = await asyncio.to_thread(ask, address, seven.api_key, body)
    assert status == 400
    assert said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert one.calls == []


@pytest.mark.parametrize("prompt", [None, "", [], [1, "a"], ["a", "b"], [[1], [2]], [True]])
async def test_a_prompt_is_one_text_or_one_list_of_ids(seven, prompt):
    with episode().recording():
        address = f"{seven.base_url}/completions"
        status, answer = await asyncio.to_thread(ask, address, seven.api_key, {"prompt": prompt})
    assert (status, answer["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_request_that_is_too_large_is_refused(seven, monkeypatch, chunked):
    monkeypatch.setattr(gateway_module, "LARGEST_REQUEST", 10_000)

    def send():
        parts = urlsplit(seven_url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
        body = iter([b"[" * 3000] * 7) if chunked else b"[" * 21_000
        headers = {"Authorization": f"Bearer {key}"}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is refused before it is all sent
            connection.request("POST", f"{parts.path}/chat/completions", body, headers, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["error"]["code"]

    with episode().recording():
        seven_url, key = seven.base_url, seven.api_key
        assert await asyncio.to_thread(send) == (413, "request_too_large")


async def test_unknown_addresses_and_methods_are_errors_as_clients_read_them(seven):
    with episode().recording():
        client = seven.openai()
        with pytest.raises(openai.NotFoundError, match="chat/completions, completions and models"):
            await client.embeddings.create(model="x", input="a")
        with pytest.raises(openai.APIStatusError, match="Method Not Allowed"):
            await client.get("/chat/completions", cast_to=object)


async def test_a_prompt_that_the_policy_refuses_is_the_clients_error_and_asked_once():
    class Short(Caller):
        async def sample(self, ids, params, seed):
            self.sampled.append(ids)
            raise ft.BackendError("the prompt has 9 tokens, but this model holds 8")

    llm = PolicyLLM(Short())
    with episode().recording() as this, pytest.raises(openai.BadRequestError, match="this model holds 8"):
        await llm.openai().chat.completions.create(model="x", messages=QUESTION)
    assert len(llm.policy.sampled) == 1
    assert this.calls == []


# ── when answers get lost ────────────────────────────────────────────────────────────────────────────────────────────


class Slow(Caller):
    """Samples when it is let go."""

    def __init__(self):
        super().__init__(lambda messages, seed: str(seed))
        self.go, self.asked, self.canceled = asyncio.Event(), 0, 0

    async def sample(self, ids, params, seed):
        self.asked += 1
        try:
            while not self.go.is_set():  # set on another loop
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.canceled += 1
            raise
        return await super().sample(ids, params, seed)


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


async def test_a_client_that_went_away_leaves_no_record_and_its_next_try_one():
    llm = PolicyLLM(Slow())
    with episode().recording() as this:
        client = llm.openai(timeout=0.2, max_retries=1)

        async def let_go():
            await until(lambda: llm.policy.canceled)
            llm.policy.go.set()

        letting = asyncio.create_task(let_go())
        answer = await client.chat.completions.create(model="x", messages=QUESTION)
        await letting
    assert (llm.policy.asked, llm.policy.canceled) == (2, 1)
    assert [call.reply["content"] for call in this.calls] == [answer.choices[0].message.content]


@pytest.mark.parametrize("header", [{"Idempotency-Key": "k"}, {"x-stainless-retry-count": "1"}])
async def test_a_request_that_comes_again_because_its_answer_got_lost_is_recorded_once(header, monkeypatch):
    # Whenever it comes again, it is answered as the first time.
    clock = SimpleNamespace(time=itertools.count(1).__next__)
    monkeypatch.setattr(gateway_module, "time", clock)
    llm = PolicyLLM(Caller(lambda messages, seed: str(seed)))
    with episode().recording() as this:
        address, key, body = f"{llm.base_url}/chat/completions", llm.api_key, {"messages": QUESTION}
        first = {**header, "x-stainless-retry-count": "0"}
        answers = [await asyncio.to_thread(ask, address, key, body, **h) for h in (first, {**first, **header})]
    assert answers[0] == answers[1]
    assert len(this.calls) == 1


async def test_the_same_question_again_is_another_sample():
    llm = PolicyLLM(Caller(lambda messages, seed: str(seed)))
    with episode().recording() as this:
        for _ in range(2):
            await llm.openai().chat.completions.create(model="x", messages=QUESTION)
    assert len({call.reply["content"] for call in this.calls}) == 2


async def test_what_is_under_way_when_the_rollout_ends_is_canceled_and_answered_with_410():
    llm = PolicyLLM(Slow())
    with episode().recording() as this:
        address, key = f"{llm.base_url}/chat/completions", llm.api_key
        asking = asyncio.create_task(asyncio.to_thread(ask, address, key, {"messages": QUESTION}))
        await until(lambda: llm.policy.asked)
    status, answer = await asking
    assert (status, answer["error"]["code"]) == (410, "episode_closed")
    assert llm.policy.canceled == 1
    assert this.calls == []


async def test_an_attempt_that_is_tried_again_leaves_nothing_behind():
    llm = PolicyLLM(Slow())
    with episode().recording() as this:
        client = llm.openai()
        asking = asyncio.create_task(client.chat.completions.create(model="x", messages=QUESTION))
        await until(lambda: llm.policy.asked)
        this.restart()
        llm.policy.go.set()
        with pytest.raises(openai.APIStatusError):
            await asking
        await client.chat.completions.create(model="x", messages=QUESTION)
    assert [call.sequence for call in this.calls] == [1]


async def test_a_connection_that_is_cut_in_the_middle_of_a_request_harms_nobody(seven):
    with episode().recording() as this:
        parts = urlsplit(seven.base_url)
        for text in (b"POST ", b"POST /x HTTP/1.1\r\nContent-Length: 10\r\n\r\nab", b"\xff\xfe\r\n\r\n"):
            with socket.create_connection((parts.hostname, parts.port)) as cut:
                cut.sendall(text)
        await seven.openai().chat.completions.create(model="x", messages=QUESTION)
    assert len(this.calls) == 1


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def by_client(question, llm):
    answer = await llm.openai().chat.completions.create(model="x", messages=[{"role": "user", "content": question}])
    return answer.choices[0].message.content


def by_sync_client(question, llm):
    answer = llm.openai().chat.completions.create(model="x", messages=[{"role": "user", "content": question}])
    return answer.choices[0].message.content


def by_threads(question, llm):
    """Threads that know no context."""
    with ThreadPoolExecutor(2) as pool:
        chat = pool.submit(llm.chat, [{"role": "user", "content": question}])
        post = pool.submit(ask, f"{llm.base_url}/chat/completions", llm.api_key, {"messages": QUESTION})
        assert post.result()[0] == 200
        return chat.result().content


async def by_blocking_the_loop(question, llm):
    body = {"messages": [{"role": "user", "content": question}]}
    return ask(f"{llm.base_url}/chat/completions", llm.api_key, body)[1]["choices"][0]["message"]["content"]


@pytest.mark.parametrize("workflow", [by_client, by_sync_client, by_threads, by_blocking_the_loop])
async def test_a_run_trains_on_what_any_client_asked(workflow, tmp_path, closing):
    policy = Caller(coin)
    run = closing(
        ft.Run(workflow, right, sums(3), adapter=FakeAdapter(policy=policy), generations=2, output_dir=tmp_path)
    )
    epoch = await run.next_epoch()
    assert epoch.metrics.failures == 0
    sampled = [
        (turn.metadata["prompt_token_ids"], turn.metadata["token_ids"])
        for group in epoch.collection.trajectories
        for trajectory in group
        for turn in trajectory.episode
        if turn.role == "assistant"
    ]
    assert sorted(sampled) == sorted(policy.sampled)
    assert {turn.metadata["exact"] for g in epoch.collection.trajectories for t in g for turn in t.episode[1:2]} == {
        True
    }


async def test_client_and_chat_give_the_same_epoch(tmp_path, closing):
    async def by_chat(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    epochs = []
    for name, workflow in (("chat", by_chat), ("client", by_client)):
        adapter = FakeAdapter(policy=Caller(coin))
        run = closing(ft.Run(workflow, right, sums(3), adapter=adapter, generations=2, output_dir=tmp_path, name=name))
        epochs.append(await run.next_epoch())
    a, b = ([t.reward for group in epoch.collection.trajectories for t in group] for epoch in epochs)
    assert a == b


async def test_a_client_that_was_used_in_a_cell_fails_with_what_to_do(tmp_path, closing, seven):
    from httpx2 import Limits  # what the openai package of constraints.txt stands on

    class Thoughtful(Caller):
        async def sample(self, ids, params, seed):
            await asyncio.sleep(1)  # a reply that is there at once is read without anybody waiting on a loop
            return await super().sample(ids, params, seed)

    seven.policy = Thoughtful(lambda messages, seed: "seven")
    with episode().recording():
        kept = openai.DefaultAsyncHttpxClient(limits=Limits(keepalive_expiry=600))  # however slow the machine is
        client = openai.AsyncOpenAI(base_url=seven.base_url, api_key=seven.api_key, http_client=kept)

        async def workflow(question, llm):
            return await client.chat.completions.create(model="x", messages=QUESTION)

        adapter = FakeAdapter(policy=Caller(coin))
        run = closing(ft.Run(workflow, right, sums(1), adapter=adapter, generations=1, output_dir=tmp_path))
        await client.chat.completions.create(model="x", messages=QUESTION)  # its connection belongs to this loop now
        failure = await run.rollout()
    assert "belongs to the cell's. Make it inside the workflow, or take llm.openai()" in failure.error


async def test_a_sync_client_outside_a_rollout_is_an_error_that_says_so(seven):
    with pytest.raises(RunError, match="no rollout runs here"):
        SyncLLM(seven, asyncio.get_running_loop()).openai()
