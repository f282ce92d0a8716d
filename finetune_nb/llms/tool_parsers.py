"""Reads tool calls from the text of a reply, in the formats in which models write them.

The formats have the names that vLLM's `--tool-call-parser` gives them. A model's own is recognized by how its chat template
writes a turn that calls a tool.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, did_you_mean

__all__ = [
    "TOOL_PARSERS",
    "ParsedReply",
    "ToolParser",
    "checked_name",
    "parser_named",
    "recognized",
]

Tools = Sequence[Mapping[str, Any]]


@dataclass
class ParsedReply:
    """What a reply says and calls."""

    content: str
    calls: list[tuple[str, Any]] = field(default_factory=list)
    """Names, each with its arguments: a mapping, or a text that is no JSON object."""
    thought: str | None = None


@dataclass(frozen=True)
class ToolParser:
    """One format of tool calls."""

    name: str
    read: Callable[[str, Tools], ParsedReply]
    """The text of a reply, special tokens included, and the tools that were offered -> what it says and calls. Raises
    ValueError for a call that cannot be read."""
    sign: str
    """A pattern of how a call begins; NAME is the name of a tool."""
    closing: str = ""
    """What ends a call; "" where nothing of its own does."""
    instruction: str = ""
    """A pattern of how templates tell the model to call, by which those are recognized that write no turn with a call."""
    whole_reply: bool = False
    """It is the format of every reply, not of those alone that call a tool."""


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_DECODER = json.JSONDecoder(strict=False)


def _json_at(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value that begins there, after white space, and where it ends."""
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _json(text: str) -> Any:
    """A text that is one JSON value."""
    value, end = _json_at(text)
    if text[end:].strip():
        raise ValueError(f"more than JSON: {text[end:].strip()[:40]!r}")
    return value


def _call(value: Any) -> tuple[str, Any]:
    """A call that was written as {"name": ..., "arguments": ...}."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("a call has no name")
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], {} if arguments is None else arguments


def _calls(value: Any) -> list[tuple[str, Any]]:
    """One call, or a list of them."""
    return [_call(each) for each in (value if isinstance(value, list) else [value])]


def _outside(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """What a text says outside of its calls."""
    said = []
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        if text[at:start].strip():
            said.append(text[at:start].strip())
        at = end
    return "\n".join(said)


def _between(text: str, opening: str, closing: str) -> tuple[list[str], str]:
    """The texts between two patterns, the last one perhaps not closed, and what is said outside of them."""
    found = list(re.finditer(rf"{opening}(.*?)(?:{closing}|\Z)", text, re.DOTALL))
    return [match[1] for match in found], _outside(text, [match.span() for match in found])


def _hermes(text: str, tools: Tools) -> ParsedReply:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them."""
    return _marked_json("<tool_call>", "</tool_call>", text, tools)


def _llama3_json(text: str, tools: Tools) -> ParsedReply:
    """{"name": ..., "parameters": {...}}, the whole reply or all after <|python_tag|>; several with ; between them."""
    said, _, written = text.rpartition("<|python_tag|>")
    at, calls = 0, []
    if not written.lstrip().startswith("{"):
        return ParsedReply(text)
    while written[at:].strip():
        value, at = _json_at(written, at)
        if not isinstance(value, Mapping) or not ("parameters" in value or "arguments" in value):
            raise ValueError("a JSON object that is no call")
        calls.append(_call(value))
        at += len(written[at:]) - len(written[at:].lstrip(" \n\t;,"))
    return ParsedReply(said.strip(), calls)


def _mistral(text: str, tools: Tools) -> ParsedReply:
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...} for each call."""
    said, *written = text.split("[TOOL_CALLS]")
    calls: list[tuple[str, Any]] = []
    for part in written:
        if part.lstrip().startswith(("[", "{")):
            calls += _calls(_json(part))
            continue
        named = re.fullmatch(r"\s*([^\s{\[]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?(.*)", part, re.DOTALL)
        if named is None:
            raise ValueError("a call has no name")
        calls.append((named[1], _json(named[2])))
    return ParsedReply(said.strip(), calls)


def _marked_json(opening: str, closing: str, text: str, tools: Tools) -> ParsedReply:
    """A list of calls, or one, between two marks."""
    bodies, said = _between(text, opening, closing)
    calls: list[tuple[str, Any]] = []
    for body in bodies:
        calls += _calls(_json(body))
    return ParsedReply(said, calls)


# ── Python ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_JSON_NAMES = {"true": True, "false": False, "null": None}


def _python_value(node: ast.expr) -> Any:
    """A literal; JSON's true, false and null are taken, too."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_python_value(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key that is no text")
        return dict(zip(keys, map(_python_value, node.values), strict=True))
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"a {type(value).__name__} is no JSON value")
    return value


def _dotted(node: ast.expr) -> str:
    """A name, perhaps with dots in it."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
        raise ValueError("something else than a name is called")
    return node.id


def _python_calls(written: str) -> list[tuple[str, Any]]:
    """[name(key=value), ...]"""
    try:
        tree = ast.parse(written.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            raise ValueError("no list of calls")
        calls = []
        for call in tree.elts:
            if not isinstance(call, ast.Call) or call.args or not all(word.arg for word in call.keywords):
                raise ValueError("a call without names of arguments")
            arguments = {str(word.arg): _python_value(word.value) for word in call.keywords}
            calls.append((_dotted(call.func), arguments))
        return calls
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no list of calls: {error}") from error


def _pythonic(text: str, tools: Tools) -> ParsedReply:
    """[name(key=value), ...], which is the whole reply."""
    written = text.replace("<|python_start|>", "").replace("<|python_end|>", "").strip()
    if not re.match(r"\[\s*[A-Za-z_][\w.]*\(", written):
        return ParsedReply(text)
    return ParsedReply("", _python_calls(written))


def _lfm2(text: str, tools: Tools) -> ParsedReply:
    """<|tool_call_start|>[name(key=value), ...]<|tool_call_end|>"""
    bodies, said = _between(text, r"<\|tool_call_start\|>", r"<\|tool_call_end\|>")
    calls: list[tuple[str, Any]] = []
    for body in bodies:
        calls += _python_calls(body)
    return ParsedReply(said, calls)


# ── tags ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _types_of(schema: Any) -> list[str]:
    """The JSON types that a parameter may have."""
    if not isinstance(schema, Mapping):
        return []
    declared = schema.get("type")
    types = list(declared) if isinstance(declared, list) else [declared]
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or ():
            types += _types_of(choice)
    return [each for each in types if isinstance(each, str)]


def _typed(written: str, schema: Any) -> Any:
    """An argument that was written as bare text, as the type that its parameter has; as text where it does not fit."""
    types = _types_of(schema)
    if "null" in types and written.strip() in ("null", "None"):
        return None
    if "boolean" in types and written.strip().lower() in ("true", "false"):
        return written.strip().lower() == "true"
    wanted = {"integer": int, "number": (int, float), "object": dict, "array": list}
    for name, kinds in wanted.items():
        if name not in types:
            continue
        try:
            value = _json(written)
        except ValueError:
            continue
        if isinstance(value, float) and name == "integer" and value.is_integer():
            value = int(value)
        if isinstance(value, kinds) and not isinstance(value, bool):
            return value
    return written


def _parameters(tools: Tools, name: str) -> Mapping[str, Any]:
    """The schemas of a tool's parameters, by name."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            schema = function.get("parameters")
            properties = schema.get("properties") if isinstance(schema, Mapping) else None
            return properties if isinstance(properties, Mapping) else {}
    return {}


def _tagged_arguments(found: Sequence[tuple[str, str]], tools: Tools, name: str) -> dict[str, Any]:
    schemas = _parameters(tools, name)
    return {key.strip(): _typed(written, schemas.get(key.strip())) for key, written in found}


_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|(?=<function=)|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


def _qwen3_coder(text: str, tools: Tools) -> ParsedReply:
    """<tool_call><function=name><parameter=key>value</parameter></function></tool_call>"""
    calls = [
        (match[1].strip(), _tagged_arguments(_PARAMETER.findall(match[2]), tools, match[1].strip()))
        for match in _FUNCTION.finditer(text)
    ]
    if not calls:
        return ParsedReply(text)
    _, said = _between(text, r"<tool_call>\s*(?=<function=)|(?=<function=)", r"</function>\s*(?:</tool_call>)?")
    return ParsedReply(said, calls)


_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _glm45(text: str, tools: Tools) -> ParsedReply:
    """<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>"""
    bodies, said = _between(text, "<tool_call>", "</tool_call>")
    calls: list[tuple[str, Any]] = []
    for body in bodies:
        name = body.partition("<arg_key>")[0].strip()
        if not name or any(each.isspace() for each in name):
            raise ValueError("a call has no name")
        calls.append((name, _tagged_arguments(_ARGUMENT.findall(body), tools, name)))
    return ParsedReply(said, calls)


def _deepseek(text: str, tools: Tools) -> ParsedReply:
    """<｜tool▁call▁begin｜>function<｜tool▁sep｜>name ```json {...}```, or since V3.1 name<｜tool▁sep｜>{...}."""
    said = text.partition("<｜tool▁calls▁begin｜>")[0]
    bodies, _ = _between(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
    calls: list[tuple[str, Any]] = []
    for body in bodies:
        first, _, second = body.partition("<｜tool▁sep｜>")
        fenced = re.fullmatch(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", second, re.DOTALL)
        calls.append((fenced[1], _json(fenced[2])) if fenced else (first.strip(), _json(second)))
    return ParsedReply(said.strip(), calls)


def _kimi_k2(text: str, tools: Tools) -> ParsedReply:
    """<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>"""
    said = text.partition("<|tool_calls_section_begin|>")[0]
    bodies, _ = _between(text, r"<\|tool_call_begin\|>", r"<\|tool_call_end\|>")
    calls: list[tuple[str, Any]] = []
    for body in bodies:
        called, _, written = body.partition("<|tool_call_argument_begin|>")
        name = called.strip().removeprefix("functions.").rpartition(":")[0]
        calls.append((name, _json(written)))
    return ParsedReply(said.strip(), calls)


def _gemma4(text: str, tools: Tools) -> ParsedReply:
    """<|channel>thought ...<channel|><|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>"""
    thoughts, text = _between(text, r"<\|channel>thought\n", r"<channel\|>")
    bodies, said = _between(text, r"<\|tool_call>", r"<tool_call\|>")
    calls: list[tuple[str, Any]] = []
    for body in bodies:
        named = re.fullmatch(r"\s*call:([^{\s]+)\s*(\{.*\})\s*", body, re.DOTALL)
        if named is None:
            raise ValueError("a call has no name")
        pieces = named[2].split('<|"|>')
        for i, piece in enumerate(pieces):
            text_value = i % 2 == 1
            pieces[i] = (
                json.dumps(piece) if text_value else re.sub(r'([{,]\s*)([^\s"{}\[\],:]+)\s*:', r'\1"\2":', piece)
            )
        calls.append((named[1], _json("".join(pieces))))
    return ParsedReply(said, calls, "\n".join(thought.strip() for thought in thoughts) or None)


_HARMONY = re.compile(r"(.*?)<\|message\|>(.*?)(?:<\|end\|>|<\|return\|>|<\|call\|>|(?=<\|start\|>)|\Z)", re.DOTALL)


def _harmony(text: str, tools: Tools) -> ParsedReply:
    """The channels of gpt-oss: thoughts in analysis, calls to functions, and what is said."""
    said, thoughts, calls = [], [], []
    for header, body in _HARMONY.findall(text):
        called = re.search(r"to=functions\.([^\s<]+)", header)
        channel = re.search(r"<\|channel\|>(\w+)", header)
        if called is not None:
            calls.append((called[1], _json(body)))
        elif channel is not None and channel[1] == "analysis":
            thoughts.append(body.strip())
        else:
            said.append(body.strip())
    if not (said or thoughts or calls):
        return ParsedReply(text)
    return ParsedReply("\n".join(said), calls, "\n".join(thoughts) or None)


# ── by name ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_GRANITE = functools.partial(_marked_json, r"<\|tool_call\|>", r"<\|/tool_call\|>")
_JAMBA = functools.partial(_marked_json, "<tool_calls>", "</tool_calls>")
_PHI4_MINI = functools.partial(_marked_json, "functools", r"\Z")
_JSON_CALL = r'\{\s*"name":\s*"NAME",\s*"(?:parameters|arguments)"'
_PARSERS = (
    ToolParser("openai", _harmony, r"to=functions\.NAME", "<|call|>", whole_reply=True),
    ToolParser("gemma4", _gemma4, r"<\|tool_call>call:NAME", "<tool_call|>", whole_reply=True),
    ToolParser("kimi_k2", _kimi_k2, r"<\|tool_call_begin\|>", "<|tool_calls_section_end|>"),
    ToolParser("deepseek_v3", _deepseek, "<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"),
    ToolParser("lfm2", _lfm2, r"<\|tool_call_start\|>\[NAME\(", "<|tool_call_end|>", r"<\|tool_call_start\|>"),
    ToolParser("qwen3_coder", _qwen3_coder, "<function=NAME>", "</tool_call>", r"<function=\w+>\s*<parameter="),
    ToolParser("glm45", _glm45, r"<tool_call>NAME\s*<arg_key>", "</tool_call>", r"<arg_key>"),
    ToolParser(
        "granite",
        _GRANITE,
        r"<\|tool_call\|>\s*\[",
        "",
        r"<\|tool_call\|>",
    ),
    ToolParser("jamba", _JAMBA, "<tool_calls>", "</tool_calls>", "<tool_calls>"),
    ToolParser("hermes", _hermes, r"<tool_call>\s*\[?\s*\{", "</tool_call>", r"<tool_call>\s*\[?\s*\{"),
    ToolParser("mistral", _mistral, r"\[TOOL_CALLS\]", "", r"\[TOOL_CALLS\]"),
    ToolParser("phi4_mini_json", _PHI4_MINI, r"functools\s*\[", "", r"functools\s*\["),
    ToolParser("llama3_json", _llama3_json, _JSON_CALL, "", r'\{"name": function name, "parameters"'),
    ToolParser("pythonic", _pythonic, r"\[NAME\(", "", r"\[func_name1\("),
)
_ALIASES = {
    "deepseek_v31": "deepseek_v3",
    "glm47": "glm45",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "qwen3_xml": "qwen3_coder",
}
TOOL_PARSERS: dict[str, ToolParser] = {parser.name: parser for parser in _PARSERS}
"""The formats by name."""
TOOL_PARSERS |= {alias: TOOL_PARSERS[name] for alias, name in _ALIASES.items()}


def parser_named(name: str) -> ToolParser:
    """The format of that name.

    Args:
        name: A name that vLLM's users know, such as "hermes".

    Returns:
        The format.

    Raises:
        ConfigError: There is no such format.
    """
    try:
        checked_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return TOOL_PARSERS[name]


def checked_name(name: str | None) -> str | None:
    """The name of a format, for a config. Raises ValueError where there is no such format."""
    if name is not None and name not in TOOL_PARSERS:
        raise ValueError(f"there is no tool_parser {name!r}. {did_you_mean(name, TOOL_PARSERS)}")
    return name


def recognized(turn: str, name: str, value: str, instructions: str) -> ToolParser | None:
    """The format in which a chat template writes calls.

    Args:
        turn: How the template writes a turn that calls a tool; "" where it refuses one.
        name: The name of that tool.
        value: A value among its arguments.
        instructions: What the template tells the model.

    Returns:
        The format; None for one that is not known.
    """
    for parser in _PARSERS:
        begin = re.search(parser.sign.replace("NAME", re.escape(name)), turn)
        if begin is None:
            continue
        try:
            calls = parser.read(turn[begin.start() :], ()).calls
        except ValueError:
            continue
        if any(called == name and value in json.dumps(arguments) for called, arguments in calls):
            return parser
    for parser in _PARSERS:
        if parser.instruction and re.search(parser.instruction, instructions):
            return parser
    return None
