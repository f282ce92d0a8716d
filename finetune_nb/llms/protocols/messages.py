"""The wire format of Anthropic's Messages API: requests become those of chat completions, recorded calls become messages,
whole or as events.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...types import LLMCall
from ..call_recorder import arguments_of
from ..chat_messages import plain_content
from ..openai_wire import WireRequest, json_object, request_of, usage_of
from .options import Abilities, Refused, how_to_ignore, without_ignored

__all__ = [
    "answer_of",
    "error_body",
    "events_of",
    "read",
]

_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
"""Fields of chat completions, and what they are called here."""
_SAME = {"model", "metadata", "max_tokens", "service_tier", "stream", "temperature", "top_k", "top_p"}
_SAME |= {"return_token_ids"}
"""Fields that mean the same in chat completions."""
_WITHOUT_EFFECT = {"cache_control", "diagnostics", "inference_geo", "speed", "user_profile_id", "workspace_id"}
_NOT_OFFERED = {"container", "context_management", "mcp_servers"}
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ERRORS |= {413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error"}


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(body: bytes, abilities: Abilities) -> WireRequest:
    """A request's JSON body, as one of chat completions. Raises Refused with what is wrong."""
    data, ignored = without_ignored(json_object(body), abilities)
    chat = _chat_options(data, abilities)
    chat["messages"] = [*_system(data.get("system")), *_messages(data.get("messages"))]
    if data.get("tools"):
        chat["tools"] = [_chat_tool(tool) for tool in _objects(data["tools"], "tools")]
    # What is ignored may be named as it is called here, or as in chat completions.
    chat, more = without_ignored(chat, abilities, _NAMES)
    return request_of(chat, True, abilities, (*ignored, *more), _NAMES)


def _chat_options(data: Mapping[str, Any], abilities: Abilities) -> dict[str, Any]:
    """All fields but the conversation and the tools, in those of chat completions."""
    chat: dict[str, Any] = {}
    for name, value in data.items():
        if name in _SAME:
            chat[name] = value
        elif name == "stop_sequences":
            chat["stop"] = value
        elif name == "tool_choice":
            chat |= _chat_choice(value)
        elif name == "thinking":
            chat |= _chat_thinking(value, abilities)
        elif name in ("output_config", "output_format"):
            config = {"format": value} if name == "output_format" else value
            chat |= _chat_output(config)
        elif name in _WITHOUT_EFFECT or name in ("messages", "system", "tools"):
            continue
        elif name in _NOT_OFFERED:
            problem = f"{name} is not offered here. Leave it out. {how_to_ignore(name)}"
            raise Refused(400, problem, "unsupported_parameter", name)
        else:
            chat[name] = value  # an option that is unknown there is refused there
    return chat


def _chat_choice(choice: Any) -> dict[str, Any]:
    asked = choice if isinstance(choice, dict) else {}
    simple = {"auto": "auto", "none": "none", "any": "required"}
    if asked.get("type") == "tool":
        chosen: dict[str, Any] = {"tool_choice": {"type": "function", "function": {"name": asked.get("name")}}}
    elif str(asked.get("type")) in simple:
        chosen = {"tool_choice": simple[asked["type"]]}
    else:
        expected = 'an object with the type "auto", "any", "tool" or "none"'
        raise Refused(400, f"tool_choice is {json.dumps(choice)[:80]}; expected {expected}.", None, "tool_choice")
    if asked.get("disable_parallel_tool_use"):
        chosen["parallel_tool_calls"] = False
    return chosen


def _chat_thinking(thinking: Any, abilities: Abilities) -> dict[str, Any]:
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind == "disabled" and "enable_thinking" in abilities.template:
        return {"reasoning_effort": "none"}
    if kind in ("disabled", "adaptive"):
        return {}  # the model does as its chat template has it
    problem = (
        f"the policy cannot honour thinking={json.dumps(thinking)[:80]}: it knows no budget for thoughts. Leave it out."
    )
    raise Refused(400, f"{problem} {how_to_ignore('thinking')}", "unsupported_parameter", "thinking")


def _chat_output(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise Refused(400, f"output_config is {json.dumps(config)[:80]}; expected an object.", None, "output_config")
    found: dict[str, Any] = {}
    if config.get("effort") is not None:
        found["reasoning_effort"] = config["effort"]
    wanted = config.get("format")
    if isinstance(wanted, dict):
        described = {"name": "reply", "schema": wanted.get("schema")}
        found["response_format"] = {"type": wanted.get("type"), "json_schema": described}
    return found


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom" or not isinstance(tool.get("name"), str):
        raise Refused(
            400,
            f"the policy has no tool of the type {str(tool.get('type'))[:40]!r}. Expected tools with a name and an input_schema: "
            "Anthropic's own are not known here.",
            "unsupported_parameter",
            "tools",
        )
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": tool.get("input_schema")}
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _system(system: Any) -> list[dict[str, Any]]:
    if not system:
        return []
    return [{"role": "system", "content": _text(system, "system")}]


def _messages(given: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(_objects(given, "messages")):
        content, place = message.get("content"), f"messages[{i}]"
        if message.get("role") == "assistant":
            messages.append(_assistant(content, place))
        elif isinstance(content, list):
            messages += _user(str(message.get("role")), content, place)
        else:
            messages.append({"role": message.get("role"), "content": content})
    if messages and messages[-1]["role"] == "assistant":
        raise Refused(
            400,
            "the last message is the assistant's: the policy cannot carry on in the middle of a turn. Leave the prefill out.",
            "unsupported_parameter",
            "messages",
        )
    return messages


def _assistant(content: Any, place: str) -> dict[str, Any]:
    """A turn of the assistant: thoughts, text and tool calls as one message."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if not isinstance(content, list):
        return message
    texts, thoughts, calls = [], [], []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            texts.append(_text([block], place))
    message["content"] = "".join(texts) if texts or not calls else None
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(role: str, blocks: list[Any], place: str) -> list[dict[str, Any]]:
    """A message of the user: each tool's result is a message of its own, and what is around it another one."""
    messages: list[dict[str, Any]] = []
    texts: list[Any] = []

    def flush() -> None:
        if texts:
            messages.append({"role": role, "content": _text(texts, place)})
            texts.clear()

    for block in blocks:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            flush()
            content = _text(block.get("content"), place)
            messages.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": content})
        else:
            texts.append(block)
    flush()
    return messages


def _text(content: Any, place: str) -> str:
    text = plain_content(content)
    if not isinstance(text, str):
        raise Refused(400, "the policy reads text only, and the message has other content.", None, place)
    return text


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise Refused(400, f"{name} is missing or empty; expected a list of objects.", None, name)
    return value


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer_of(request: WireRequest, call: LLMCall, name: str) -> dict[str, Any]:
    """The message that answers a request. name: unique among answers."""
    reason = "tool_calls" if call.reply.get("tool_calls") else call.finish_reason
    stopped_at = _stop_text(call) if reason == "stop" else None
    usage = usage_of([call]) or {"prompt_tokens": 0, "completion_tokens": 0}
    answer: dict[str, Any] = {
        "id": f"msg_{name}",
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": _content(call),
        "stop_reason": "stop_sequence" if stopped_at else _STOP_REASONS.get(str(reason), "end_turn"),
        "stop_sequence": stopped_at,
        "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]},
    }
    if request.token_ids:
        answer |= {"prompt_token_ids": call.prompt_ids, "token_ids": call.response_ids}
    return answer


def _content(call: LLMCall) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    thought, content = call.reply.get("reasoning_content"), call.reply.get("content")
    calls = call.reply.get("tool_calls") or ()
    if thought:
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    if content or not calls:
        blocks.append({"type": "text", "text": content or "", "citations": None})
    for made in calls:
        arguments = arguments_of(made["function"])
        if not isinstance(arguments, dict):  # the API has no other place for what the model wrote
            arguments = {"INVALID_JSON": made["function"]["arguments"]}
        blocks.append({"type": "tool_use", "id": made.get("id"), "name": made["function"]["name"], "input": arguments})
    return blocks


def _stop_text(call: LLMCall) -> str | None:
    """The stop text that ended the reply; None where the model ended it."""
    text = "".join(call.tokens or ())
    return next((stop for stop in call.sampling.stop if stop in text), None)


def events_of(answer: dict[str, Any]) -> Iterator[bytes]:
    """The same message as server-sent events."""
    usage = {**answer["usage"], "output_tokens": 0}
    begun = {**answer, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    yield _event("message_start", {"message": begun})
    for index, block in enumerate(answer["content"]):
        where = {"index": index}
        if block["type"] == "tool_use":
            empty: dict[str, Any] = {**block, "input": {}}
            deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"], ensure_ascii=False)}]
        elif block["type"] == "thinking":
            empty = {**block, "thinking": ""}
            deltas = [
                {"type": "thinking_delta", "thinking": block["thinking"]},
                {"type": "signature_delta", "signature": block["signature"]},
            ]
        else:
            empty = {**block, "text": ""}
            deltas = [{"type": "text_delta", "text": block["text"]}]
        yield _event("content_block_start", {**where, "content_block": empty})
        for delta in deltas:
            yield _event("content_block_delta", {**where, "delta": delta})
        yield _event("content_block_stop", where)
    ended = {"stop_reason": answer["stop_reason"], "stop_sequence": answer["stop_sequence"]}
    yield _event("message_delta", {"delta": ended, "usage": {"output_tokens": answer["usage"]["output_tokens"]}})
    yield _event("message_stop", {})


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()


def error_body(message: str, status: int) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    return {"type": "error", "error": {"type": _ERRORS.get(status, "api_error"), "message": message}}
