"""The losses of policy gradients by name, and the supervised one: tensors in, tensors out. Nothing here knows trajectories,
optimizers or jobs.

Shapes are in the names: B sequences of T tokens, padded on the right. `mask_BT` is True where the policy sampled the token;
every other position is ignored, whatever value (NaN included) is there. A loss is to be minimised: it is minus the objective.

A loss is four choices: what the advantage is divided by (`training/batch.py` does that), whether the ratio of probabilities is a
token's or a sequence's, how a ratio far from 1 is held back, and over what the tokens are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from ..config import LOSSES

__all__ = [
    "LossStatistics",
    "policy_loss",
    "supervised_loss",
]


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
    """KL(policy || reference) in nats, by the chosen estimator; 0 where there is no reference."""
    entropy: float = 0.0
    """Of the policy, in nats; 0 where it was not computed."""
    gap: float = 0.0
    """|log probability now - when sampled|: before the first step, what the forward pass and the sampler differ by."""

    def __add__(self, other: LossStatistics) -> LossStatistics:
        return LossStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def mean(self, name: str) -> float:
        """A sum per trained token; NaN without tokens."""
        return getattr(self, name) / self.tokens if self.tokens else float("nan")


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    loss: str = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    kl_coef: float = 0.0,
    kl_estimator: Literal["k1", "k2", "k3"] = "k3",
    kl_clip: float | None = None,
    reference_logprobs_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    entropies_BT: Tensor | None = None,
    batch_tokens: float | None = None,
    batch_sequences: float | None = None,
    length: float | None = None,
) -> tuple[Tensor, LossStatistics]:
    """The loss of one micro-batch and its statistics. The losses of an optimizer batch's micro-batches add up to the
    loss of the batch, and so do their gradients.

    Args:
        logprobs_BT: Of the policy that is trained, with a gradient.
        old_logprobs_BT: Of the policy that sampled.
        advantages: (B,), one a sequence, or (B, T), one a token.
        mask_BT: True where the policy sampled the token.
        loss: A name in LOSSES.
        clip_low: A ratio below 1 - clip_low of a token that did badly gives no further push down.
        clip_high: A ratio above 1 + clip_high of a token that did well gives no further push up.
        sapo_temperatures: How fast "sapo" lets go of tokens that did well, and of those that did badly.
        kl_coef: Weight of the KL divergence from the reference.
        kl_estimator: With d = logprob - reference logprob, "k1" takes kl_coef * d from a token's advantage, "k2" adds
            kl_coef * d^2 / 2 to its loss, "k3" kl_coef * (exp(-d) - 1 + d).
        kl_clip: Largest absolute value of the estimate at a token. None: any.
        reference_logprobs_BT: Of the reference; needed with kl_coef.
        entropy_coef: Weight of the mean entropy of the tokens, which is made larger.
        entropies_BT: In nats, with a gradient; needed with entropy_coef.
        batch_tokens: Tokens of the whole optimizer batch. None: this micro-batch is all of it.
        batch_sequences: Its sequences.
        length: By which "dr_grpo" divides the sum of a sequence. None: the most tokens that a sequence here has.

    Raises:
        ValueError: A loss or estimator is unknown, or what one needs is missing.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
    if kl_coef and reference_logprobs_BT is None:
        raise ValueError(f"kl_coef is {kl_coef}, but there are no reference logprobs to hold the policy to")
    if entropy_coef and entropies_BT is None:
        raise ValueError(f"entropy_coef is {entropy_coef}, but there are no entropies")
    form = LOSSES[loss]
    advantages_BT = torch.where(mask_BT, advantages[:, None] if advantages.dim() == 1 else advantages, 0.0)
    tokens_B = mask_BT.sum(1)
    total_tokens = tokens_B.sum().clamp(min=1) if batch_tokens is None else batch_tokens
    sequences = len(mask_BT) if batch_sequences is None else batch_sequences

    # The reference.
    kl_BT = torch.zeros_like(advantages_BT)
    if kl_coef and reference_logprobs_BT is not None:
        distance_BT = torch.where(mask_BT, logprobs_BT - reference_logprobs_BT, 0.0)
        kl_BT = _kl(distance_BT, kl_estimator, kl_clip)
        if kl_estimator == "k1":  # as a loss its gradient is 0 in the mean
            advantages_BT = advantages_BT - kl_coef * torch.where(mask_BT, kl_BT, 0.0).detach()

    # The ratio. Masked before exp: the value at an ignored position must not turn into inf or NaN, which survive times 0.
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    weight_BT = ratio_BT
    if form.ratio != "token":
        # Its value is the sequence's, its gradient reaches every token: GSPO-token (arXiv 2507.18071, section 4.3).
        of_sequence_B = log_ratio_BT.sum(1)
        if form.ratio == "sequence mean":
            of_sequence_B = of_sequence_B / tokens_B.clamp(min=1)
        weight_BT = (of_sequence_B[:, None].detach() + log_ratio_BT - log_ratio_BT.detach()).exp()

    loss_BT = -_surrogate(form.surrogate, weight_BT, advantages_BT, logprobs_BT, clip_low, clip_high, sapo_temperatures)
    loss_BT = torch.where(mask_BT, loss_BT, 0.0)
    if form.ratio == "sequence sum":
        # A token's part of the gradient is that of the whole sequence; the value is the sequence's, counted once.
        mean_BT = loss_BT / tokens_B.clamp(min=1)[:, None]
        loss_BT = (loss_BT - loss_BT.detach()) * tokens_B.clamp(min=1)[:, None] + mean_BT.detach() * tokens_B[:, None]
    if kl_coef and kl_estimator != "k1":
        loss_BT = loss_BT + kl_coef * torch.where(mask_BT, kl_BT, 0.0)

    if form.mean == "tokens":
        value = loss_BT.sum() / total_tokens
    elif form.mean == "sequences":
        value = (loss_BT.sum(1) / tokens_B.clamp(min=1)).sum() / sequences
    else:
        value = loss_BT.sum() / sequences / (max(int(tokens_B.max()), 1) if length is None else length)
    entropy = torch.zeros(())
    if entropies_BT is not None:
        entropy = torch.where(mask_BT, entropies_BT, 0.0).sum()
        value = value - entropy_coef * entropy / total_tokens
    return value, _statistics(
        mask_BT, weight_BT, ratio_BT, log_ratio_BT, advantages_BT, kl_BT, entropy, clip_low, clip_high, form.surrogate
    )


def _kl(distance_BT: Tensor, estimator: str, clip: float | None) -> Tensor:
    """KL(policy || reference) at each token, estimated from its log probabilities: J. Schulman, "Approximating KL
    divergence", http://joschu.net/blog/kl-approx.html."""
    if estimator == "k1":
        found_BT = distance_BT
    elif estimator == "k2":
        found_BT = distance_BT.square() / 2
    elif estimator == "k3":
        found_BT = (-distance_BT).exp() - 1 + distance_BT
    else:
        raise ValueError(f"kl_estimator is {estimator!r}; expected 'k1', 'k2' or 'k3'")
    return found_BT if clip is None else found_BT.clamp(-clip, clip)


def _surrogate(
    kind: str,
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    clip_low: float,
    clip_high: float,
    temperatures: tuple[float, float],
) -> Tensor:
    """What is made larger, a token."""
    if kind == "clipped":
        clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
        return torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    if kind == "truncated":
        return ratio_BT.clamp(max=1 + clip_high).detach() * advantages_BT * logprobs_BT
    above, below = temperatures
    temperatures_BT = torch.where(advantages_BT > 0, above, below)
    return torch.sigmoid(temperatures_BT * (ratio_BT - 1)) * 4 / temperatures_BT * advantages_BT


@torch.no_grad()
def _statistics(
    mask_BT: Tensor,
    weight_BT: Tensor,
    ratio_BT: Tensor,
    log_ratio_BT: Tensor,
    advantages_BT: Tensor,
    kl_BT: Tensor,
    entropy: Tensor,
    clip_low: float,
    clip_high: float,
    surrogate: str,
) -> LossStatistics:
    """weight_BT: the ratio that the loss uses, which may be a sequence's."""
    held = surrogate != "soft"
    low_BT = mask_BT & (weight_BT < 1 - clip_low) & (advantages_BT < 0) & (surrogate == "clipped")
    high_BT = mask_BT & (weight_BT > 1 + clip_high) & (advantages_BT > 0) & held
    sums = torch.stack(
        [
            mask_BT.sum(),
            low_BT.sum(),
            high_BT.sum(),
            torch.where(mask_BT, ratio_BT, 0.0).sum(),
            (ratio_BT - 1 - log_ratio_BT).sum(),  # 0 at ignored positions, as their log ratio is
            torch.where(mask_BT, kl_BT, 0.0).sum(),
            entropy.to(log_ratio_BT.device),
            log_ratio_BT.abs().sum(),
        ]
    )
    return LossStatistics(*sums.tolist())


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
