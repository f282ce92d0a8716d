"""Agents with tools and a model that calls them in each format: what is recorded is what was sampled, through every client."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("openai")

from chat_families import CALL_ENDS, ENDS, ScriptedModel, drift_of, spelled, template_of, tokenizer_of

from finetune_nb.llms.call_recorder import CallRecorder
from finetune_nb.llms.client import PolicyLLM
from finetune_nb.llms.gateway import gateway
from finetune_nb.types import EpisodeKey

PROPERTIES = {"expression": {"type": "string", "description": "what to compute"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["expression"]}
TOOLS = [{"type": "function", "function": {"name": "calc", "description": "computes", "parameters": PARAMETERS}}]
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}CALLS{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
"""A template as Mistral's are: it refuses ids that are not its own, and shows the tools beside the newest question alone."""
MISTRAL = PLAIN.replace(
    "CALLS",
    "[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{% endfor %}]</s>",
)
PYTHONIC = PLAIN.replace(
    "CALLS",
    "[{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}"
    "{% endfor %}){% endfor %}]</s>",
)
OWN = {"mistral": MISTRAL, "pythonic": PYTHONIC}
TAGGED = "<tool_call>\n<function=calc>\n<parameter=expression>\n%s\n</parameter>\n</function>\n</tool_call>"
CHANNELS = (
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.calc<|channel|>commentary json<|message|>"
    '{"expression": "%s"}'
)
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>calc\n```json\n"
    '{"expression":"%s"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
FORMATS = {
    "hermes": ("qwen3", '<tool_call>\n{"name": "calc", "arguments":  {"expression":"%s" }}\n</tool_call>'),
    "llama3_json": ("llama3_2", '{"name":"calc",  "parameters": {"expression":"%s"}}'),
    "qwen3_coder": ("qwen3_5_nothink", TAGGED),
    "glm45": ("glm4moe", "<tool_call>calc\n<arg_key>expression</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>"),
    "openai": ("gptoss", CHANNELS),
    "gemma4": ("gemma4_v5", '<|tool_call>call:calc{expression:<|"|>%s<|"|>}<tool_call|>'),
    "deepseek_v3": ("deepseekv3", DEEPSEEK),
    "lfm2": ("lfm2_2_5", "<|tool_call_start|>[calc(expression='%s')]<|tool_call_end|>"),
    "mistral": ("mistral", '[TOOL_CALLS] [{"name": "calc", "arguments": {"expression": "%s"}}]'),
    "pythonic": ("pythonic", "[calc(expression='%s')]"),
}
"""The template of a model that calls so, and a call as it might write it: not as the template would."""
ANSWERS = {"openai": "<|channel|>final<|message|>%s"}


def model_of(name, cut=False):
    """A model that calls the calculator twice and answers, then again; spelled as its tokenizer would not."""
    family, call = FORMATS[name]
    ends = ENDS.get(family, ["</s>"])
    tokenizer = tokenizer_of(OWN[family] if family in OWN else template_of(family), ends, "<s>")
    script = []
    for number, text in enumerate([call % "3+4", call % "3+4to", ANSWERS.get(name, "%s") % "too 7", call % "1", "so"]):
        end = ends[0] if text.endswith(("7", "so")) else CALL_ENDS.get(family, ends[0])
        script.append(
            spelled(tokenizer, text) + ([] if cut and number == 2 else tokenizer.convert_tokens_to_ids([end]))
        )
    return ScriptedModel(tokenizer, tokenizer.convert_tokens_to_ids(ends), script)


async def by_chat(llm, model):
    messages, called = [{"role": "user", "content": "what is 3+4?"}], []
    for _ in model.script:
        reply = await llm.chat(messages, tools=TOOLS)
        messages.append(reply)
        called += [call.arguments for call in reply.tool_calls]
        results = [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in reply.tool_calls]
        messages += results or [{"role": "user", "content": "and then?"}]
    return called


async def by_openai(llm, model):
    """An agent that sends back less than it got, written anew, as most libraries do."""
    client, messages, called = llm.openai(), [{"role": "user", "content": "what is 3+4?"}], []
    for _ in model.script:
        answer = await client.chat.completions.create(model="x", messages=messages, tools=TOOLS)
        turn = answer.choices[0].message
        calls = []
        for call in turn.tool_calls or ():
            called.append(json.loads(call.function.arguments))
            function = {"name": call.function.name, "arguments": json.dumps(called[-1], separators=(",", ":"))}
            calls.append({"id": call.id, "type": "function", "function": function})
        messages.append({"role": "assistant", "content": turn.content, **({"tool_calls": calls} if calls else {})})
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in calls]
        messages += results or [{"role": "user", "content": "and then?"}]
    await gateway().close_clients()
    return called


@pytest.mark.parametrize("agent", [by_chat, by_openai])
@pytest.mark.parametrize("name", FORMATS)
async def test_a_tool_loop_is_recorded_as_it_was_sampled(name, agent, caplog):
    model = model_of(name)
    assert model.template.tool_parser.name == name
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        called = await agent(PolicyLLM(model), model)
    assert called == [{"expression": "3+4"}, {"expression": "3+4to"}, {"expression": "1"}]
    assert [(call.prompt_ids, call.response_ids) for call in episode.calls] == model.sampled
    assert [reply for _, reply in model.sampled] == model.script
    stripped = name == "openai"  # gpt-oss's template takes thoughts out when the answer is there
    assert drift_of(episode) == (len(model.script) - 1, int(stripped))
    assert ("leaves tools out" in caplog.text) == (name == "deepseek_v3")  # whose template really does


@pytest.mark.parametrize("name", FORMATS)
async def test_the_format_may_be_named_and_is_that_of_the_replies(name):
    model = model_of(name)
    llm = PolicyLLM(model)
    llm.tool_parser = name
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
        reply = await llm.chat([{"role": "user", "content": "3+4?"}], tools=TOOLS)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("calc", {"expression": "3+4"})]
    other = "llama3_json" if name != "llama3_json" else "hermes"
    assert "tool_calls" not in model.parse(model.script[0], TOOLS, other)


async def test_a_reply_is_taken_as_it_is_where_no_tools_were_offered():
    model = model_of("pythonic")
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording():
        reply = await PolicyLLM(model).chat([{"role": "user", "content": "3+4?"}])
    assert (reply.content, reply.tool_calls) == ("[calc(expression='3+4')]", [])
    assert model.parse(model.script[0])["tool_calls"]  # who does not say what was offered gets what is there


async def test_a_call_that_cannot_be_read_is_plain_text_and_the_conversation_goes_on():
    model = model_of("pythonic")
    broken = spelled(model.tokenizer, "[calc(expression=")
    model.script = [[*broken, model.tokenizer.eos_token_id], model.script[2]]
    messages = [{"role": "user", "content": "3+4?"}]
    with CallRecorder(EpisodeKey("train", 0, 0, 0)).recording() as episode:
        reply = await PolicyLLM(model).chat(messages, tools=TOOLS)
        assert (reply.content, reply.tool_calls) == ("[calc(expression=", [])
        await PolicyLLM(model).chat([*messages, reply, {"role": "user", "content": "what?"}], tools=TOOLS)
    assert drift_of(episode) == (1, 0)
