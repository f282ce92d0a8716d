"""Prompts -> keys and values, for sampling and for training: what all of them begin with (a system prompt, tools, shown
examples) is computed once. Shapes are in the names: U different prompts of P tokens, the common ones first, then padding on
the left of what is a prompt's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .families.caches import join, kinds_of_layers, select_rows
from .families.passes import Batching, Forward, forward_of, forward_parameters
from .families.positions import borders_of, last_length

__all__ = [
    "can_share",
    "prefill",
]

WORTH_SHARING = 32
"""Tokens that all prompts must have in common to get a pass of their own."""


def prefill(
    model: Any,
    prompts: Sequence[Sequence[int]],
    pad_id: int = 0,
    forward: Forward | None = None,
    batching: Batching = "padded",
) -> tuple[Tensor, Any, Tensor]:
    """Logits after each prompt (U, V), the cache of all, and its mask (U, P) of 0 and 1. Differentiable."""
    forward, device, cache = forward or forward_of(model), model.device, None
    if batching != "padded":
        return _by_length(prompts, device, forward)
    common = _common(prompts)
    if common < WORTH_SHARING or not can_share(model) or not _of_one_kind(model, common, prompts):
        common = 0
    if common:
        ids_1C = torch.tensor([prompts[0][:common]], device=device)
        positions_1C = torch.arange(common, device=device)[None]
        _, cache = forward(ids_1C, torch.ones_like(ids_1C), positions_1C, None)
        cache = select_rows(cache, torch.zeros(len(prompts), dtype=torch.long, device=device))
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


def _by_length(
    prompts: Sequence[Sequence[int]], device: torch.device | str, forward: Forward
) -> tuple[Tensor, Any, Tensor]:
    """The same without padding: prompts of one length at a time, and then what is kept of all of them is joined."""
    of_length: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        of_length[len(prompt)].append(row)
    mask_UP = torch.zeros((len(prompts), max(of_length)), dtype=torch.long, device=device)
    parts, caches, order = [], [], []
    for length, rows in of_length.items():
        ids_GT = torch.tensor([prompts[row] for row in rows], device=device)
        positions_GT = torch.arange(length, device=device).expand_as(ids_GT)
        logits_GV, cache = forward(ids_GT, torch.ones_like(ids_GT), positions_GT, None)
        mask_UP[rows, mask_UP.shape[1] - length :] = 1
        parts.append(logits_GV)
        caches.append(cache)
        order += rows
    logits_UV, cache = torch.cat(parts), join(caches)
    if order != sorted(order):
        place_U = torch.tensor(order, device=device).argsort()
        logits_UV, cache = logits_UV[place_U], select_rows(cache, place_U)
    return logits_UV, cache, mask_UP


def _of_one_kind(model: Any, common: int, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether what all begin with has the positions in a pass of its own that it has in each whole prompt."""
    borders = borders_of(model)
    return last_length(common, borders) == last_length(max(map(len, prompts)), borders)


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
    from transformers.cache_utils import DynamicLayer

    if not {"position_ids", "past_key_values"} <= set(forward_parameters(model)):
        return False
    return kinds_of_layers(model) == {DynamicLayer}
