"""Log probabilities of sampled tokens by a causal language model's forward pass, and the entropy in their places.

Shapes are in the names: B sequences of T tokens, padded on the right. Column t always speaks of token t, so column 0, which
nothing predicts, is never trained. `mask_BT` is True where the policy sampled the token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lora import as_trained

__all__ = [
    "TokenScores",
    "forward_parameters",
    "logits_only",
    "score_tokens",
    "token_logprobs",
]

BESIDE_LOGITS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Settings of a model's config that make its forward pass return more than logits."""


class TokenScores(NamedTuple):
    """What a forward pass says of B sequences of T tokens; 0 where the policy did not sample the token."""

    logprobs_BT: Tensor
    """Log probability of each token given those before it."""
    entropies_BT: Tensor | None = None
    """Entropy in nats of the distribution that each token was drawn from, if it was asked for."""


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """What the model's forward pass takes, by name; of the model inside, where PEFT adapters are wrapped around it."""
    return inspect.signature(as_trained(model).forward).parameters


def logits_only(model: Any) -> dict[str, bool]:
    """Arguments with which the forward pass computes logits and nothing beside them, whatever the model's config says.

    With `output_router_logits: true`, as many finetuned mixtures of experts have it, the forward pass also computes the
    load-balancing loss. It is no part of the GRPO loss, and counting experts over cached tokens makes it fail. So it is
    never computed: routers learn by the gradient of the sampled tokens alone. Saved models keep their config's setting.
    """
    parameters = forward_parameters(model)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {}
    for name in BESIDE_LOGITS:
        asked_for = any(getattr(config, name, None) for config in (model.config, model.config.get_text_config()))
        if asked_for and (takes_any or name in parameters):
            arguments[name] = False
    return arguments


def token_logprobs(
    model: Any,
    ids_BT: Tensor,
    attention_BT: Tensor,
    mask_BT: Tensor,
    temperature_B: Tensor | float = 1.0,
    **options: Any,
) -> Tensor:
    """(B, T) float32, as in `score_tokens`."""
    return score_tokens(model, ids_BT, attention_BT, mask_BT, temperature_B, **options).logprobs_BT


def score_tokens(
    model: Any,
    ids_BT: Tensor,
    attention_BT: Tensor,
    mask_BT: Tensor,
    temperature_B: Tensor | float = 1.0,
    fed: int | None = None,
    entropies: bool = False,
    **before: Any,
) -> TokenScores:
    """(B, T) float32 log probability of each masked token given those before it, at the temperature at which it was
    sampled (> 0), and the entropy of that distribution; 0 where `mask_BT` is False.

    `model` is any Hugging Face causal language model. Its output layer runs only at columns that some row trains on:
    with a large vocabulary that layer is most of the cost. fed: columns that the model is given; the last one, of which
    nothing is predicted here, may be left out. None: all. entropies: whether they are computed. before: what the forward pass is
    to know of tokens before these (`past_key_values`, `position_ids`); `attention_BT` then covers them too.
    """
    columns_K = mask_BT.any(0).nonzero().squeeze(1)
    if columns_K.numel() and columns_K[0] == 0:
        raise ValueError("mask_BT trains on column 0, but nothing predicts a first token: put the prompt before it")
    before_K = columns_K - 1  # the logits at t - 1 speak of token t
    ids_BF = ids_BT[:, :fed]
    inputs = {"input_ids": ids_BF, "attention_mask": attention_BT[:, :fed], "use_cache": False, **before}
    inputs |= logits_only(model)
    if "logits_to_keep" in forward_parameters(model):
        inputs["logits_to_keep"] = before_K
    logits_BKV = model(**inputs).logits
    if logits_BKV.shape[1] == ids_BF.shape[1]:  # all columns: more than those asked for, as column 0 has none before it
        logits_BKV = logits_BKV[:, before_K]
    temperature_B11 = torch.as_tensor(temperature_B, dtype=torch.float32, device=ids_BT.device).reshape(-1, 1, 1)
    logits_BKV = logits_BKV.float() / temperature_B11
    total_BK = logits_BKV.logsumexp(2)

    def spread(values_BK: Tensor) -> Tensor:
        masked_BK = torch.where(mask_BT[:, columns_K], values_BK, 0.0)
        return torch.zeros(ids_BT.shape, device=ids_BT.device).index_copy(1, columns_K, masked_BK)

    logprobs_BT = spread(logits_BKV.gather(2, ids_BT[:, columns_K, None]).squeeze(2) - total_BK)
    if not entropies:
        return TokenScores(logprobs_BT)
    probabilities_BKV = (logits_BKV - total_BK[:, :, None]).exp()
    # A token that cannot be drawn (-inf) adds nothing: 0 * -inf would be NaN.
    expected_BK = (probabilities_BKV * logits_BKV.clamp(min=torch.finfo(torch.float32).min)).sum(2)
    return TokenScores(logprobs_BT, spread(total_BK - expected_BK))
