"""vLLM's `/inference/v1/generate`: token ids in, token ids and log probabilities out, for clients that render by themselves.

The answer has what vLLM's own clients read (`token_id`), and what those of verifiers and prime-rl read (`token`, as
"token_id:504").
Nothing here is tokenized: the ids of a request are the prompt's, those of the answer are what was sampled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...types import LLMCall
from ..openai_wire import Refused, WireRequest, json_object, request_of, usage_of
from .options import Abilities, without_ignored

__all__ = [
    "answer_of",
    "error_body",
    "read",
    "until_stop_token",
]

_ABOUT_TEXT = ("skip_special_tokens", "spaces_between_special_tokens", "detokenize", "include_stop_str_in_output")
"""Parameters of vLLM that change a reply's text, of which the answer has none."""
_OF_THE_SERVER = ("request_id", "cache_salt", "priority", "routed_experts_prompt_start", "output_kind")
"""Parameters that change nothing of what is sampled."""
_NEUTRAL = {"min_tokens": 0, "ignore_eos": False, "bad_words": [], "stream": False}
_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError"}


def read(body: bytes, abilities: Abilities) -> WireRequest:
    """A request's JSON body.

    Args:
        body: With `token_ids`, and sampling parameters in `sampling_params`.
        abilities: Of the model that is asked.

    Returns:
        The request. Its `shown` has what only this API knows: `stop_token_ids` and `request_id`.

    Raises:
        Refused: 400 for what is malformed or cannot be honoured, 404 for a model of another server, whose ids are not known here.
    """
    if abilities.takes_options:
        raise Refused(404, "this model is one of another server: ask it by chat completions.", "unknown_url")
    given = json_object(body)
    sampling = given.pop("sampling_params", {})
    if not isinstance(sampling, dict):
        raise Refused(400, f"sampling_params is {_shown(sampling)}; expected an object.", None, "sampling_params")
    given |= {name: value for name, value in sampling.items() if value is not None}
    for name in ("features", "content_parts"):
        if given.pop(name, None):
            raise Refused(400, f"{name}: the policy reads token ids only.", None, name)
    given, ignored = without_ignored(given, abilities)
    prompt, stop_ids = given.pop("token_ids", None), given.pop("stop_token_ids", [])
    for name, ids in (("token_ids", prompt), ("stop_token_ids", stop_ids)):
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise Refused(400, f"{name} is {_shown(ids)}; expected a list of whole numbers from 0 up.", None, name)
    if not prompt:
        raise Refused(400, "token_ids is empty; expected the prompt.", None, "token_ids")
    logprobs = given.get("logprobs", 0)
    if type(logprobs) is not int or not 0 <= logprobs <= 1:
        raise Refused(
            400, f"logprobs is {_shown(logprobs)}; expected 0 or 1: the sampled token's are told.", None, "logprobs"
        )
    about = {"stop_token_ids": frozenset(stop_ids), "request_id": given.get("request_id")}
    for name in (*_ABOUT_TEXT, *_OF_THE_SERVER):
        given.pop(name, None)
    for name, neutral in _NEUTRAL.items():
        if name in given and given[name] == neutral:
            del given[name]
    if given.pop("stream", False):
        raise Refused(400, "stream: answers come whole.", "unsupported_parameter", "stream")
    return replace(request_of({**given, "prompt": prompt}, False, abilities, ignored), shown=about)


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]


def until_stop_token(call: LLMCall, request: WireRequest, text: Any) -> LLMCall:
    """The call as if it had ended at the first of the request's stop tokens, which belongs to the reply. What was sampled up to
    there does not depend on what came after.

    text: tells the text of ids.
    """
    stops = request.shown["stop_token_ids"]
    ids = call.response_ids or []
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), None)
    if end is None:
        return call

    def cut(values: Any) -> Any:
        return None if values is None else values[:end]

    return replace(
        call,
        reply={"role": "assistant", "content": text(ids[:end])},
        response_ids=ids[:end],
        tokens=cut(call.tokens),
        logprobs=cut(call.logprobs),
        top_logprobs=cut(call.top_logprobs),
        entropies=cut(call.entropies),
        finish_reason="stop",
    )


def answer_of(request: WireRequest, calls: Sequence[LLMCall], name: str, created: int) -> dict[str, Any]:
    """The answer to a request, one call a choice. name: unique among answers."""
    return {
        "request_id": request.shown["request_id"] or f"generate-{name}",
        "model": calls[0].model,
        "created": created,
        "choices": [_choice(call, index) for index, call in enumerate(calls)],
        "usage": usage_of(calls),
        "prompt_token_ids": calls[0].prompt_ids if request.token_ids else None,
        "output_mode": "tokens",
        "prompt_logprobs": None,
        "kv_transfer_params": None,
    }


def _choice(call: LLMCall, index: int) -> dict[str, Any]:
    ids, logprobs = call.response_ids or [], call.logprobs or []
    return {
        "index": index,
        "token_ids": ids,
        "logprobs": {
            "content": [
                {"token": f"token_id:{token}", "token_id": token, "logprob": value, "bytes": None, "top_logprobs": []}
                for token, value in zip(ids, logprobs, strict=True)
            ]
        },
        "finish_reason": call.finish_reason,
        "stop_reason": _stop_text(call),
        "weight_versions": [{"version": str(call.policy_version), "start": 0, "end": len(ids)}],
        "routed_experts": None,
    }


def _stop_text(call: LLMCall) -> str | None:
    """The stop text that ended a reply."""
    text = "".join(call.tokens or ())
    found = [(text.find(stop), stop) for stop in call.sampling.stop if stop in text]
    return min(found)[1] if found and call.finish_reason == "stop" else None


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error as vLLM answers it."""
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
