"""Options that client libraries send: what is honoured, what changes nothing, what a run ignores, what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import urllib.error
import urllib.request

import pytest
from small_agents import right

import finetune_nb as ft
from finetune_nb.llms import gateway as gateway_module
from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.openai_wire import Refused, read_request
from finetune_nb.llms.protocols import messages, responses
from finetune_nb.llms.protocols.options import Abilities
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.types import EpisodeKey, ReplyFormat, SamplingParams

QUESTION = [{"role": "user", "content": "3+4"}]
PARAMETERS = {"type": "object", "properties": {}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("add", "sub")]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "sub"}}
ABLE, UNABLE = Abilities(SamplingParams(), constrains=True), Abilities(SamplingParams())


class Caller(ScriptedPolicy):
    """Calls the tool `add` twice at once, as a policy that writes calls as text."""

    def parse(self, ids):
        call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
        return {"role": "assistant", "content": None, "tool_calls": [dict(call), dict(call)]}


def chat(abilities=ABLE, **options):
    return read_request(json.dumps({"messages": QUESTION, **options}).encode(), True, abilities)


def ask(llm, path="chat/completions", agent="test", **options):
    """Status and answer."""
    data = json.dumps({"messages": QUESTION, **options}).encode()
    headers = {"Authorization": f"Bearer {llm.api_key}", "User-Agent": agent}
    request = urllib.request.Request(f"{llm.base_url}/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


# ── what is honoured ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tools": TOOLS, "tool_choice": "auto"}, None),
        ({"tools": TOOLS, "tool_choice": "none"}, None),
        ({"tools": TOOLS, "tool_choice": "required"}, ReplyFormat(None, json.dumps(TOOLS), True)),
        (
            {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
            ReplyFormat(None, json.dumps(TOOLS), True, False),
        ),
        ({"tools": TOOLS, "tool_choice": NAMED}, ReplyFormat(None, json.dumps(TOOLS[1:]), True, False)),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
            },
            ReplyFormat(None, json.dumps(TOOLS[1:]), True, False),
        ),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ReplyFormat('{"type": "object"}')),
        ({"response_format": JSON_SCHEMA}, ReplyFormat(json.dumps(SCHEMA))),
        ({"response_format": JSON_SCHEMA, "tools": TOOLS}, ReplyFormat(json.dumps(SCHEMA), json.dumps(TOOLS))),
        ({"response_format": JSON_SCHEMA, "tools": TOOLS, "tool_choice": "none"}, ReplyFormat(json.dumps(SCHEMA))),
    ],
)
def test_the_form_that_a_reply_is_held_to(options, expected):
    assert chat(**options).params.reply_format == expected


async def test_no_tool_is_called_where_none_may_be_and_one_at_a_time_where_one_may_be():
    llm = PolicyLLM(Caller(lambda messages, seed: "call add\ncall add"))
    with (one := CallRecorder(EpisodeKey("train", 0, 0, 0))).recording():
        _, none = await asyncio.to_thread(ask, llm, tools=TOOLS, tool_choice="none")
        _, single = await asyncio.to_thread(ask, llm, tools=TOOLS, parallel_tool_calls=False)
        _, several = await asyncio.to_thread(ask, llm, tools=TOOLS)
    none, single, several = (answer["choices"][0]["message"] for answer in (none, single, several))
    assert (none["content"], none.get("tool_calls")) == ("call add\ncall add", None)
    assert (len(single["tool_calls"]), len(several["tool_calls"])) == (1, 2)
    assert [call.tools for call in one.calls] == [TOOLS] * 3
    assert [len(call.response_ids) for call in one.calls] == [len("call add\ncall add")] * 3


async def test_alternatives_are_left_empty_where_the_policy_gives_none():
    llm = PolicyLLM(ScriptedPolicy())
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
        _, answer = await asyncio.to_thread(ask, llm, logprobs=True, top_logprobs=3)
    assert [entry["top_logprobs"] for entry in answer["choices"][0]["logprobs"]["content"]] == [[], []]


async def test_alternatives_that_the_policy_gives_are_answered_and_recorded():
    class Sure(ScriptedPolicy):
        async def sample(self, ids, params, seed):
            sample = await super().sample(ids, params, seed)
            return sample._replace(likeliest=[{token: -1.0, 33: -2.0} for token in sample.ids])

    llm = PolicyLLM(Sure())
    with (one := CallRecorder(EpisodeKey("train", 0, 0, 0))).recording():
        _, answer = await asyncio.to_thread(ask, llm, logprobs=True, top_logprobs=2)
        _, completion = await asyncio.to_thread(ask, llm, "completions", prompt="a", messages=None, logprobs=2)
    first = answer["choices"][0]["logprobs"]["content"][0]
    assert [(top["token"], top["logprob"]) for top in first["top_logprobs"]] == [("o", -1.0), ("!", -2.0)]
    assert completion["choices"][0]["logprobs"]["top_logprobs"] == [{"o": -1.0, "!": -2.0}, {"k": -1.0, "!": -2.0}]
    assert [call.top_logprobs for call in one.calls] == [[{"o": -1.0, "!": -2.0}, {"k": -1.0, "!": -2.0}]] * 2


def test_strict_tools_are_shown_to_the_model_as_others_and_held_to_their_schemas_where_a_call_must_be_made():
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    free, held = chat(tools=strict), chat(tools=strict, tool_choice="required")
    assert free.tools == held.tools == TOOLS
    assert (free.ignored, held.ignored) == (("strict",), ())
    loose = [{**tool, "function": {**tool["function"], "strict": False}} for tool in TOOLS]
    assert (chat(tools=loose).tools, chat(tools=loose).ignored) == (TOOLS, ())


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0},
        {"reasoning_effort": "medium"},
        {"verbosity": "medium"},
        {"service_tier": "auto", "store": True, "metadata": {"a": "b"}, "user": "me"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "stream_options": {"include_usage": True}},
        {"prediction": {"type": "content", "content": "7"}},
        {"modalities": ["text"], "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"tool_choice": "none"},
        {"parallel_tool_calls": False, "tool_choice": "auto"},
    ],
)
def test_options_that_change_nothing_are_taken_by_every_policy(options):
    for abilities in (ABLE, UNABLE):
        request = chat(abilities, **options)
        assert (request.params, request.options, request.ignored) == (SamplingParams(), {}, ())


@pytest.mark.parametrize(
    ("template", "effort", "expected"),
    [
        ("{{ reasoning_effort }}", "high", {"reasoning_effort": "high"}),
        ("{% if enable_thinking %}", "none", {"enable_thinking": False}),
        ("{{ messages }}", "none", {}),
        ("<think>", "none", None),
        ("{% if enable_thinking %}", "high", None),
    ],
)
def test_an_effort_is_a_variable_of_a_chat_template_that_has_one_for_it(template, effort, expected):
    abilities = Abilities(SamplingParams(), template=template)
    if expected is None:
        with pytest.raises(Refused, match="cannot honour reasoning_effort"):
            chat(abilities, reasoning_effort=effort)
    else:
        assert chat(abilities, reasoning_effort=effort).options.get("chat_template_kwargs", {}) == expected


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"verbosity": "low"}, "cannot honour verbosity="),
        ({"reasoning_effort": "high"}, "cannot honour reasoning_effort="),
        ({"top_p": 0.9}, "cannot honour top_p="),
        ({"response_format": {"type": "grammar"}}, "expected text, json_object, or json_schema"),
        ({"tools": TOOLS, "tool_choice": "sub"}, "the name of a tool"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "mul"}}},
            "it has: add, sub",
        ),
        ({"tool_choice": "required"}, "it has: none"),
        ({"parallel_tool_calls": "no"}, "expected true or false"),
        ({"top_logprobs": 21}, "from 0 to 20"),
        ({"functions": [{"name": "add"}]}, "cannot honour functions="),
    ],
)
def test_the_rest_is_refused(options, said):
    with pytest.raises(Refused) as caught:
        chat(**options)
    assert said in str(caught.value)
    if "cannot honour" in said:
        assert '(..., gateway={"ignore": ["' in str(caught.value)


@pytest.mark.parametrize(
    ("agent", "cure"),
    [
        ("pydantic-ai/2.0", "(pydantic-ai: no openai_text_verbosity in model_settings)"),
        ("Agents/Python 0.4", "(openai-agents: ModelSettings(verbosity=None))"),
        ("AsyncOpenAI/Python 3.54", "LangChain: ChatOpenAI(verbosity=None)"),
    ],
)
async def test_a_refusal_says_how_the_library_leaves_the_option_out(agent, cure):
    llm = PolicyLLM(ScriptedPolicy())
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
        status, message = await asyncio.to_thread(ask, llm, agent=agent, verbosity="low")
    assert (status, cure in message) == (400, True)


STRANGE = [
    0,
    1.5,
    "x",
    "",
    True,
    [],
    {},
    [1],
    ["x"],
    [{}],
    {"type": 1},
    {"type": "function"},
    [{"type": "function"}],
    [[]],
]
FIELDS = {
    "chat": [
        "messages",
        "tools",
        "tool_choice",
        "response_format",
        "stop",
        "n",
        "top_logprobs",
        "stream_options",
        "model",
    ],
    "responses": [
        "input",
        "instructions",
        "tools",
        "tool_choice",
        "text",
        "reasoning",
        "include",
        "previous_response_id",
    ],
    "messages": [
        "messages",
        "system",
        "tools",
        "tool_choice",
        "thinking",
        "output_config",
        "stop_sequences",
        "max_tokens",
    ],
}
READERS = {
    "chat": lambda body: read_request(body, True, ABLE),
    "responses": lambda body: responses.read(
        body, ABLE, responses.ResponseStore(), CallRecorder(EpisodeKey("train", 0, 0, 0))
    ),
    "messages": lambda body: messages.read(body, ABLE),
}


@pytest.mark.parametrize("protocol", FIELDS)
def test_a_request_of_any_shape_is_read_or_refused(protocol):
    shapes = {
        "chat": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": None}],
        "responses": [{"role": "user", "content": "x"}, {"type": "function_call", "call_id": None}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    }[protocol]
    place = "input" if protocol == "responses" else "messages"
    nested = [{**item, key: value} for item in shapes for key in ("role", "type", "content") for value in STRANGE]
    bodies = [{place: shapes, name: value} for name, value in itertools.product(FIELDS[protocol], STRANGE)]
    bodies += [{place: [shapes[0], item]} for item in nested]
    for body in bodies:
        with contextlib.suppress(Refused):
            READERS[protocol](json.dumps(body).encode())


# ── what a run ignores ───────────────────────────────────────────────────────────────────────────────────────────────


async def by_client(question, llm):
    answer = await llm.openai().chat.completions.create(
        model="x", messages=[{"role": "user", "content": question}], verbosity="low", top_p=0.5
    )
    return answer.choices[0].message.content


async def test_a_run_takes_what_it_is_told_to_ignore_and_its_record_names_it(tmp_path, closing, caplog, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr(gateway_module, "_said", set())
    options = {"adapter": FakeAdapter(), "generations": 2, "output_dir": tmp_path}
    refusing = closing(ft.Run(by_client, right, sums(1), **options))
    epoch = await refusing.next_epoch()
    assert epoch.metrics.failures == 2
    options["adapter"] = FakeAdapter()
    run = closing(
        ft.Run(by_client, right, sums(2), **options, gateway={"ignore": ["verbosity", "top_p"]}, name="taken")
    )
    with caplog.at_level(logging.WARNING):
        epoch = await run.next_epoch()
    assert epoch.metrics.failures == 0
    turns = [item for group in epoch.collection.trajectories for t in group for item in t.episode if item.logprobs]
    assert [sorted(turn.metadata["ignored"]) for turn in turns] == [["top_p", "verbosity"]] * 4
    assert sum("is ignored in sampling" in record.getMessage() for record in caplog.records) == 1
    reopened = ft.Run.open(run.folder)
    turn = reopened.show(0).trajectory.episode[-1]
    assert sorted(turn.metadata["ignored"]) == ["top_p", "verbosity"]


@pytest.mark.parametrize(
    ("read", "body", "ignored"),
    [
        ("responses", {"input": "x", "text": {"verbosity": "low"}}, ("text.verbosity",)),
        ("responses", {"input": "x", "reasoning": {"effort": "high"}}, ("reasoning",)),
        ("messages", {"messages": QUESTION, "thinking": {"type": "enabled", "budget_tokens": 9}}, ("thinking",)),
        ("messages", {"messages": QUESTION, "output_config": {"effort": "low"}}, ("output_config.effort",)),
    ],
)
def test_what_is_ignored_may_be_named_as_the_clients_api_names_it(read, body, ignored):
    names = {"text.verbosity", "reasoning", "thinking", "reasoning_effort"}
    abilities = Abilities(SamplingParams(), ignore=frozenset(names))
    data = json.dumps(body).encode()
    episode = CallRecorder(EpisodeKey("train", 0, 0, 0))
    found = (
        messages.read(data, abilities)
        if read == "messages"
        else responses.read(data, abilities, responses.ResponseStore(), episode)
    )
    assert found.ignored == ignored


def test_what_makes_a_request_cannot_be_ignored():
    with pytest.raises(ft.ConfigError, match="found messages in ignore"):
        ft.load_config({"run": {"gateway": {"ignore": ["messages"]}}})
    with pytest.raises(ft.ConfigError, match="ignore"):
        ft.load_config({"run": {"gateway": {"ignored": ["verbosity"]}}})
