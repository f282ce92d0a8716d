"""Mends models that compute one thing in a whole sequence and another token by token, or that change their own weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["mend"]


def mend(model: Any) -> None:
    """Changes what has to be changed before the model's first pass; nothing in most models, and never a weight's meaning."""
    for module in list(model.modules()):
        if getattr(module, "time_step_limit", None) and hasattr(module, "dt_bias") and hasattr(module, "in_proj"):
            _limit_time_steps(module)
        if hasattr(module, "_rescale_layers"):
            _keep_scale(module)


def _limit_time_steps(mixer: Any) -> None:
    """Mamba-2 layers keep their time steps within limits in a whole sequence, and forget them where one token is given.

    The limits are applied to what the steps are made of, which is the last part of the input projection.
    """
    lowest, highest = mixer.time_step_limit
    if lowest <= 0 and math.isinf(highest):
        return

    def limit(_: Any, inputs: Any, projected: Tensor) -> Tensor | None:
        if projected.shape[1] != 1:
            return None
        bias = mixer.dt_bias.to(projected.dtype)
        others, steps = projected.split([projected.shape[-1] - len(bias), len(bias)], -1)
        # softplus(step + bias) is the time step.
        steps = (steps + bias).clamp(_inverse_of_softplus(lowest), _inverse_of_softplus(highest)) - bias
        return torch.cat([others, steps], -1)

    mixer.in_proj.register_forward_hook(limit)


def _inverse_of_softplus(value: float) -> float:
    if value <= 0:
        return -math.inf
    return value + math.log(-math.expm1(-value)) if math.isfinite(value) else math.inf


def _keep_scale(model: Any) -> None:
    """RWKV halves some of its weights, again and again with depth, when it is evaluated, so as to fit float16. Trained and saved
    so, they would be halved once more when they are loaded."""
    model.train()
    model._rescale_layers()  # back to their true size, where the model has been evaluated before
    model.config.rescale_every = 0
    model.eval()
