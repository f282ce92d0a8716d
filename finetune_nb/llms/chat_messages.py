"""Messages in the OpenAI format, read and compared in whatever form clients write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..text import as_json

__all__ = [
    "content_text",
    "field_of",
    "plain_content",
    "same_message",
]

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_THINKING_TAG = re.compile(r"(</?think(?:ing)?>)\s*")


def field_of(value: Any, name: str) -> Any:
    """A key of a mapping, an attribute of anything else; None where it is not there."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def content_text(content: Any) -> str:
    """The content of a message in the OpenAI format as one text; pictures and other parts as JSON. Never raises."""
    content = plain_content(content)
    return content if isinstance(content, str) else as_json(content)


def plain_content(content: Any) -> Any:
    """The content of a message in the OpenAI format, as one text where it is nothing but text.

    Args:
        content: A text, None, or a list of parts.

    Returns:
        The text; "" for None; a list with other parts, such as pictures, as it is.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS else None
        if not isinstance(text, str):
            return content
        texts.append(text)
    return "".join(texts)


def same_message(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two messages in the OpenAI format are the same message, whichever client wrote them.

    Clients keep a reply in objects of their own and write it again when they send the history back. These are no differences:

    - how the arguments of a tool call are spelled: spaces, order of keys, escapes, 1 or 1.0;
    - the order of tool calls that have ids;
    - arguments that are not a JSON object, sent back as `{}` or as `{"INVALID_JSON": text}`;
    - content that is None, "", missing or split into text parts;
    - white space around thinking tags;
    - a field that only one of the two has: `index`, `type`, `refusal`, `annotations`, `name`, `reasoning_content`, the id of a
      tool call.

    Any other role, text, tool, argument or id is a difference.

    Args:
        a: A message.
        b: The other one.

    Returns:
        True where they are the same.
    """
    if a == b and not a.get("tool_calls"):  # most messages; arguments need more care, for True == 1 in Python
        return True
    if a.get("role") != b.get("role") or (a.get("tool_call_id") or None) != (b.get("tool_call_id") or None):
        return False
    for name in ("name", "reasoning_content"):
        # Agent libraries add a name, and most leave out what the model thought, but none of them writes another one.
        if a.get(name) and b.get(name) and a[name] != b[name]:
            return False
    return _same_content(a.get("content"), b.get("content")) and _same_calls(_calls_of(a), _calls_of(b))


def _same_content(a: Any, b: Any) -> bool:
    one, other = plain_content(a), plain_content(b)
    if one == other:
        return True
    # pydantic-ai takes thoughts out of the text, and puts them back in lines of their own.
    return isinstance(one, str) and isinstance(other, str) and _unbroken(one) == _unbroken(other)


def _unbroken(text: str) -> list[str]:
    """A text in pieces, without the white space around its thinking tags."""
    *pieces, last = _THINKING_TAG.split(text)
    return [piece.rstrip() for piece in pieces] + [last]


def _calls_of(message: Mapping[str, Any]) -> list[Any]:
    """The tool calls of a message, its older `function_call` among them."""
    calls = message.get("tool_calls") or []
    calls = list(calls) if isinstance(calls, list | tuple) else [calls]
    if message.get("function_call"):
        calls.append({"function": message["function_call"]})
    return calls


def _same_calls(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    if len(a) > 1:
        # LangChain puts calls whose arguments it cannot read after the others.
        ids_a, ids_b = [_id_of(call) for call in a], [_id_of(call) for call in b]
        if ids_a != ids_b and sorted(ids_a) == sorted(ids_b):
            a, b = sorted(a, key=_id_of), sorted(b, key=_id_of)
    return all(_same_call(one, other) for one, other in zip(a, b, strict=True))


def _id_of(call: Any) -> str:
    """The id of a tool call; "" where it has none."""
    return str((call.get("id") if isinstance(call, Mapping) else None) or "")


def _same_call(a: Any, b: Any) -> bool:
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return a == b
    id_a, id_b = _id_of(a), _id_of(b)
    if id_a and id_b and id_a != id_b:
        return False
    function_a, function_b = a.get("function"), b.get("function")
    if not isinstance(function_a, Mapping) or not isinstance(function_b, Mapping):
        return function_a == function_b and a.get("custom") == b.get("custom")
    return function_a.get("name") == function_b.get("name") and _same_arguments(
        function_a.get("arguments"), function_b.get("arguments")
    )


def _same_arguments(a: Any, b: Any) -> bool:
    if isinstance(a, str) and a == b:  # nothing to read where a client leaves them as they are
        return True
    one, one_is_object = _spelled(a)
    other, other_is_object = _spelled(b)
    if one == other:
        return True
    if one_is_object == other_is_object:
        return False
    sent, replaced = (one, b) if one_is_object else (other, a)
    # The Vercel AI SDK and LangChain send no arguments in place of what is no JSON object, pydantic-ai its text under a name.
    return sent in ("{}", _spelled({"INVALID_JSON": replaced})[0])


def _spelled(arguments: Any) -> tuple[str, bool]:
    """The arguments of a tool call in one spelling, and whether they are a JSON object. What is no JSON stays as it is."""
    if arguments is None or arguments == "":
        return "{}", True
    try:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        # As clients read it: some take line breaks within a text, and JavaScript has no numbers but floats.
        value = json.loads(text, strict=False, parse_int=_float, parse_float=_float)
        return json.dumps(value, sort_keys=True), isinstance(value, dict)
    except (TypeError, ValueError, RecursionError):
        return str(arguments), False


def _float(digits: str) -> float:
    """The number, 0.0 for -0."""
    return float(digits) or 0.0
