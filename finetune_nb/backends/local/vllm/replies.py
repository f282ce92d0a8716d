"""A reply as a request to vLLM, and vLLM's answer as a reply."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ....errors import BackendError, ConfigError
from ....types import Sample, SamplingParams
from .client import message_of

__all__ = [
    "check_params",
    "request_for",
    "sample_in",
]

LEAST_TEMPERATURE = 0.01
"""A lower one above 0 vLLM silently takes for this."""


def check_params(params: SamplingParams) -> None:
    """Raises ConfigError for what vLLM would silently sample in another way."""
    if 0 < params.temperature < LEAST_TEMPERATURE:
        raise ConfigError(
            f"temperature is {params.temperature:g}, which vLLM takes for {LEAST_TEMPERATURE}. Expected 0, or at least that."
        )


def request_for(ids: Sequence[int], params: SamplingParams, seed: int, end_ids: Iterable[int]) -> dict[str, Any]:
    """The body of a request to /v1/completions, but for the model's name.

    All is said that the server, or the model's own generation settings, would otherwise decide.
    """
    body: dict[str, Any] = {
        "prompt": ids,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed % 2**63,
        "logprobs": params.top_logprobs,
        "return_token_ids": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "stop_token_ids": sorted(end_ids),
    }
    if params.stop:
        body["stop"] = list(params.stop)
    if params.top_logprobs:
        body["return_tokens_as_token_ids"] = True  # the likeliest ones, too
    return body


def sample_in(answer: Any, name: str, ids: Sequence[int], params: SamplingParams, vocabulary: int) -> Sample:
    """The reply in an answer to `request_for`.

    Args:
        answer: What /v1/completions answered with status 200.
        name: The model that was asked.
        ids: The prompt.
        params: How it was to be sampled.
        vocabulary: Token ids are below it.

    Raises:
        BackendError: It is not a whole reply of that model to that prompt.
        ConfigError: The server gives no token ids or log probabilities.
    """
    try:
        (choice,) = answer["choices"]
        reason, reply, found = choice["finish_reason"], choice.get("token_ids"), choice.get("logprobs")
        model, prompt = answer["model"], choice.get("prompt_token_ids")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BackendError(
            f"the vLLM server answers with something that is no completion: {message_of(answer)}"
        ) from error
    if reason not in ("stop", "length"):
        raise BackendError(
            f"the vLLM server gave up a reply (finish reason {reason!r:.40}): its requests were aborted, or it was paused. The "
            "rollout is left out, and not taken for one that ended. Run the epoch again without pausing the server."
        )
    if model != name:
        raise BackendError(f"the vLLM server answers with model {model!r:.80}; expected {name!r}")
    logprobs = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(reply, list) or not isinstance(logprobs, list) or len(reply) != len(logprobs) or not reply:
        raise ConfigError(
            "the vLLM server gives no token ids with their log probabilities. Expected vLLM 0.10.2 or newer, whose completions "
            "return them."
        )
    if prompt is not None and prompt != list(ids):
        raise BackendError("the vLLM server sampled after another prompt than the one that it was given")
    if not _all_finite(logprobs):
        raise BackendError(
            "the vLLM server gives log probabilities that are no finite numbers: the weights have diverged. Start from saved "
            "ones."
        )
    if set(map(type, reply)) != {int} or min(reply) < 0 or max(reply) >= vocabulary:
        raise BackendError(
            f"the vLLM server sampled a token that the model does not know; expected ids below {vocabulary}. Start it with the "
            "model that is trained."
        )
    likeliest = None
    if params.top_logprobs:
        likeliest = [_likeliest(top, params.top_logprobs) for top in found.get("top_logprobs") or ()]
        if len(likeliest) != len(reply):
            raise BackendError("the vLLM server gives no top_logprobs. Leave them out of the sampling parameters.")
    return Sample(reply, logprobs, reason, likeliest)


def _all_finite(values: list[Any]) -> bool:
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):
        return False


def _likeliest(top: Any, count: int) -> dict[int, float]:
    """id -> log probability of the likeliest tokens in one place, as vLLM gives them: "token_id:5" -> -1.5."""
    named = top.items() if isinstance(top, dict) else ()
    found = {int(name[9:]): value for name, value in named if name.startswith("token_id:") and name[9:].isdigit()}
    return dict(sorted(found.items(), key=lambda each: -each[1])[:count])
