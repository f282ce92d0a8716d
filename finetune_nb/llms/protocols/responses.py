"""The wire format of OpenAI's Responses API: requests become those of chat completions, recorded calls become responses,
whole or as typed events.
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...types import LLMCall
from ..call_recorder import CallRecorder
from ..chat_messages import plain_content
from ..openai_wire import WireRequest, chat_logprobs, json_object, request_of, usage_of
from .options import Abilities, Refused, how_to_ignore, without_ignored

__all__ = [
    "ResponseStore",
    "answer_of",
    "events_of",
    "read",
]

MOST_RESPONSES = 1000
"""Responses of a rollout that are kept, the newest."""

_NAMES = {
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of chat completions, and what they are called here."""
_SAME = {
    "model",
    "metadata",
    "moderation",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "safety_identifier",
    "service_tier",
    "stream",
    "temperature",
    "top_p",
    "user",
}
"""Fields that mean the same in chat completions."""
_WITHOUT_EFFECT = {"max_tool_calls", "truncation", "stream_options"}
"""The first counts calls of OpenAI's own tools; a prompt that is too long is an error either way."""
_NEUTRAL = {"background": (False,), "context_management": ([],), "conversation": (), "prompt": ()}
_SHOWN = ("instructions", "max_output_tokens", "metadata", "previous_response_id", "reasoning", "temperature", "text")
_SHOWN += ("tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user", "store", "service_tier")


@dataclass(frozen=True, slots=True)
class Stored:
    """A response, and the conversation that ends with it, without its instructions."""

    answer: dict[str, Any]
    messages: list[dict[str, Any]]


class ResponseStore:
    """The newest responses that a rollout got at one address. What is older, or was not to be stored, is unknown."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def keep(self, request: WireRequest, call: LLMCall, answer: dict[str, Any]) -> None:
        """Keeps a response, unless the request says `store: false`."""
        if not answer["store"]:
            return
        messages = [*(request.messages or ()), call.reply]
        if request.shown.get("instructions"):
            messages = messages[1:]
        self._stored[answer["id"]] = Stored(answer, messages)
        if len(self._stored) > MOST_RESPONSES:
            self._stored.popitem(last=False)

    def find(self, response: str) -> Stored:
        """The response of that id. Raises Refused where it is not kept."""
        found = self._stored.get(response)
        if found is None:
            raise Refused(
                404,
                f"there is no response {response!r}. A rollout keeps its newest {MOST_RESPONSES} at the address of each model, "
                "but for those that were asked for with store=False: send the conversation as input.",
                "previous_response_not_found",
                "previous_response_id",
            )
        return found

    def forget(self, response: str) -> None:
        """Keeps it no longer. Raises Refused where it is not kept."""
        self.find(response)
        del self._stored[response]

    def item(self, name: str) -> dict[str, Any]:
        """An item of a kept response. Raises Refused where there is none of that id."""
        for stored in reversed(self._stored.values()):
            for item in stored.answer["output"]:
                if item["id"] == name:
                    return item
        raise Refused(404, f"there is no item {name!r} in a stored response: send the item itself.", None, "input")


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(body: bytes, abilities: Abilities, store: ResponseStore, episode: CallRecorder) -> WireRequest:
    """A request's JSON body, as one of chat completions. Raises Refused with what is wrong."""
    data, ignored = without_ignored(json_object(body), abilities)
    shown = {name: data[name] for name in _SHOWN if name in data}
    chat = _chat_options(data, abilities.takes_options)
    chat["messages"] = _messages(data, store, episode)
    if "tools" in data:
        chat["tools"] = [_chat_tool(tool) for tool in _objects(data["tools"], "tools")]
    # What is ignored may be named as it is called here, or as in chat completions.
    chat, more = without_ignored(chat, abilities, _NAMES)
    return replace(request_of(chat, True, abilities, (*ignored, *more), _NAMES), shown=shown)


def _chat_options(data: Mapping[str, Any], passed_on: bool) -> dict[str, Any]:
    """All fields but the conversation and the tools, in those of chat completions."""
    chat: dict[str, Any] = {}
    for name, value in data.items():
        if name in _SAME:
            chat[name] = value
        elif name == "max_output_tokens":
            chat["max_tokens"] = value
        elif name == "text":
            text = _object(value, "text")
            if text.get("format") is not None:
                chat["response_format"] = _chat_format(_object(text["format"], "text.format"))
            if text.get("verbosity") is not None:
                chat["verbosity"] = text["verbosity"]
        elif name == "reasoning":
            effort = _object(value, "reasoning").get("effort")
            if effort is not None:
                chat["reasoning_effort"] = effort
        elif name == "tool_choice":
            chat["tool_choice"] = _chat_choice(value)
        elif name == "include":
            if isinstance(value, list) and "message.output_text.logprobs" in value:
                chat["logprobs"] = True
        elif name == "top_logprobs":
            chat |= {"top_logprobs": value, "logprobs": bool(value) or chat.get("logprobs", False)}
        elif name in _WITHOUT_EFFECT or name in ("input", "instructions", "previous_response_id", "store", "tools"):
            continue
        elif name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                problem = f"{name} is not offered here: send the whole conversation as input, or previous_response_id."
                raise Refused(400, f"{problem} {how_to_ignore(name)}", "unsupported_parameter", name)
        else:
            chat[name] = value  # an option that is unknown there is refused there
    return chat


def _chat_format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {key: value for key, value in given.items() if key != "type"}}


def _chat_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools":
        return {"type": "allowed_tools", "allowed_tools": {key: choice.get(key) for key in ("mode", "tools")}}
    return choice


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise Refused(
            400,
            f"the policy has no tool of the type {str(tool.get('type'))[:40]!r}. Expected functions: OpenAI's own tools run on "
            "its servers.",
            "unsupported_parameter",
            "tools",
        )
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in fields if tool.get(key) is not None}}


def _messages(data: Mapping[str, Any], store: ResponseStore, episode: CallRecorder) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if data.get("instructions"):
        messages.append({"role": "system", "content": _text(data["instructions"], "instructions")})
    if "previous_response_id" in data:
        messages += store.find(str(data["previous_response_id"])).messages
    given = data.get("input", [])
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    conversation = _Conversation(messages, store, episode)
    for item in _objects(given, "input"):
        conversation.add(item)
    return messages


class _Conversation:
    """Items in order, as messages: what an assistant thinks, says and calls in one turn is one message."""

    def __init__(self, messages: list[dict[str, Any]], store: ResponseStore, episode: CallRecorder) -> None:
        self.messages, self._store = messages, store
        self._open: dict[str, Any] | None = None
        """The assistant's message to which a next item may belong."""
        self._turns: dict[str, int] | None = None
        self._episode = episode

    def add(self, item: dict[str, Any]) -> None:
        kind = item.get("type", "message")
        if kind == "item_reference":
            item = self._store.item(str(item.get("id")))
            kind = item["type"]
        if kind == "message":
            self._message(item)
        elif kind == "reasoning":
            self._assistant("reasoning_content", _thought(item))
        elif kind == "function_call":
            self._call(item)
        elif kind == "function_call_output":
            content = _text(item.get("output"), "a function_call_output")
            self._open = None
            self.messages.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": content})
        else:
            raise Refused(400, f"the policy reads no items of the type {str(kind)[:40]!r}.", None, "input")

    def _message(self, item: dict[str, Any]) -> None:
        role, content = item.get("role"), _text(item.get("content"), "a message")
        if role == "assistant":
            self._assistant("content", content)
            return
        self._open = None
        self.messages.append({"role": role, "content": content})

    def _assistant(self, field: str, text: str) -> None:
        """Something that comes before tool calls, and but once in a turn."""
        turn = self._open
        if turn is None or field in turn or "tool_calls" in turn or field == "reasoning_content":
            turn = self._open = {"role": "assistant"}
            self.messages.append(turn)
        turn[field] = text

    def _call(self, item: dict[str, Any]) -> None:
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": str(item.get("call_id")), "type": "function", "function": function}
        turn = self._turn_of(call["id"]) or self._open
        if turn is None:
            turn = self._open = {"role": "assistant"}
            self.messages.append(turn)
        turn.setdefault("content", None)
        turn.setdefault("tool_calls", []).append(call)

    def _turn_of(self, call_id: str) -> dict[str, Any] | None:
        """The message with the other calls of its turn: some clients put each call's output right after it."""
        if self._turns is None:
            self._turns = {}
            for call in self._episode.calls:
                for made in call.reply.get("tool_calls") or ():
                    self._turns[made.get("id")] = call.sequence
        turn = self._turns.get(call_id)
        for message in reversed(self.messages):
            calls = message.get("tool_calls")
            if calls:
                return message if turn is not None and self._turns.get(calls[0]["id"]) == turn else None
        return None


def _thought(item: dict[str, Any]) -> str:
    """What was thought: its text, else its summary."""
    parts = item.get("content") or item.get("summary") or ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _text(content: Any, what: str) -> str:
    text = plain_content(content)
    if not isinstance(text, str):
        raise Refused(400, f"the policy reads text only, and {what} has other content.", None, "input")
    return text


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(400, f"{name} is {json.dumps(value)[:80]}; expected an object.", None, name)
    return value


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise Refused(400, f"{name} is no list of objects.", None, name)
    return value


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer_of(request: WireRequest, call: LLMCall, name: str, created: int) -> dict[str, Any]:
    """The response to a request. name: unique among answers."""
    cut = call.finish_reason == "length"
    shown = request.shown
    answer: dict[str, Any] = {
        "id": f"resp_{name}",
        "object": "response",
        "created_at": created,
        "completed_at": created,
        "status": "incomplete" if cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": call.model,
        "output": _output(request, call, name),
        "parallel_tool_calls": request.parallel,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "temperature": request.params.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None,
        **shown,
    }
    answer["store"] = shown.get("store", True) is not False
    usage = usage_of([call])
    if usage is not None:
        answer["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
    if request.token_ids:
        answer |= {"prompt_token_ids": call.prompt_ids, "token_ids": call.response_ids}
    return answer


def _output(request: WireRequest, call: LLMCall, name: str) -> list[dict[str, Any]]:
    status = "incomplete" if call.finish_reason == "length" else "completed"
    items: list[dict[str, Any]] = []
    thought, content = call.reply.get("reasoning_content"), call.reply.get("content")
    calls = call.reply.get("tool_calls") or ()
    if thought:
        part = {"type": "reasoning_text", "text": thought}
        items.append({"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": [part], "status": status})
    if content or not calls:
        logprobs = chat_logprobs(request, call) if request.logprobs and call.logprobs is not None else []
        part = {"type": "output_text", "text": content or "", "annotations": [], "logprobs": logprobs}
        items.append({"id": f"msg_{name}", "type": "message", "role": "assistant", "status": status, "content": [part]})
    for i, made in enumerate(calls):
        function = made["function"]
        items.append(
            {
                "id": f"fc_{name}_{i}",
                "type": "function_call",
                "call_id": made.get("id"),
                "name": function["name"],
                "arguments": function["arguments"],
                "status": "completed",
            }
        )
    return items


def events_of(request: WireRequest, answer: dict[str, Any]) -> Iterator[bytes]:
    """The same response as server-sent events."""
    numbers = itertools.count()
    for kind, fields in _typed_events(answer):
        event = {"type": kind, "sequence_number": next(numbers), **fields}
        yield f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


Event = tuple[str, dict[str, Any]]


def _typed_events(answer: dict[str, Any]) -> Iterator[Event]:
    begun = {**answer, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    begun["completed_at"] = None
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    for index, item in enumerate(answer["output"]):
        yield "response.output_item.added", {"output_index": index, "item": _empty(item)}
        where = {"item_id": item["id"], "output_index": index}
        if item["type"] == "function_call":
            yield "response.function_call_arguments.delta", {**where, "delta": item["arguments"]}
            done = {**where, "name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", done
        else:
            yield from _part_events(where, item["content"])
        yield "response.output_item.done", {"output_index": index, "item": item}
    yield f"response.{answer['status']}", {"response": answer}


def _part_events(where: dict[str, Any], parts: Sequence[dict[str, Any]]) -> Iterator[Event]:
    for index, part in enumerate(parts):
        here = {**where, "content_index": index}
        kind = part["type"]  # output_text or reasoning_text, which the events are named after
        more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield (
            "response.content_part.added",
            {**here, "part": {**part, "text": "", **({"logprobs": []} if more else {})}},
        )
        yield f"response.{kind}.delta", {**here, "delta": part["text"], **more}
        yield f"response.{kind}.done", {**here, "text": part["text"], **more}
        yield "response.content_part.done", {**here, "part": part}


def _empty(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it begins."""
    begun = {**item, "status": "in_progress"}
    if item["type"] == "function_call":
        return {**begun, "arguments": ""}
    return {**begun, "content": []}
