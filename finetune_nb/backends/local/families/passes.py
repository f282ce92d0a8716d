"""One forward pass of a model with what it keeps, under whatever name the model takes and gives that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..lora import as_trained
from .caches import Tokens

__all__ = [
    "Batching",
    "Forward",
    "cache_name",
    "forward_of",
    "forward_parameters",
    "logits_only",
]

BESIDE_LOGITS = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Settings of a model's config that make its forward pass return more than logits."""

Forward = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]
"""ids (B, T), attention mask (B, cached + T), positions (B, T), cache -> float32 logits of the last column (B, V), cache."""

Batching = Literal["padded", "joined", "equal", "alone", "whole"]
"""How prompts of different lengths are sampled together.

"padded": with one cache, the shorter ones padded on the left. "joined": those of one length at a time, and then what the
layers keep of all of them is joined. "equal": only those of one length. "alone": never. "whole": without a cache, each token with
a pass over all tokens before it.
"""

CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""Arguments in which models take what they keep, and fields of their output in which they give it."""


def cache_name(model: Any) -> str | None:
    """The argument in which the model takes what it keeps; None: it keeps nothing."""
    accepted = forward_parameters(model)
    return next((name for name in CACHE_NAMES if name in accepted), None)


def forward_of(model: Any, batching: Batching = "padded") -> Forward:
    """The model's forward pass with what it keeps, told what it can be told."""
    if batching == "whole":
        return _whole_forward_of(model)
    accepted, fixed = forward_parameters(model), logits_only(model)
    cached = cache_name(model) or CACHE_NAMES[0]
    # Where nothing is padded there is nothing to tell, and the model may count positions in its own way. States have no columns.
    told = batching in ("padded", "joined") and cached == CACHE_NAMES[0]

    def forward(ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
        inputs = {"input_ids": ids_BT, cached: cache, "use_cache": True, **fixed}
        if told:
            inputs["attention_mask"] = mask_BT
        if told and "position_ids" in accepted:
            inputs["position_ids"] = positions_BT
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        out = model(**inputs)
        return out.logits[:, -1].float(), getattr(out, cached)

    return forward


def _whole_forward_of(model: Any) -> Forward:
    """The same for a model whose cache cannot be used: each pass is over all tokens of each row, padded on the right."""
    accepted, fixed = forward_parameters(model), logits_only(model)

    def forward(ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Tokens | None) -> tuple[Tensor, Any]:
        before = cache.rows if cache is not None else [[] for _ in ids_BT]
        tokens = Tokens([[*row, *more] for row, more in zip(before, ids_BT.tolist(), strict=True)])
        lengths = [len(row) for row in tokens.rows]
        shape = len(lengths), max(lengths)
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, known in enumerate(tokens.rows):
            ids[row, : len(known)] = known
            mask[row, : len(known)] = 1
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        inputs = {name: tensor.to(ids_BT.device) for name, tensor in inputs.items()} | fixed
        last_B = torch.tensor(lengths, device=ids_BT.device) - 1
        columns_K, column_of_row_B = last_B.unique(return_inverse=True)
        if "logits_to_keep" in accepted:
            logits_BKV = model(**inputs, use_cache=False, logits_to_keep=columns_K).logits
        else:
            logits_BKV = model(**inputs, use_cache=False).logits[:, columns_K]
        return logits_BKV[torch.arange(len(lengths)), column_of_row_B].float(), tokens

    return forward


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
