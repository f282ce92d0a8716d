"""How far the trainer's probabilities are from the sampler's, and the weights that correct for it.

A sampler with other kernels, rounding or weights than the trainer's draws from another distribution. Weighted by p / q, with p
the trainer's probability before its first step and q the sampler's, the gradient is that of the trainer's own distribution again.
A bound on the weights keeps its variance finite (truncated importance sampling: https://fengyao.notion.site/off-policy-rl; with
masks: IcePop, arXiv 2510.18855). Shapes as in `loss.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config import ImportanceBounds

__all__ = [
    "Mismatch",
    "importance_weights",
    "mismatch",
]

Level = Literal["token", "sequence"]

LARGEST_LOG_RATIO = 700.0
"""e to this is still a float."""


def importance_weights(log_ratio_BT: Tensor, mask_BT: Tensor, bounds: ImportanceBounds) -> tuple[Tensor, Tensor]:
    """What the loss of each token is multiplied with.

    Args:
        log_ratio_BT: Log probability by the trainer - by the sampler.
        mask_BT: True where the policy sampled the token. Elsewhere the weight is 1.
        bounds: Of the weights.

    Returns:
        The weights (B, T), and where the ratio was beyond a bound (B, T).
    """
    ratio_BT = _at_level(log_ratio_BT, mask_BT, bounds.level).exp()
    low = -math.inf if bounds.floor is None else bounds.floor
    high = math.inf if bounds.cap is None else bounds.cap
    beyond_BT = ((ratio_BT < low) | (ratio_BT > high)) & mask_BT
    weights_BT = torch.where(beyond_BT, 0.0, ratio_BT) if bounds.beyond == "mask" else ratio_BT.clamp(low, high)
    return torch.where(mask_BT, weights_BT, 1.0), beyond_BT


def _at_level(log_ratio_BT: Tensor, mask_BT: Tensor, level: Level) -> Tensor:
    log_ratio_BT = torch.where(mask_BT, log_ratio_BT, 0.0)
    if level == "token":
        return log_ratio_BT
    return log_ratio_BT.sum(1, keepdim=True).expand_as(log_ratio_BT)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far the sampler is from the trainer. All are NaN where nothing was compared."""

    mean_ratio: float = math.nan
    """Mean of p / q, unbounded: 1 where the sampler's tokens are really drawn by its log probabilities."""
    largest_ratio: float = math.nan
    """The largest of them."""
    effective_samples: float = math.nan
    """(sum of p / q)^2 / (n * sum of their squares), from 0 to 1: as many samples of the trainer's own would teach as much, as a
    part of n. L. Kish, Survey Sampling, 1965."""
    gap: float = math.nan
    """Mean |log p - log q|, in nats a token."""


def mismatch(log_ratios: Sequence[Tensor], level: Level = "token") -> Mismatch:
    """Compares log probabilities.

    Args:
        log_ratios: For each sequence the trainer's - the sampler's, (its sampled tokens,).
        level: Whether the ratio is a token's or a sequence's; `gap` is a token's in either case.
    """
    if not sum(each.numel() for each in log_ratios):
        return Mismatch()
    tokens = torch.cat([each.double().cpu() for each in log_ratios])
    logs = tokens if level == "token" else torch.stack([each.double().sum().cpu() for each in log_ratios])
    n, total = math.log(len(logs)), logs.logsumexp(0).item()  # in logs: the square of a large ratio is no float
    return Mismatch(
        mean_ratio=math.exp(min(total - n, LARGEST_LOG_RATIO)),
        largest_ratio=math.exp(min(logs.max().item(), LARGEST_LOG_RATIO)),
        effective_samples=math.exp(2 * total - (2 * logs).logsumexp(0).item() - n),
        gap=tokens.abs().mean().item(),
    )
