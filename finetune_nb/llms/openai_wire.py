"""The wire format of the OpenAI API: requests read from JSON, recorded calls written as answers, whole or as a stream.

Pure functions. A request that cannot be honoured is refused, never half honoured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import did_you_mean
from ..types import LLMCall, SamplingParams
from .chat_messages import plain_content
from .protocols.options import (
    KNOWN_OPTIONS,
    NO_NAMES,
    Abilities,
    Options,
    Refused,
    how_to_ignore,
    is_neutral,
    plain_tools,
    without_ignored,
)

__all__ = [
    "Refused",
    "WireRequest",
    "answer_of",
    "chat_logprobs",
    "error_body",
    "event",
    "events_of",
    "json_object",
    "read_request",
    "request_of",
    "token_texts",
    "usage_of",
]

MOST_CHOICES = 128
_ALIASES = {"max_completion_tokens": "max_tokens"}
_SAMPLING = ("temperature", "max_tokens", "stop")


@dataclass(frozen=True)
class WireRequest:
    """One request, checked. Either `messages` or `prompt` is set."""

    messages: list[dict[str, Any]] | None
    prompt: str | list[int] | None
    tools: list[dict[str, Any]] | None
    params: SamplingParams
    options: dict[str, Any]
    """Parameters that change the prompt, or what is sampled, but that SamplingParams does not have."""
    choices: int
    stream: bool
    usage: bool
    """Whether a stream ends with the number of tokens."""
    logprobs: bool
    token_ids: bool
    tokens_as_ids: bool
    calls_tools: bool = True
    """Whether what the policy writes as a tool call is one; otherwise it is text."""
    parallel: bool = True
    """Whether a reply of the policy may have more than one tool call."""
    ignored: tuple[str, ...] = ()
    """Names of what was asked for and is not honoured."""
    shown: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request that its answer repeats."""


def read_request(body: bytes, chat: bool, abilities: Abilities) -> WireRequest:
    """A request's JSON body. Raises Refused with what is wrong."""
    data, ignored = without_ignored(json_object(body), abilities)
    return request_of(data, chat, abilities, ignored)


def json_object(body: bytes) -> dict[str, Any]:
    """A request's body, without fields that are null. Raises Refused where it is no JSON object."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request's body is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refused(400, f"the request's body is a JSON {type(data).__name__}; expected an object.")
    return {str(key): value for key, value in data.items() if value is not None}


def request_of(
    data: Mapping[str, Any],
    chat: bool,
    abilities: Abilities,
    ignored: tuple[str, ...] = (),
    names: Mapping[str, str] = NO_NAMES,
) -> WireRequest:
    """A request in the fields of chat completions (or of completions), checked.

    Args:
        data: Its fields.
        chat: Whether it is a chat.
        abilities: Of the model that is asked.
        ignored: Names of fields that were left out, as the run says.
        names: What the client calls a field where it has another name there.

    Raises:
        Refused: With what is wrong.
    """
    given = {_ALIASES.get(key, key): value for key, value in data.items()}
    take, passed_on = given.pop, abilities.takes_options
    stream_options = take("stream_options", {})
    logprobs = take("logprobs", False)
    if not chat and type(logprobs) is int and logprobs > 1:
        given["top_logprobs"] = logprobs
    tools = _tools(take("tools", None)) if chat else None
    strict = False
    if not passed_on:
        tools, strict = plain_tools(tools)
    request = WireRequest(
        messages=_messages(take("messages", None), as_given=passed_on) if chat else None,
        prompt=None if chat else _prompt(take("prompt", None)),
        tools=tools,
        params=_params(given, abilities.sampling, names),
        options={},
        choices=_choices(take("n", 1)),
        stream=bool(take("stream", False)),
        usage=isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
        logprobs=bool(logprobs) if chat else logprobs is not False,
        token_ids=bool(take("return_token_ids", False)),
        tokens_as_ids=bool(take("return_tokens_as_token_ids", False)),
        ignored=ignored,
    )
    rendering = rendering_options(given, chat)
    options = {key: value for key, value in given.items() if not is_neutral(key, value)}
    if passed_on:
        return replace(request, options={**options, **rendering})
    if unknown := options.keys() - KNOWN_OPTIONS:
        name = min(unknown)
        known = {*KNOWN_OPTIONS, *_SAMPLING, "messages", "tools", "stream", "n"}
        problem = f"there is no parameter {names.get(name, name)!r}. {did_you_mean(name, known)}"
        raise Refused(400, f"{problem} {how_to_ignore(name)}", "unsupported_parameter", name)
    if not options and not strict:
        return replace(request, options=rendering) if rendering else request
    found = Options.of(options, tools, strict, abilities, names)
    if found.template_kwargs:
        rendering["chat_template_kwargs"] = {**found.template_kwargs, **rendering.get("chat_template_kwargs", {})}
    params = replace(request.params, reply_format=found.reply_format)
    if found.top_logprobs:
        params = replace(params, top_logprobs=found.top_logprobs)
    return replace(
        request,
        params=params,
        options=rendering,
        calls_tools=found.calls_tools,
        parallel=found.parallel,
        ignored=(*ignored, *found.ignored),
    )


def rendering_options(given: dict[str, Any], chat: bool) -> dict[str, Any]:
    """Takes from a request's fields those that say how its prompt becomes tokens. Raises Refused for a malformed one."""
    name, kind, expected = ("chat_template_kwargs", dict, "an object") if chat else _SPECIAL_TOKENS
    if name not in given:
        return {}
    value = given.pop(name)
    if not isinstance(value, kind):
        raise Refused(400, f"{name} is {json.dumps(value)[:80]}; expected {expected}.", None, name)
    return {name: value}


_SPECIAL_TOKENS = ("add_special_tokens", bool, "true or false")


def _params(given: dict[str, Any], defaults: SamplingParams, names: Mapping[str, str]) -> SamplingParams:
    found = {name: given.pop(name) for name in _SAMPLING if name in given}
    if not found:
        return defaults
    if "stop" in found:
        stop = found["stop"]
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            shown = names.get("stop", "stop")
            raise Refused(400, f"{shown} is neither a text nor a list of texts.", None, shown)
        found["stop"] = tuple(filter(None, stop))
    for name, value in found.items():
        shown = names.get(name, name)
        if name != "stop" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Refused(400, f"{shown} is {json.dumps(value)[:80]}; expected a number.", None, shown)
    if "max_tokens" in found and (found["max_tokens"] < 1 or found["max_tokens"] != int(found["max_tokens"])):
        shown = names.get("max_tokens", "max_tokens")
        raise Refused(400, f"{shown} is {found['max_tokens']}; expected a whole number from 1 up.", None, shown)
    if not 0 <= found.get("temperature", 0) < float("inf"):
        raise Refused(400, f"temperature is {found['temperature']}; expected 0 or more.", None, "temperature")
    return replace(defaults, **found)


def _messages(messages: Any, as_given: bool) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages is missing or empty; expected a list of messages.", None, "messages")
    read = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(400, "a message is no object with a role.", None, f"messages[{i}]")
        if not as_given:
            # Libraries send `refusal: null` and the like; chat templates and comparisons want the message alone.
            message = {key: value for key, value in message.items() if value is not None and key != "annotations"}
            message["role"] = "system" if message["role"] == "developer" else message["role"]
            message["content"] = _text(message.get("content"), i)
            _check_tool_calls(message, i)
        read.append(message)
    return read


def _text(content: Any, i: int) -> str | None:
    """A message's content; a list of text parts as one text."""
    text = None if content is None else plain_content(content)
    if text is not None and not isinstance(text, str):
        raise Refused(400, "the policy reads text only, and the message has other content.", None, f"messages[{i}]")
    return text


def _check_tool_calls(message: dict[str, Any], i: int) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    calls = calls if isinstance(calls, list) else [calls]
    functions = [call.get("function") if isinstance(call, dict) else None for call in calls]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise Refused(400, "tool_calls is no list of calls of functions.", None, f"messages[{i}].tool_calls")
    if not calls:
        del message["tool_calls"]


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Refused(400, "tools is no list of tool schemas.", None, "tools")
    return tools or None


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
        return prompt
    if not isinstance(prompt, str) or not prompt:
        raise Refused(400, "prompt is neither a text nor a list of token ids; one prompt a request.", None, "prompt")
    return prompt


def _choices(n: Any) -> int:
    if type(n) is not int or not 1 <= n <= MOST_CHOICES:
        raise Refused(400, f"n is {json.dumps(n)[:80]}; expected a whole number from 1 to {MOST_CHOICES}.", None, "n")
    return n


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def answer_of(request: WireRequest, calls: Sequence[LLMCall], name: str, created: int) -> dict[str, Any]:
    """The answer to a request, one call a choice. name: unique among answers."""
    chat = request.messages is not None
    answer: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": calls[0].model,
        "choices": [_choice(request, call, i) for i, call in enumerate(calls)],
    }
    if (usage := usage_of(calls)) is not None:
        answer["usage"] = usage
    if chat and request.token_ids:
        answer["prompt_token_ids"] = calls[0].prompt_ids
    return answer


def events_of(request: WireRequest, calls: Sequence[LLMCall], name: str, created: int) -> Iterator[bytes]:
    """The same answer as server-sent events."""
    whole = answer_of(request, calls, name, created)
    choices, usage = whole.pop("choices"), whole.pop("usage", None)
    if request.messages is not None:
        whole["object"] = "chat.completion.chunk"
        choices = [part for choice in choices for part in _deltas(choice)]
    for part in choices:
        yield event({**whole, "choices": [part]})
        whole.pop("prompt_token_ids", None)  # in the first one only
    if request.usage and usage is not None:
        yield event({**whole, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    message = dict(choice["message"])
    calls = [{"index": i, **call} for i, call in enumerate(message.pop("tool_calls", ()))]
    ids = {"token_ids": choice["token_ids"]} if "token_ids" in choice else {}
    delta = {**message, **({"tool_calls": calls} if calls else {})}
    yield {"index": choice["index"], "delta": delta, "logprobs": choice["logprobs"], "finish_reason": None, **ids}
    yield {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}


def event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def _choice(request: WireRequest, call: LLMCall, index: int) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "finish_reason": call.finish_reason, "logprobs": None}
    if request.messages is None:
        choice["text"] = call.reply.get("content") or ""
        if request.token_ids:
            choice["prompt_token_ids"] = call.prompt_ids
    else:
        choice["message"] = {"refusal": None, **call.reply}
        if call.reply.get("tool_calls"):
            choice["finish_reason"] = "tool_calls"
    if request.token_ids:
        choice["token_ids"] = call.response_ids
    if request.logprobs and call.logprobs is not None:
        if request.messages is None:
            choice["logprobs"] = _text_logprobs(token_texts(request, call), call.logprobs)
            if _wants_alternatives(request):
                choice["logprobs"]["top_logprobs"] = call.top_logprobs
        else:
            choice["logprobs"] = {"content": chat_logprobs(request, call), "refusal": None}
    return choice


def token_texts(request: WireRequest, call: LLMCall) -> list[str]:
    """What the answer calls each sampled token."""
    if request.tokens_as_ids and call.response_ids is not None:
        return [f"token_id:{i}" for i in call.response_ids]
    return call.tokens or [""] * len(call.logprobs or ())


def chat_logprobs(request: WireRequest, call: LLMCall) -> list[dict[str, Any]]:
    """One entry a sampled token, with the likeliest ones in its place where they were asked for and are known."""
    texts, logprobs = token_texts(request, call), call.logprobs or ()
    content = [_token(text, value) | {"top_logprobs": []} for text, value in zip(texts, logprobs, strict=True)]
    if _wants_alternatives(request):
        for entry, top in zip(content, call.top_logprobs or (), strict=False):
            entry["top_logprobs"] = [_token(text, value) for text, value in top.items()]
    return content


def _wants_alternatives(request: WireRequest) -> bool:
    return bool(request.options.get("top_logprobs") or request.params.top_logprobs)


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": _bytes(text)}


def _bytes(text: str) -> list[int] | None:
    """None for a token that is part of a character only, whose bytes its text does not tell."""
    return None if "\ufffd" in text else list(text.encode("utf-8", "surrogatepass"))


def _text_logprobs(texts: Sequence[str], logprobs: Sequence[float]) -> dict[str, Any]:
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
    return {"tokens": list(texts), "token_logprobs": list(logprobs), "top_logprobs": None, "text_offset": offsets}


def usage_of(calls: Sequence[LLMCall]) -> dict[str, int] | None:
    """Numbers of tokens; None where they are not known."""
    if any(call.prompt_ids is None or call.response_ids is None for call in calls):
        return None
    prompt, completion = len(calls[0].prompt_ids or ()), sum(len(call.response_ids or ()) for call in calls)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI clients read it."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
