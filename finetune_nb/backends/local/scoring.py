"""What a model makes of a reply that somebody else sampled: the log probability of each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from .lora import switched_off

__all__ = ["score"]


@torch.inference_mode()
def score(
    model: Any, prompt: Sequence[int], reply: Sequence[int], temperatures: Sequence[float], adapted: bool = True
) -> list[list[float]]:
    """Log probabilities of a reply after a prompt, at each of these temperatures.

    Args:
        model: A Hugging Face causal language model. Whoever calls is alone with it.
        prompt: Its token ids, at least one.
        reply: Token ids of the reply.
        temperatures: Above 0; each divides the logits.
        adapted: With the adapter, or as the model is without it.

    Returns:
        A list for each temperature, with a natural logarithm for each token of the reply.
    """
    ids_1T = torch.tensor([[*prompt, *reply]], device=model.device)
    with nullcontext() if adapted else switched_off(model):
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen_T1 = ids_1T[0, len(prompt) :, None]
    return [
        (logits_TV / temperature).log_softmax(1).gather(1, chosen_T1).squeeze(1).tolist()
        for temperature in temperatures
    ]
