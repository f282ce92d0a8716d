"""Prompts -> keys and values, for sampling and for training: what all of them begin with (a system prompt, tools, shown
examples) is computed once. Shapes are in the names: U different prompts of P tokens, the common ones first, then padding on
the left of what is a prompt's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grpo import forward_parameters, logits_only

__all__ = [
    "Forward",
    "can_share",
    "forward_of",
    "prefill",
]

Forward = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]
"""ids (B, T), attention mask (B, cached + T), positions (B, T), cache -> float32 logits of the last column (B, V), cache."""

WORTH_SHARING = 32
"""Tokens that all prompts must have in common to get a pass of their own."""


def forward_of(model: Any) -> Forward:
    """The model's forward pass with a cache, told what it can be told."""
    accepted, fixed = forward_parameters(model), logits_only(model)

    def forward(ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "past_key_values": cache, "use_cache": True, **fixed}
        if "position_ids" in accepted:
            inputs["position_ids"] = positions_BT
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        out = model(**inputs)
        return out.logits[:, -1].float(), out.past_key_values

    return forward


def prefill(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int = 0, forward: Forward | None = None
) -> tuple[Tensor, Any, Tensor]:
    """Logits after each prompt (U, V), the cache of all, and its mask (U, P) of 0 and 1. Differentiable."""
    forward, device, cache = forward or forward_of(model), model.device, None
    common = _common(prompts)
    if common < WORTH_SHARING or not can_share(model):
        common = 0
    if common:
        ids_1C = torch.tensor([prompts[0][:common]], device=device)
        positions_1C = torch.arange(common, device=device)[None]
        _, cache = forward(ids_1C, torch.ones_like(ids_1C), positions_1C, None)
        cache.batch_select_indices(torch.zeros(len(prompts), dtype=torch.long, device=device))
    width = max(map(len, prompts)) - common
    ids_UT, mask_UP = np.full((len(prompts), width), pad_id), np.ones((len(prompts), common + width), np.int64)
    for row, prompt in enumerate(prompts):
        padding = width - (len(prompt) - common)
        ids_UT[row, padding:] = prompt[common:]
        mask_UP[row, common : common + padding] = 0
    mask = torch.from_numpy(mask_UP).to(device)
    positions_UT = (mask.cumsum(1) - 1).clamp(min=0)[:, common:]
    logits_UV, cache = forward(torch.from_numpy(ids_UT).to(device), mask, positions_UT, cache)
    return logits_UV, cache, mask


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, so that each has one of its own left; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    in_order = sorted(map(tuple, prompts))
    first, last = in_order[0], in_order[-1]  # in the order of a dictionary: whatever these two share, all share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(same, min(map(len, prompts)) - 1)


def can_share(model: Any) -> bool:
    """Whether keys and values can be copied for what comes after them: not where layers keep only a window of them, or
    something else."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if "position_ids" not in forward_parameters(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
