"""How a model's prompts can share a batch, seen by what its layers keep, and tried out where that does not say enough.

A model of attention layers alone pads short prompts on the left. Padding would enter the state of a recurrent layer, and
would move the blocks of one that keeps its keys in blocks; what such layers keep is computed for prompts of one length at a
time. Where no cache of a model gives what a plain forward pass gives, it is sampled without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ....errors import BackendError
from ....redaction import redacting_logger
from ....types import SamplingParams
from ..lora import as_trained
from ..memory import ran_out
from ..sampling import SampleRequest, sample_batch
from ..weights import dtype_name
from .caches import kinds_of_layers
from .passes import Batching, cache_name, forward_parameters

__all__ = ["batching_of"]

logger = redacting_logger(__name__)

LENGTHS = (3, 7, 7, 12)
"""Of the prompts with which a model is tried out: two of one length, and one that fills no convolution."""
REPLIES = (9, 2, 6, 3)
"""Tokens of their replies: those that end leave the batch, as they do in earnest."""
NOISE, NOISE_OF_HALVES = (2e-5, 1e-3), (0.02, 0.2)
"""Nats by which two ways to compute a log probability may differ, in the mean over what was tried: in any case, and at most.
In between, by ten times what a batch was seen to change. Of weights in 32 bits or more, and in 16."""

T = TypeVar("T")


def batching_of(model: Any) -> Batching:
    """How this model's prompts share a batch.

    Args:
        model: A causal language model of transformers, in evaluation mode.

    Returns:
        The fastest way that gives what a plain forward pass gives. A model of attention layers alone is known, any other
        one is tried out with a few short passes.

    Raises:
        BackendError: A plain forward pass over the model's tokens does not give what reinforcement learning needs: the log
            probability of each token given those before it.
    """
    if _is_usual(model):
        return "padded"
    noise = _check_plain_passes(model)
    for way in _ways(model):
        objection = _objection(model, way, noise)
        if objection is None:
            break
        logger.info("%s is not sampled with batching %r: %s", _name(model), way, objection)
    else:
        raise BackendError(
            f"{_name(model)} gives other log probabilities when it is sampled token by token than in one forward pass; expected "
            "the same. It cannot be trained exactly here: take another model."
        )
    if way == "alone":
        logger.warning(
            "%s is sampled one reply at a time: its batches do not give what each sequence gives.", _name(model)
        )
    if way == "whole":
        logger.warning(
            "%s keeps nothing that can be used from one token to the next, so each token takes a pass over all tokens before it. "
            "Sampling is exact, and slow for long replies.",
            _name(model),
        )
    return way


def _name(model: Any) -> str:
    return type(as_trained(model)).__name__


def _is_usual(model: Any) -> bool:
    """Whether all is known of it: attention layers alone, which are told where padding is and which positions tokens have."""
    told = {"past_key_values", "attention_mask", "position_ids"} <= set(forward_parameters(model))
    # Families that say whether they are a decoder may be an encoder, and count positions in ways of their own.
    either = hasattr(model.config.get_text_config(), "is_decoder")
    return told and not either and _keeps_keys_only(model)


def _keeps_keys_only(model: Any) -> bool:
    from transformers import cache_utils

    # A convolution over tokens is a state, too.
    if getattr(as_trained(model), "_is_stateful", False) or any(
        isinstance(m, torch.nn.Conv1d) for m in model.modules()
    ):
        return False
    known = {cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", None)}
    kinds = kinds_of_layers(model)
    return bool(kinds) and kinds <= known


def _ways(model: Any) -> list[Batching]:
    """What to try, the fastest first."""
    if cache_name(model) is None:
        return ["whole"]
    ways: list[Batching] = ["joined", "equal", "alone", "whole"]
    return ["padded", *ways] if _keeps_keys_only(model) else ways


def _check_plain_passes(model: Any) -> float:
    """Nats that are noise. Raises BackendError where a token's probability depends on more than the tokens before it."""
    least, most = NOISE if torch.finfo(model.dtype).bits > 16 else NOISE_OF_HALVES
    rows = [prompt + [prompt[0]] * 4 for prompt in _prompts(model)]

    def passes() -> tuple[list[Tensor], list[Tensor], Tensor]:
        return (
            [_plain(model, row) for row in rows],
            [_plain(model, row[:-4]) for row in rows],
            _in_one_pass(model, rows),
        )

    tried = _tried(passes)
    if isinstance(tried, Exception):
        raise BackendError(
            f"{_name(model)} cannot compute log probabilities from token ids alone, in {dtype_name(model)} on {model.device} "
            f"({type(tried).__name__}: {tried}). Expected a causal language model: take another one, or another dtype."
        ) from tried
    alone, shorter, together = tried
    if not all(logprobs.isfinite().all() for logprobs in alone):
        raise BackendError(
            f"{_name(model)} gives log probabilities that are not finite: its weights have diverged, or {dtype_name(model)} does "
            "not hold what it computes. Start from saved weights, or take another dtype."
        )
    by_later_tokens = max(_difference(a, b[: len(a)]) for a, b in zip(shorter, alone, strict=True))
    if not by_later_tokens <= most:
        raise BackendError(
            f"{_name(model)} is not a causal language model: its log probabilities change by {by_later_tokens:.2g} nats with the "
            "tokens that come later. Expected one that sees only the tokens before, as decoders do (some encoders are one with "
            "is_decoder=True in their config). Take another model."
        )
    by_company = max(_difference(a, b[: len(a)]) for a, b in zip(alone, together, strict=True))
    if not by_company <= most:
        raise BackendError(
            f"{_name(model)} gives log probabilities that change by {by_company:.2g} nats with what else is in a batch; expected "
            "the same as alone. It cannot be trained exactly here: take another model."
        )
    return min(max(least, 10 * by_company), most)


def _objection(model: Any, way: Batching, noise: float) -> str | None:
    """Why prompts cannot be sampled so; None where they can."""
    requests = [
        SampleRequest(prompt, SamplingParams(1.0, count), seed)
        for seed, (prompt, count) in enumerate(zip(_prompts(model), REPLIES, strict=True))
    ]

    def differences() -> list[float]:
        sample_batch(model, requests, end_ids=frozenset(), pad_id=0, text=lambda ids: "", batching=way)
        return [_difference(torch.tensor(request.logprobs), _of_reply(model, request)) for request in requests]

    tried = _tried(differences)
    if isinstance(tried, Exception):
        return f"{type(tried).__name__}: {tried}"
    return None if max(tried) <= noise else f"log probabilities differ by {max(tried):.2g} nats"


def _prompts(model: Any) -> list[list[int]]:
    """Drawn ids, the token that pads among them: some models take it for padding wherever it is."""
    config, generator = model.config.get_text_config(), torch.Generator().manual_seed(0)
    prompts = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < config.vocab_size:
        prompts[-1][1] = padding
    return prompts


@torch.inference_mode()
def _tried(attempt: Callable[[], T]) -> T | Exception:
    """What it gives, or what it raises unless that is for want of memory."""
    try:
        return attempt()
    except Exception as error:
        if ran_out(error):
            raise
        return error


def _plain(model: Any, ids: list[int]) -> Tensor:
    """(T, V) log probabilities of what comes after each token, from a plain forward pass."""
    logits_TV = model(torch.tensor([ids], device=model.device)).logits[0]
    return logits_TV.float().log_softmax(-1).cpu()


def _in_one_pass(model: Any, rows: list[list[int]]) -> Tensor:
    """(B, T, V) of all rows, padded on the right as in training."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    return model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits.float().log_softmax(-1).cpu()


def _of_reply(model: Any, request: SampleRequest) -> Tensor:
    """The log probabilities of a sampled reply, from a plain forward pass."""
    begin = len(request.ids)
    plain_TV = _plain(model, [*request.ids, *request.reply])
    return plain_TV[begin - 1 : -1].gather(1, torch.tensor(request.reply)[:, None]).squeeze(1)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Nats, in the mean; NaN where one of the two is not a number."""
    return (found - expected).abs().mean().item()
