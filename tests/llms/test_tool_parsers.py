"""Tool calls are read in the formats in which models write them; what cannot be read is plain text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_nb.errors import ConfigError
from finetune_nb.llms.client import PolicyLLMConfig
from finetune_nb.llms.tool_parsers import TOOL_PARSERS, parser_named, recognized

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "exact": {"type": "boolean"},
    "box": {"type": "array"},
    "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": PROPERTIES}}}
]
ARGUMENTS = {"city": "Zürich", "days": 3, "exact": True, "box": [1, {"a": "b"}], "limit": None}
WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
IN_PYTHON = "city='Zürich', days=3, exact=True, box=[1, {'a': 'b'}], limit=None"
TAGGED = {key: value if isinstance(value, str) else json.dumps(value) for key, value in ARGUMENTS.items()}
PARAMETERS = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in TAGGED.items())
KEYS = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in TAGGED.items())
IN_GEMMA = '{city:<|"|>Zürich<|"|>,days:3,exact:true,box:[1,{a:<|"|>b<|"|>}],limit:null}'

CALLS = {
    "hermes": f'<tool_call>\n{{"name": "look_up", "arguments": {WRITTEN}}}\n</tool_call>',
    "llama3_json": f'{{"name": "look_up", "parameters": {WRITTEN}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "look_up", "arguments": {WRITTEN}, "id": "a1b2c3d4e"}}]',
    "pythonic": f"[look_up({IN_PYTHON})]",
    "qwen3_coder": f"<tool_call>\n<function=look_up>\n{PARAMETERS}</function>\n</tool_call>",
    "glm45": f"<tool_call>look_up\n{KEYS}</tool_call>",
    "lfm2": f"<|tool_call_start|>[look_up({IN_PYTHON})]<|tool_call_end|>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n"
    f"{WRITTEN}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.look_up:0<|tool_call_argument_begin|>"
    f"{WRITTEN}<|tool_call_end|><|tool_calls_section_end|>",
    "gemma4": f"<|tool_call>call:look_up{IN_GEMMA}<tool_call|>",
    "openai": f"<|channel|>commentary to=functions.look_up <|constrain|>json<|message|>{WRITTEN}",
    "granite": f'<|tool_call|>[{{"name": "look_up", "arguments": {WRITTEN}}}]',
    "jamba": f'<tool_calls>[{{"name": "look_up", "arguments": {WRITTEN}}}]</tool_calls>',
    "phi4_mini_json": f'functools[{{"name": "look_up", "arguments": {WRITTEN}}}]',
}
FORMATS = sorted(CALLS)


def read(name, text):
    return parser_named(name).read(text, TOOLS)


def test_every_format_is_tested():
    assert {parser.name for parser in TOOL_PARSERS.values()} == set(CALLS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_is_read_with_its_arguments(name):
    found = read(name, CALLS[name])
    assert found.calls == [("look_up", ARGUMENTS)]
    assert found.content == ""


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"llama3_json", "pythonic", "openai"}))
def test_what_is_said_before_a_call_is_content(name):
    found = read(name, f"Let me see.\n\n{CALLS[name]}")
    assert (found.content, [called for called, _ in found.calls]) == ("Let me see.", ["look_up"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_reply_that_calls_nothing_has_no_calls(name):
    for text in ("It is 7.", "", '{"answer": 7}' if name != "llama3_json" else "7 {", "a [7] list", "<tool"):
        assert read(name, text).calls == []


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"pythonic", "lfm2"}))
def test_a_call_that_was_cut_is_not_read(name):
    text = CALLS[name]
    at = text.index("Zür") + 3
    if name in ("qwen3_coder", "glm45"):  # texts without quotes have no end that could be missing
        return
    with pytest.raises(ValueError):
        read(name, text[:at])


SEVERAL = {
    "hermes": '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n'
    '<tool_call>{"name": "b", "arguments": {"x": 1}}</tool_call>',
    "llama3_json": '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {"x": 1}}',
    "mistral": '[TOOL_CALLS]a[ARGS]{}[TOOL_CALLS]b[CALL_ID]a1b2c3d4e[ARGS]{"x": 1}',
    "pythonic": "<|python_start|>[a(), b(x=1)]<|python_end|>",
    "qwen3_coder": "<tool_call><function=a></function></tool_call><tool_call><function=b><parameter=x>1</parameter></function>",
    "glm45": "<tool_call>a</tool_call>\n<tool_call>b\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "lfm2": "<|tool_call_start|>[a(), b(x=1)]<|tool_call_end|>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    '<｜tool▁call▁begin｜>b<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "gemma4": "<|tool_call>call:a{}<tool_call|><|tool_call>call:b{x:1}<tool_call|>",
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_several_calls_are_read_in_order(name):
    tools = [{"function": {"name": "b", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}]
    assert parser_named(name).read(SEVERAL[name], tools).calls == [("a", {}), ("b", {"x": 1})]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>[{"name": "a", "arguments": {"x": 1}}]</tool_call>', [("a", {"x": 1})]),  # as SmolLM2 writes them
        ('<tool_call>{"name": "a", "arguments": {"x": 1}}', [("a", {"x": 1})]),
        ('<tool_call>{"name": "a", "arguments": {"x": "1\n2"}}</tool_call>', [("a", {"x": "1\n2"})]),
        ('<tool_call>{"name": "a", "arguments": "x"}</tool_call>', [("a", "x")]),
        ('<tool_call>{"name": "a", "parameters": null}</tool_call>', [("a", {})]),
        ("<think>\nhm\n</think>\n\n<tool_call>{\"name\": \"a\"}</tool_call>", [("a", {})]),
    ],
)  # fmt: skip
def test_spellings_of_hermes_are_read(text, calls):
    assert read("hermes", text).calls == calls


def test_channels_of_gpt_oss_are_thoughts_and_content():
    found = read("openai", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>7")
    assert (found.content, found.thought, found.calls) == ("7", "hm", [])
    assert read("openai", "no channel").content == "no channel"


def test_arguments_without_quotes_have_the_types_of_the_schema():
    given = "<parameter=city>75001</parameter><parameter=days>75001</parameter><parameter=x>1</parameter>"
    text = f"<function=look_up>{given}</function>"
    assert read("qwen3_coder", text).calls == [("look_up", {"city": "75001", "days": 75001, "x": "1"})]
    text = "<function=look_up><parameter=days>soon</parameter><parameter=limit>2.5</parameter></function>"
    assert read("qwen3_coder", text).calls == [("look_up", {"days": "soon", "limit": 2.5})]


@pytest.mark.parametrize(
    "text", ["[look_up(city=open('x'))]", "[look_up('Zürich')]", "[__import__('os').x()]", "[f(x=1"]
)
def test_python_that_is_no_list_of_calls_with_values_is_not_run(text):
    with pytest.raises(ValueError):
        read("pythonic", text)


PIECES = sorted(
    {*CALLS.values(), *SEVERAL.values(), "<tool_call>", "{", "}", "[", "]", '"', "(", ")", "<|message|>", "a=1"}
)


@settings(deadline=None)
@given(st.sampled_from(FORMATS), st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=4), st.data())
def test_whatever_is_written_is_read_or_a_value_error(name, pieces, data):
    text = "".join(pieces)
    text = text[: data.draw(st.integers(0, len(text)))]
    try:
        found = read(name, text)
    except ValueError:
        return
    assert all(isinstance(called, str) and called for called, _ in found.calls)
    json.dumps(found.calls)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognized_by_a_turn_that_calls(name):
    parser = recognized(f"header\n{CALLS[name]}", "look_up", "rich", "")
    assert parser is not None and parser.name == name
    assert recognized("header\nsome other text", "look_up", "rich", "") is None


def test_an_unknown_format_is_an_error_that_names_the_near_ones():
    with pytest.raises(ConfigError, match="no tool_parser 'hermess'. Did you mean 'hermes'"):
        parser_named("hermess")
    with pytest.raises(ValueError, match="Did you mean 'hermes'"):
        PolicyLLMConfig(adapter="a", tool_parser="hermess")
    assert PolicyLLMConfig(adapter="a", tool_parser="qwen3_xml").tool_parser == "qwen3_xml"
