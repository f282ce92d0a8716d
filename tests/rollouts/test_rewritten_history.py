"""Clients that rewrite replies when they send the history back: one conversation, drift that is counted, ids that stay exact."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import re

import pytest
from hostile import text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import LoopbackServer

import finetune_nb as ft
from finetune_nb.examples.calculator.task import TOOLS, answer, calculate, first_operation
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.chat_messages import same_message
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.rollouts.episodes import drift, episode_from_steps
from finetune_nb.testing import FakeAdapter, ScriptedPolicy
from finetune_nb.types import EpisodeKey, EvalInputItem, SamplingParams, Trajectory

openai = pytest.importorskip("openai")

QUESTIONS = ["12+7-3", "1+2+3+4", "5-8"]
ROWS = [{"id": f"q{i}", "question": question, "answer": answer(question)} for i, question in enumerate(QUESTIONS)]
TURNS = {question: len(re.findall(r"\d[+-]", question)) + 1 for question in QUESTIONS}
"""Replies to each: one call of the tool for every operation, and the answer."""


# ── a model that calls tools, and agents that ask it ─────────────────────────────────────────────────────────────────


class Calculating(ScriptedPolicy):
    """Calls the calculator until nothing is left to do, in JSON that no client would write this way."""

    def __init__(self, content=None, spelled='{ "round":1.0,"expression" :"%s" , "unit": "\\u20ac é"}'):
        super().__init__(lambda messages, seed: self.next(messages))
        self.content, self.spelled, self.sampled = content, spelled, []

    def next(self, messages):
        remaining = messages[-1]["content"]
        operation = first_operation(remaining)
        return f"call {self.spelled % operation}" if operation else f"={remaining}"

    async def sample(self, ids, params, seed):
        sample = await super().sample(ids, params, seed)
        self.sampled.append((list(ids), sample.ids))
        return sample

    def parse(self, ids):
        message = super().parse(ids)
        if not message["content"].startswith("call "):
            return message
        function = {"name": "calculator", "arguments": message["content"].removeprefix("call ")}
        calls = [{"type": "function", "function": function}]
        return {"role": "assistant", "content": self.content, "tool_calls": calls}


class Rerendering(Calculating):
    """Renders every conversation from the start, and prints the arguments of tool calls as the text they are."""

    def render(self, messages, tools=None, previous_ids=None):
        ids = [ord(c) for c in rendered(messages)]
        self._rendered[tuple(ids)] = list(messages)
        return ids


def rendered(messages):
    """A prompt as written by a chat template that prints arguments as text: a call is what the model said, "call {...}"."""
    return "".join(f"<{message['role']}>{said_in(message)}" for message in messages) + "<assistant>"


def said_in(message):
    calls = [f"call {call['function']['arguments']}" for call in message.get("tool_calls") or ()]
    return (message.get("content") or "") + "".join(calls)


class Desk:
    """The calculator of one rollout, which knows what remains."""

    def __init__(self, question):
        self.remaining = question

    def use(self, arguments):
        """Does the operation, and returns what remains after it."""
        done = calculate(str((arguments or {}).get("expression")), self.remaining)
        self.remaining = self.remaining if done is None else done
        return self.remaining


async def by_chat(question, llm):
    desk, messages = Desk(question), [{"role": "user", "content": question}]
    while (reply := await llm.chat(messages, tools=TOOLS)).tool_calls:
        messages.append(reply)
        for call in reply.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": desk.use(call.arguments)})
    return reply.content.removeprefix("=")


async def by_pydantic_ai(question, llm, again=0):
    from pydantic_ai import Agent, Tool
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    desk, function = Desk(question), TOOLS[0]["function"]
    tool = Tool.from_schema(lambda **arguments: desk.use(arguments), function["name"], "", function["parameters"])
    model = OpenAIChatModel("x", provider=OpenAIProvider(openai_client=llm.openai()))
    agent = Agent(model, tools=[tool], retries=5)
    result = await agent.run(question)
    for _ in range(again):
        result = await agent.run("again", message_history=result.all_messages())
    return result.output.removeprefix("=")


async def by_langchain(question, llm):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=llm.base_url, api_key=llm.api_key, model="x").bind_tools(TOOLS)
    desk, messages = Desk(question), [HumanMessage(question)]
    while (turn := await model.ainvoke(messages)).tool_calls or turn.invalid_tool_calls:
        messages.append(turn)
        for call in turn.tool_calls:
            messages.append(ToolMessage(desk.use(call["args"]), tool_call_id=call["id"]))
        for call in turn.invalid_tool_calls:
            messages.append(ToolMessage(desk.use(None), tool_call_id=call["id"]))
    return turn.content.removeprefix("=")


async def by_vercel(question, llm):
    """The requests that `generateText` of the Vercel AI SDK 6 sends through @ai-sdk/openai-compatible, made by hand."""
    client, desk, messages = llm.openai(), Desk(question), [{"role": "user", "content": question}]
    while True:
        completion = await client.chat.completions.create(model="x", messages=messages, tools=TOOLS, tool_choice="auto")
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content.removeprefix("=")
        calls, results = [], []
        for call in message.tool_calls:
            arguments = read_by_javascript(call.function.arguments)
            written = json.dumps({} if arguments is None else arguments, separators=(",", ":"), ensure_ascii=False)
            function = {"name": call.function.name, "arguments": written}
            calls.append({"id": call.id, "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": call.id, "content": desk.use(arguments)})
        messages += [{"role": "assistant", "content": message.content or None, "tool_calls": calls}, *results]


def read_by_javascript(text):
    """What JSON.parse reads, with whole numbers that are written without a point; None where the text is not JSON."""

    def number(digits):
        value = float(digits)
        return int(value) if value.is_integer() else value

    try:
        return json.loads(text, parse_float=number)
    except ValueError:
        return None


def client_of(workflow, package):
    """A client to test with, where its package is installed."""
    missing = importlib.util.find_spec(package) is None
    return pytest.param(workflow, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


CLIENTS = [client_of(by_pydantic_ai, "pydantic_ai"), client_of(by_langchain, "langchain_openai"), by_vercel]


@pytest.fixture(autouse=True)
async def close_clients():
    yield
    await gateway().close_clients()


def right(item):
    return float(item.output_obj == item.expected_output_obj)


async def one_epoch(workflow, policy, folder, closing):
    """A run of that name, after an epoch of two generations."""
    run = closing(
        ft.Run(
            workflow,
            right,
            ROWS,
            adapter=FakeAdapter(policy=policy),
            generations=2,
            output_dir=folder,
            name=workflow.__name__,
        )
    )
    epoch = await run.next_epoch()
    assert epoch.collection.failures == []
    return run, epoch


def trajectory_of(episode):
    item = EvalInputItem(id="q", input_obj="", expected_output_obj="", full_dataset_entry={})
    item.trajectory = episode.steps()
    return Trajectory(episode=episode_from_steps(item.trajectory)[0], reward=0.0)


def is_one_conversation(episode):
    return not any((item.metadata or {}).get("conversation") for item in trajectory_of(episode).episode)


def sent_back(episode):
    """Each reply that came back in the next prompt, and the message that came back."""
    calls = sorted(episode.calls, key=lambda call: call.sequence)
    return [(before.reply, after.messages[len(before.messages)]) for before, after in itertools.pairwise(calls)]


# ── one conversation ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("content", [None, "", "<think>\nhm\n</think>\n\nlet me see "])
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_that_rewrites_the_history_leaves_the_messages_that_llm_chat_leaves(
    client, content, tmp_path, closing
):
    by_hand, hand = await one_epoch(by_chat, Calculating(content), tmp_path, closing)
    run, epoch = await one_epoch(client, policy := Calculating(content), tmp_path, closing)

    assert run.trajectories()["turns"].tolist() == [2 * TURNS[row["question"]] for row in ROWS for _ in range(2)]
    pairs = [(by_hand.trajectories(), run.trajectories()), (by_hand.messages(), run.messages())]
    for theirs, ours in pairs:
        timed = [name for name in theirs.columns if "seconds" in name]
        assert ours.drop(columns=timed).equals(theirs.drop(columns=timed))
    for row in ROWS:
        views = [text_of(shown.show(example=row["id"])._repr_html_()) for shown in (by_hand, run)]
        assert "a new conversation" not in views[1]
        theirs, ours = (re.sub(r"[\d.]+ (s|ms|µs)\b", "", view) for view in views)
        assert ours == theirs
    assert (epoch.metrics.mean_reward, hand.metrics.mean_reward) == (1.0, 1.0)

    # Each prompt continues the ids that were sampled, whatever the client sent back.
    sampled = [turn for t in trajectories(epoch) for turn in t.episode if turn.role == "assistant"]
    assert all(turn.metadata["exact"] for turn in sampled)
    assert sorted((turn.metadata["prompt_token_ids"], turn.metadata["token_ids"]) for turn in sampled) == sorted(
        policy.sampled
    )
    assert (epoch.metrics.continued_turns, epoch.metrics.drifted_turns) == (2 * sum(TURNS.values()) - 6, 0)


def trajectories(epoch):
    return [trajectory for group in epoch.collection.trajectories for trajectory in group]


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("client", CLIENTS)
async def test_these_clients_really_rewrite_the_arguments(client):
    llm = PolicyLLM(Calculating())
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        await client("12+7-3", llm)
    pairs = sent_back(episode)
    assert len(pairs) == 2
    for reply, back in pairs:
        spelled = [message["tool_calls"][0]["function"]["arguments"] for message in (reply, back)]
        assert spelled[0] != spelled[1]
        assert json.loads(spelled[0]) == json.loads(spelled[1])


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_call_that_is_not_json_does_not_split_the_conversation(client):
    class Stumbling(Calculating):
        def next(self, messages):
            return 'call {"expression": "12' if len(messages) == 1 else super().next(messages[:1] + messages[3:])

    llm = PolicyLLM(Stumbling())
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        await client("12+7-3", llm)
    assert len(episode.calls) == 4
    assert is_one_conversation(episode)
    assert drift([trajectory_of(episode)]) == (3, 0)


async def test_an_agent_that_changes_what_was_called_starts_another_conversation():
    llm = PolicyLLM(Calculating())
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        messages = [{"role": "user", "content": "12+7"}]
        reply = (await llm.chat(messages, tools=TOOLS)).message
        function = {"name": "calculator", "arguments": '{"expression": "12+8"}'}
        other = {**reply, "tool_calls": [{**reply["tool_calls"][0], "function": function}]}
        result = {"role": "tool", "tool_call_id": "call_0_0", "content": "20"}
        await llm.chat([*messages, other, result], tools=TOOLS)
    turns = trajectory_of(episode).episode
    assert [(item.metadata or {}).get("conversation", 0) for item in turns] == [0, 0, 1, 1, 1, 1]
    assert drift([trajectory_of(episode)]) == (0, 0)


async def test_a_text_sent_in_parts_is_shown_as_one_text():
    parts = [{"type": "text", "text": "is it "}, {"type": "text", "text": "7?"}]
    with LoopbackServer(lambda request: "yes", token_ids=False) as server:
        config = {"llms": {"m": {"_type": "openai", "model_name": "m", "base_url": server.base_url}}}
        async with ft.Builder(ft.load_config(config)) as builder:
            llm = await builder.get_llm("m")
            with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
                create = llm.openai().chat.completions.create
                messages = [{"role": "user", "content": parts}]
                first = (await create(model="m", messages=messages)).choices[0].message.content
                said = [{"type": "text", "text": first}]
                again = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "sure?"}]
                await create(model="m", messages=again)
    assert [item.content for item in trajectory_of(episode).episode] == ["is it 7?", "yes", "sure?", "yes"]


# ── what is the same message ─────────────────────────────────────────────────────────────────────────────────────────


def reply_with(arguments, **fields):
    call = {"id": "call_0_0", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **fields}


def both(*arguments, order=(0, 1), **fields):
    calls = [
        {"id": f"call_0_{i}", "function": {"name": "add", "arguments": found}} for i, found in enumerate(arguments)
    ]
    return {"role": "assistant", "content": None, "tool_calls": [calls[i] for i in order], **fields}


def said(content, **fields):
    return {"role": "assistant", "content": content, **fields}


BARE = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
INDEXED = {**BARE, "tool_calls": [{**BARE["tool_calls"][0], "index": 0, "type": "function", "id": "call_0_0"}]}
SAME = {
    "spaces": (reply_with('{ "a" :1,\n"b": [ 1 ] }'), reply_with('{"a":1,"b":[1]}')),
    "order of keys": (reply_with('{"a": 1, "b": 2}'), reply_with('{"b": 2, "a": 1}')),
    "escapes": (reply_with(r'{"a": "\u00e9\/\u2028 \ud83d\ude00"}'), reply_with('{"a": "é/\u2028 \U0001f600"}')),
    "a line break within a text": (reply_with('{"a": "x\ny"}'), reply_with('{"a": "x\\ny"}')),
    "numbers": (reply_with('{"a": 1.0, "b": 1e3, "c": -0.0}'), reply_with('{"a": 1, "b": 1000, "c": 0}')),
    "a number that JavaScript rounds": (reply_with('{"a": 12345678901234567890}'), reply_with('{"a":12345678901234567000}')),
    "a key that comes twice": (reply_with('{"a": 1, "a": 2}'), reply_with('{"a": 2}')),
    "NaN": (reply_with('{"a": NaN}'), reply_with('{"a":NaN}')),
    "arguments as an object": (reply_with('{"a": 1}'), reply_with({"a": 1})),
    "no arguments": (reply_with(""), reply_with("{}")),
    "arguments that are missing": (reply_with(None), reply_with("{}")),
    "null": (reply_with("null"), reply_with("{}")),
    "a list": (reply_with("[1, 2]"), reply_with("[1,2]")),
    "no JSON, left as it is": (reply_with('{"a": 1'), reply_with('{"a": 1')),
    "no JSON, left out": (reply_with('{"a": 1'), reply_with("{}")),
    "no JSON, under a name": (reply_with('{"a": "\n1'), reply_with(json.dumps({"INVALID_JSON": '{"a": "\n1'}))),
    "calls in another order": (both("x", '{"a": 2}'), both("x", '{"a":2}', order=(1, 0))),
    "more or less fields of a call": (BARE, INDEXED),
    "no content": (reply_with("{}"), reply_with("{}", content="")),
    "content that is missing": (reply_with("{}"), {k: v for k, v in reply_with("{}").items() if k != "content"}),
    "content in parts": (said("ab"), said([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
    "no parts": (said(""), said([])),
    "lines of thoughts": (said("<think>so\n</think>\n\n7 "), said("<think>\nso\n</think>\n\n\n\n7 ")),
    "thoughts that are left out": (said("7", reasoning_content="so"), said("7")),
    "more fields": (said("7"), said("7", refusal=None, annotations=[], audio=None, name="adder", tool_calls=[])),
    "a result": ({"role": "tool", "tool_call_id": "c", "content": "7"},
                 {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "7"}]}),
    "an older call": (said(None, function_call={"name": "add", "arguments": '{"a": 1}'}),
                      said("", function_call={"name": "add", "arguments": '{"a":1}'})),
}  # fmt: skip
PICTURE = {"type": "image_url", "image_url": {"url": "data:,a"}}
OTHER = {
    "role": (said("7"), {"role": "user", "content": "7"}),
    "text": (said("7"), said("8")),
    "white space at the end": (said("7"), said("7 ")),
    "white space around thoughts and text": (said("<think>so</think>7 8"), said("<think>so</think>7  8")),
    "no thoughts": (said("<think>so</think>7"), said("7")),
    "other thoughts": (said("7", reasoning_content="so"), said("7", reasoning_content="hm")),
    "name": (said("7", name="a"), said("7", name="b")),
    "arguments": (reply_with('{"a": 1}'), reply_with('{"a": 2}')),
    "a text for a number": (reply_with('{"a": 1}'), reply_with('{"a": "1"}')),
    "true for 1": (reply_with('{"a": 1}'), reply_with('{"a": true}')),
    "true for 1 in an object": (reply_with({"a": 1}), reply_with({"a": True})),
    "null for a key that is missing": (reply_with('{"a": null}'), reply_with("{}")),
    "arguments left out": (reply_with('{"a": 1}'), reply_with("{}")),
    "order in a list": (reply_with("[1, 2]"), reply_with("[2, 1]")),
    "no JSON, made JSON": (reply_with('{"a": 1'), reply_with('{"a": 1}')),
    "other text that is no JSON": (reply_with('{"a": 1'), reply_with('{"a": 2')),
    "other text under a name": (reply_with('{"a": 1'), reply_with('{"INVALID_JSON": "a"}')),
    "a text in quotes": (reply_with("abc"), reply_with('"abc"')),
    "tool": (reply_with("{}"), json.loads(json.dumps(reply_with("{}")).replace("add", "subtract"))),
    "id of a call": (reply_with("{}"), json.loads(json.dumps(reply_with("{}")).replace("call_0_0", "call_1_0"))),
    "arguments that changed places": (both('{"a": 1}', '{"a": 2}'), both('{"a": 2}', '{"a": 1}')),
    "a call more": (reply_with("{}"), both("{}", "{}")),
    "no call": (reply_with("{}"), said(None)),
    "id of a result": ({"role": "tool", "tool_call_id": "a", "content": "7"},
                       {"role": "tool", "tool_call_id": "b", "content": "7"}),
    "pictures": (said([PICTURE]), said([{**PICTURE, "image_url": {"url": "data:,b"}}])),
    "an older call": (said(None, function_call={"name": "add", "arguments": "{}"}), said(None)),
    "a call of a custom tool": (
        said(None, tool_calls=[{"id": "c", "type": "custom", "custom": {"name": "add", "input": "1"}}]),
        said(None, tool_calls=[{"id": "c", "type": "custom", "custom": {"name": "add", "input": "2"}}]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SAME.values(), ids=SAME)
def test_what_a_client_may_rewrite_is_the_same_message(a, b):
    assert same_message(a, b)
    assert same_message(b, a)


@pytest.mark.parametrize(("a", "b"), OTHER.values(), ids=OTHER)
def test_what_says_something_else_is_another_message(a, b):
    assert not same_message(a, b)
    assert not same_message(b, a)


@pytest.mark.parametrize("strange", [3, "x", [3], [None], {"function": 3}, [{"function": {}}], [{"id": {}}]])
def test_malformed_messages_are_compared_without_an_error(strange):
    for key in ("content", "tool_calls", "function_call", "name", "tool_call_id"):
        message = {"role": "assistant", key: strange}
        assert same_message(message, json.loads(json.dumps(message)))
        assert not same_message(message, {"role": "user", key: strange})
    assert same_message(reply_with("[" * 100_000), reply_with("[" * 100_000))
    assert not same_message(reply_with("[" * 100_000), reply_with("[" * 100_001))


NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(), VALUES, max_size=3),
    st.sampled_from([None, (",", ":"), (" , ", " : ")]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_arguments_are_the_same_in_any_spelling(arguments, separators, ascii_only, sort, indent):
    written = json.dumps(arguments, separators=separators, ensure_ascii=ascii_only, sort_keys=sort, indent=indent)
    assert same_message(reply_with(json.dumps(arguments)), reply_with(written))
    assert same_message(reply_with(written), reply_with(arguments))
    assert not same_message(reply_with(written), reply_with(json.dumps({**arguments, "one more": 1})))


# ── drift ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("client", CLIENTS)
async def test_turns_rendered_from_rewritten_arguments_are_counted_as_drifted(client, tmp_path, closing):
    continued = 2 * sum(TURNS.values()) - 6
    run, epoch = await one_epoch(by_chat, Rerendering(), tmp_path, closing)
    assert (epoch.metrics.continued_turns, epoch.metrics.drifted_turns) == (continued, 0)

    run, epoch = await one_epoch(client, Rerendering(), tmp_path, closing)
    assert (epoch.metrics.continued_turns, epoch.metrics.drifted_turns) == (continued, continued)
    assert run.epochs()[["continued_turns", "drifted_turns"]].iloc[0].tolist() == [continued, continued]
    for trajectory in trajectories(epoch):
        first, *others = [turn.metadata for turn in trajectory.episode if turn.role == "assistant"]
        assert "drifted" not in first
        assert all(metadata["drifted"] and metadata["exact"] for metadata in others)


class RenderingServer(LoopbackServer):
    """Renders the messages it is sent, arguments as the text they are, and samples the replies of Rerendering."""

    def __init__(self):
        self.model = Rerendering()
        super().__init__(lambda request: self.model.parse(map(ord, self.model.next(request.body["messages"]))))

    def answer(self, request, reply):
        for i, call in enumerate(reply.get("tool_calls", ())):
            call["id"] = f"call_{len(self.requests)}_{i}"
        status, found = super().answer(request, reply)
        (choice,), said = found["choices"], said_in(reply)
        tokens = [{"token": c, "logprob": -1.0, "bytes": None, "top_logprobs": []} for c in said]
        choice["token_ids"], choice["logprobs"] = [ord(c) for c in said], {"content": tokens}
        found["prompt_token_ids"] = [ord(c) for c in rendered(request.body["messages"])]
        return status, found


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("client", [by_chat, *CLIENTS])
async def test_drift_is_counted_when_a_server_renders_the_rewritten_history(client):
    with RenderingServer() as server:
        config = {"llms": {"m": {"_type": "openai", "model_name": "m", "base_url": server.base_url}}}
        async with ft.Builder(ft.load_config(config)) as builder:
            llm = await builder.get_llm("m")
            with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
                assert await client("1+2+3+4", llm) == "10"
    assert is_one_conversation(episode)
    assert all(call.exact for call in episode.calls)
    assert drift([trajectory_of(episode)]) == (3, 0 if client is by_chat else 3)


@pytest.mark.slow
@pytest.mark.proof
async def test_ids_stay_exact_with_a_real_model_whose_json_is_rewritten():
    for package in ("torch", "transformers", "pydantic_ai"):
        pytest.importorskip(package)
    from finetune_nb.backends.local.policy import LocalPolicy

    policy, sampled = LocalPolicy.load("embedded"), []
    sample = policy.sample

    async def keeping(ids, params, seed):
        found = await sample(ids, params, seed)
        sampled.append((list(ids), list(found.ids)))
        return found

    policy.sample = keeping
    llm = PolicyLLM(policy, sampling=SamplingParams(1.0, 24))

    async def rollout(n, question):
        with CallRecorder(EpisodeKey("train", 0, n, 0), seed=1).recording([policy]) as episode:
            await by_pydantic_ai(question, llm, again=2)
        return episode

    episodes = await asyncio.gather(*(rollout(n, question) for n, question in enumerate(QUESTIONS * 4)))
    calls = [call for episode in episodes for call in episode.calls]
    assert sorted((call.prompt_ids, call.response_ids) for call in calls) == sorted(sampled)
    assert all(call.exact for call in calls)
    assert all(map(is_one_conversation, episodes))
    assert drift(map(trajectory_of, episodes)) == (len(calls) - len(episodes), 0)
    rewritten = [reply != back for episode in episodes for reply, back in sent_back(episode)]
    print(f"\n{len(episodes)} episodes, {len(calls)} turns, {sum(rewritten)} of them rewritten by the client")
    assert sum(rewritten) > 5
