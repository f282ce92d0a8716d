"""The GRPO loss, and the supervised one: tensors in, tensors out. Nothing here knows trajectories, optimizers or jobs.

Shapes are in the names: B sequences of T tokens, padded on the right. Column t always speaks of token t, so column 0,
which nothing predicts, is never trained. `mask_BT` is True where the policy sampled the token; every other position is
ignored, whatever value (NaN included) is there. The loss is to be minimised: it is minus the clipped objective.

Group Relative Policy Optimization: DeepSeekMath, arXiv 2402.03300; the token mean over the batch and the two separate
clip bounds: DAPO, arXiv 2503.14476; the KL estimate: k3 of http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from .lora import as_trained

__all__ = [
    "LossStatistics",
    "forward_parameters",
    "logits_only",
    "policy_loss",
    "supervised_loss",
    "token_logprobs",
]

Loss = Literal["dapo", "grpo"]

BESIDE_LOGITS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Settings of a model's config that make its forward pass return more than logits."""


@dataclass(frozen=True, slots=True)
class LossStatistics:
    """Sums over trained tokens, so that the statistics of micro-batches can be added."""

    tokens: float = 0.0
    clipped_low: float = 0.0
    """Tokens of negative advantage whose ratio fell below 1 - clip_low: they give no gradient."""
    clipped_high: float = 0.0
    """Tokens of positive advantage whose ratio rose above 1 + clip_high: they give no gradient."""
    ratio: float = 0.0
    """Probability now over probability when sampled."""
    kl_old: float = 0.0
    """KL(sampling policy || policy) in nats, estimated as ratio - 1 - log ratio."""
    kl_reference: float = 0.0
    """KL(policy || reference) in nats, k3; 0 where there is no reference."""
    gap: float = 0.0
    """|log probability now - when sampled|: before the first step, what the forward pass and the sampler differ by."""

    def __add__(self, other: LossStatistics) -> LossStatistics:
        return LossStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def mean(self, name: str) -> float:
        """A sum per trained token; NaN without tokens."""
        return getattr(self, name) / self.tokens if self.tokens else float("nan")


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
    fed: int | None = None,
    **before: Any,
) -> Tensor:
    """(B, T) float32 log probability of each masked token given those before it, at the temperature at which it was
    sampled (> 0); 0 where `mask_BT` is False.

    `model` is any Hugging Face causal language model. Its output layer runs only at columns that some row trains on:
    with a large vocabulary that layer is most of the cost. fed: columns that the model is given; the last one, of which
    nothing is predicted here, may be left out. None: all. before: what the forward pass is to know of tokens before these
    (`past_key_values`, `position_ids`); `attention_BT` then covers them too.
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
    chosen_BK = logits_BKV.gather(2, ids_BT[:, columns_K, None]).squeeze(2) - logits_BKV.logsumexp(2)
    chosen_BK = torch.where(mask_BT[:, columns_K], chosen_BK, 0.0)
    return torch.zeros(ids_BT.shape, device=ids_BT.device).index_copy(1, columns_K, chosen_BK)


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss: Loss = "dapo",
    kl_coef: float = 0.0,
    reference_logprobs_BT: Tensor | None = None,
    batch_tokens: float | None = None,
    batch_sequences: float | None = None,
) -> tuple[Tensor, LossStatistics]:
    """The loss of one micro-batch and its statistics. The losses of an optimizer batch's micro-batches add up to the
    loss of the batch, and so do their gradients.

    Per token: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3, where ratio is
    exp(logprob - old logprob) and A the advantage: (B,), one a sequence, or (B, T), one a token.
    `loss`: "dapo" divides the sum over tokens by the tokens of the whole optimizer batch (`batch_tokens`); "grpo" takes
    the mean of each sequence, and divides their sum by the sequences of the whole optimizer batch
    (`batch_sequences`). Either None: this micro-batch is the whole batch.
    """
    if kl_coef and reference_logprobs_BT is None:
        raise ValueError(f"kl_coef is {kl_coef}, but there are no reference logprobs to hold the policy to")
    # Masked before exp: the value at an ignored position must not turn into inf or NaN, which survive times 0.
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = -torch.minimum(ratio_BT * advantages, clipped_BT * advantages)
    kl_reference_BT = torch.zeros_like(log_ratio_BT)
    if kl_coef and reference_logprobs_BT is not None:
        log_reference_ratio_BT = torch.where(mask_BT, reference_logprobs_BT - logprobs_BT, 0.0)
        kl_reference_BT = log_reference_ratio_BT.exp() - log_reference_ratio_BT - 1
        loss_BT = loss_BT + kl_coef * kl_reference_BT
    loss_BT = torch.where(mask_BT, loss_BT, 0.0)

    tokens_B = mask_BT.sum(1)
    if loss == "dapo":
        value = loss_BT.sum() / (tokens_B.sum().clamp(min=1) if batch_tokens is None else batch_tokens)
    elif loss == "grpo":
        sequences = len(mask_BT) if batch_sequences is None else batch_sequences
        value = (loss_BT.sum(1) / tokens_B.clamp(min=1)).sum() / sequences
    else:
        raise ValueError(f"loss is {loss!r}; expected 'dapo' (mean over tokens) or 'grpo' (mean over sequences)")

    with torch.no_grad():
        kl_old_BT = ratio_BT - 1 - log_ratio_BT
        sums = torch.stack(
            [
                mask_BT.sum(),
                (mask_BT & (ratio_BT < 1 - clip_low) & (advantages < 0)).sum(),
                (mask_BT & (ratio_BT > 1 + clip_high) & (advantages > 0)).sum(),
                torch.where(mask_BT, ratio_BT, 0.0).sum(),
                kl_old_BT.sum(),  # 0 at ignored positions, as their log ratio is
                torch.where(mask_BT, kl_reference_BT, 0.0).sum(),
                log_ratio_BT.abs().sum(),
            ]
        )
    return value, LossStatistics(*sums.tolist())


def supervised_loss(
    logprobs_BT: Tensor, mask_BT: Tensor, batch_tokens: float | None = None
) -> tuple[Tensor, LossStatistics]:
    """The supervised loss of one micro-batch, minus the mean log probability of the sampled tokens, and its statistics: how many
    tokens there were. What compares with the policy that sampled them is NaN.

    batch_tokens: the tokens of the whole optimizer batch, whose loss the losses of its micro-batches add up to. None: this
    micro-batch is the whole batch.
    """
    tokens = mask_BT.sum()
    value = -torch.where(mask_BT, logprobs_BT, 0.0).sum()
    value = value / (tokens.clamp(min=1) if batch_tokens is None else batch_tokens)
    unknown = dict.fromkeys((f.name for f in fields(LossStatistics) if f.name != "tokens"), float("nan"))
    return value, LossStatistics(tokens=tokens.item(), **unknown)
