"""Whether a server samples the model that is trained: both score the same ids.

That shows another base model, an adapter that is not applied, a dtype, and log probabilities of another distribution than the one
that was drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ....errors import BackendError, ConfigError
from ....redaction import redacting_logger
from ....types import SamplingParams
from ..scoring import score
from .client import VLLMClient, message_of
from .replies import request_for, sample_in

if TYPE_CHECKING:
    from ..policy import LocalPolicy

__all__ = ["prove"]

logger = redacting_logger(__name__)

TEXT = "The quick brown fox jumps over the lazy dog. 1 2 3 4 5 6 7 8 9 10 11 12"
TOKENS = 16
TEMPERATURE = 0.5
"""Not 1, at which log probabilities of both distributions are the same."""
TOLERANCE, TOLERANCE_HALF = 0.02, 0.15
"""Mean difference of log probabilities (nats) beyond which the weights are others: where both compute in float32, which makes
1e-5, and where one of them is in half precision, which makes 0.03 in bfloat16."""


def prove(
    client: VLLMClient,
    policy: LocalPolicy,
    name: str,
    adapted: bool,
    dtype: str,
    timeout: float,
    given_up: Callable[[], bool] = lambda: False,
) -> None:
    """Samples a few tokens there, and scores them here.

    Args:
        client: Of the server.
        policy: What is trained.
        name: What the server calls the base model, or the adapter.
        adapted: Whether that is the adapter.
        dtype: What the server computes in.
        timeout: Seconds that the server may take: its first request takes long.
        given_up: Asked while somebody else has the weights; True ends it.

    Raises:
        ConfigError: The server samples another model, or gives log probabilities of another distribution.
        BackendError: It does not answer.
    """
    prompt = [token for token in policy.encode(TEXT) if token < policy.vocabulary] or [0]
    room = policy.longest or 2**20
    prompt = prompt[: max(1, room // 2)]
    params = SamplingParams(TEMPERATURE, max_tokens=max(1, min(TOKENS, room - len(prompt))))
    body = {**request_for(prompt, params, 0, ()), "model": name, "ignore_eos": True}
    status, answer = client.ask("POST", "/v1/completions", body, timeout)
    if status >= 500:
        raise BackendError(
            f"the vLLM server at {client.root} fails at its first request ({status}: {message_of(answer)})"
        )
    if status != 200:
        raise _other_model(
            client, policy, adapted, f"it refuses a prompt of {len(prompt)} ids ({status}: {message_of(answer)})"
        )
    sample = sample_in(answer, name, prompt, params, policy.vocabulary)
    with policy.exclusive.hold(given_up) as alone:
        if not alone:
            raise BackendError("the vLLM server was not compared with the model: the run is closed")
        here, plain = score(policy.model, prompt, sample.ids, (TEMPERATURE, 1.0), adapted)
    gap = _mean_gap(sample.logprobs, here)
    most = TOLERANCE if {policy.dtype, dtype} == {"float32"} else TOLERANCE_HALF
    logger.info("vLLM's log probabilities differ by %.1e nats on average from those of the model that is trained", gap)
    if gap <= most:
        return
    if _mean_gap(sample.logprobs, plain) <= most:
        raise ConfigError(
            f"the vLLM server at {client.root} gives log probabilities of the model as it is, and not of the distribution that "
            "was drawn from: at another temperature than 1, training would see another policy than was sampled. Start it with "
            "--logprobs-mode processed_logprobs."
        )
    computed = policy.dtype if policy.dtype == dtype else f"{policy.dtype} here and {dtype} there"
    found = f"log probabilities of the same ids differ by {gap:.2g} nats on average; in {computed} at most {most:g} are expected"
    hint = (
        "If it was started with --dtype bfloat16, that alone makes such a difference: set sampler.dtype to 'bfloat16', and "
        "importance_cap to 2.0, which corrects for it. "
        if gap <= TOLERANCE_HALF
        else ""
    )
    raise _other_model(client, policy, adapted, found, hint)


def _other_model(client: VLLMClient, policy: LocalPolicy, adapted: bool, found: str, hint: str = "") -> ConfigError:
    try:
        roots = ", ".join(str(model.get("root")) for model in client.models() if model.get("parent") is None)
    except BackendError:
        roots = "what it does not say"
    where = "the adapter as it is trained" if adapted else "the model that is trained"
    cure = (
        "Choose other layers as lora.target, such as the attention's, or sample without a server (leave sampler out)."
        if adapted
        else f"Start it with {policy.source or 'that model'} and --dtype {policy.dtype}, or train the model that it serves."
    )
    return ConfigError(
        f"the vLLM server at {client.root} does not sample {where}: {found}. It serves {roots}. {hint}{cure} No rollout was "
        "started."
    )


def _mean_gap(found: Sequence[float], expected: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(found)
