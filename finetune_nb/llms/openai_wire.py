"""The wire format of the OpenAI API: requests read from JSON, recorded calls written as answers, whole or as a stream.

Pure functions; who is asked and who asks is the gateway's affair. A request that cannot be honoured is refused, never
half honoured: a parameter that changes what is sampled must not be dropped in silence, or training would not know of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import did_you_mean
from ..types import LLMCall, SamplingParams, plain_content

__all__ = [
    "Refused",
    "WireRequest",
    "answer_of",
    "error_body",
    "events_of",
    "read_request",
]

MOST_CHOICES = 128
_ALIASES = {"max_completion_tokens": "max_tokens"}
_IGNORED = {
    "model",  # the address says which model
    "seed",  # every call has one of its own; a fixed one would make all rollouts of a group alike
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "add_special_tokens",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
}
"""Parameters that change nothing at these values."""
_KNOWN_OPTIONS = {
    *_NEUTRAL,
    "reasoning_effort",
    "verbosity",
    "prediction",
    "web_search_options",
    "function_call",
    "audio",
}


class Refused(Exception):
    """A request that is answered with an error. `code` and `param` as in the OpenAI API."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class WireRequest:
    """One request, checked. Either `messages` or `prompt` is set."""

    messages: list[dict[str, Any]] | None
    prompt: str | list[int] | None
    tools: list[dict[str, Any]] | None
    params: SamplingParams
    options: dict[str, Any]
    """Parameters that change what is sampled, but that SamplingParams does not have."""
    choices: int
    stream: bool
    usage: bool
    """Whether a stream ends with the number of tokens."""
    logprobs: bool
    token_ids: bool
    tokens_as_ids: bool


def read_request(body: bytes, chat: bool, defaults: SamplingParams, takes_options: bool) -> WireRequest:
    """A request's JSON body. defaults: for parameters that it does not give. takes_options: whether parameters beyond
    SamplingParams are passed on, and messages left as they are. Raises Refused with what is wrong."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request's body is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refused(400, f"the request's body is a JSON {type(data).__name__}; expected an object.")
    given: dict[str, Any] = {_ALIASES.get(str(key), str(key)): v for key, v in data.items() if v is not None}
    take = given.pop
    stream_options = take("stream_options", {})
    request = WireRequest(
        messages=_messages(take("messages", None), as_given=takes_options) if chat else None,
        prompt=None if chat else _prompt(take("prompt", None)),
        tools=_tools(take("tools", None)) if chat else None,
        params=_params(given, defaults),
        options={},
        choices=_choices(take("n", 1)),
        stream=bool(take("stream", False)),
        usage=isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
        logprobs=_logprobs(take("logprobs", False), chat),
        token_ids=bool(take("return_token_ids", False)),
        tokens_as_ids=bool(take("return_tokens_as_token_ids", False)),
    )
    options = {
        key: value
        for key, value in given.items()
        if key not in _IGNORED and not any(value == neutral for neutral in _NEUTRAL.get(key, ()))
    }
    if options and not takes_options:
        name = min(options)
        known = {*_KNOWN_OPTIONS, *(f.name for f in fields(SamplingParams)), "messages", "tools", "stream", "n"}
        problem = (
            f"the policy cannot honour {name}={json.dumps(options[name])[:80]}. Leave it out."
            if name in _KNOWN_OPTIONS
            else f"there is no parameter {name!r}. {did_you_mean(name, known)}"
        )
        raise Refused(400, problem, "unsupported_parameter", name)
    return replace(request, options=options)


def _params(given: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    found = {f.name: given.pop(f.name) for f in fields(SamplingParams) if f.name in given}
    if "stop" in found:
        stop = found["stop"]
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise Refused(400, "stop is neither a text nor a list of texts.", None, "stop")
        found["stop"] = tuple(filter(None, stop))
    for name, value in found.items():
        if name != "stop" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Refused(400, f"{name} is {json.dumps(value)[:80]}; expected a number.", None, name)
    if "max_tokens" in found and (found["max_tokens"] < 1 or found["max_tokens"] != int(found["max_tokens"])):
        raise Refused(
            400, f"max_tokens is {found['max_tokens']}; expected a whole number from 1 up.", None, "max_tokens"
        )
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


def _logprobs(asked: Any, chat: bool) -> bool:
    if chat or isinstance(asked, bool):
        return bool(asked)
    if type(asked) is not int or asked > 1:
        raise Refused(400, "logprobs is above 1: only those of the sampled tokens are known.", None, "logprobs")
    return True


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
    if (usage := _usage(calls)) is not None:
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
        yield _event({**whole, "choices": [part]})
        whole.pop("prompt_token_ids", None)  # in the first one only
    if request.usage and usage is not None:
        yield _event({**whole, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    message = dict(choice["message"])
    calls = [{"index": i, **call} for i, call in enumerate(message.pop("tool_calls", ()))]
    ids = {"token_ids": choice["token_ids"]} if "token_ids" in choice else {}
    delta = {**message, **({"tool_calls": calls} if calls else {})}
    yield {"index": choice["index"], "delta": delta, "logprobs": choice["logprobs"], "finish_reason": None, **ids}
    yield {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}


def _event(chunk: dict[str, Any]) -> bytes:
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
        texts = call.tokens or [""] * len(call.logprobs)
        if request.tokens_as_ids and call.response_ids is not None:
            texts = [f"token_id:{i}" for i in call.response_ids]
        if request.messages is None:
            choice["logprobs"] = _text_logprobs(texts, call.logprobs)
        else:
            likeliest = call.top_logprobs if request.options.get("top_logprobs") else None
            choice["logprobs"] = _chat_logprobs(texts, call.logprobs, likeliest)
    return choice


def _chat_logprobs(
    texts: Sequence[str], logprobs: Sequence[float], likeliest: Sequence[dict[str, float]] | None
) -> dict[str, Any]:
    content = [_token(text, value) | {"top_logprobs": []} for text, value in zip(texts, logprobs, strict=True)]
    for entry, top in zip(content, likeliest or (), strict=False):
        entry["top_logprobs"] = [_token(text, value) for text, value in top.items()]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": _bytes(text)}


def _bytes(text: str) -> list[int] | None:
    """None for a token that is part of a character only, whose bytes its text does not tell."""
    return None if "\ufffd" in text else list(text.encode("utf-8", "surrogatepass"))


def _text_logprobs(texts: Sequence[str], logprobs: Sequence[float]) -> dict[str, Any]:
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
    return {"tokens": list(texts), "token_logprobs": list(logprobs), "top_logprobs": None, "text_offset": offsets}


def _usage(calls: Sequence[LLMCall]) -> dict[str, int] | None:
    """Numbers of tokens; None where they are not known."""
    if any(call.prompt_ids is None or call.response_ids is None for call in calls):
        return None
    prompt, completion = len(calls[0].prompt_ids or ()), sum(len(call.response_ids or ()) for call in calls)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI clients read it."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
