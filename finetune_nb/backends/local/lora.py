"""LoRA (arXiv 2106.09685): a few weights beside the model's own, which alone are trained. The model with the adapter
switched off is the initial model, so KL needs no second copy. The layers themselves are peft's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, MissingExtra
from .config import LoRAConfig

__all__ = [
    "as_trained",
    "is_lora",
    "merged_tensors",
    "settings_of",
    "switched_off",
    "with_adapter",
    "with_saved_adapter",
]


def is_lora(model: Any) -> bool:
    """Whether the model is wrapped by an adapter."""
    return hasattr(model, "peft_config")


def with_adapter(model: Any, config: LoRAConfig, seed: int = 0) -> Any:
    """The model with a fresh adapter, whose weights are drawn by `seed`. It computes what the model does until it is
    trained. Raises ConfigError where the model has no such layers, MissingExtra without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("LoRA", "local") from error
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        target_modules=config.target if isinstance(config.target, str) else list(config.target),
        lora_dropout=0.0,  # it would make training see another policy than was sampled
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft itself does, about which nobody here can do anything
        torch.manual_seed(seed % 2**63)
        try:
            return get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(
                f"lora.target is {config.target!r}, which does not fit {type(model).__name__}: {error} "
                'Expected "all-linear", or names of linear layers such as ["q_proj", "v_proj"].'
            ) from error


def with_saved_adapter(model: Any, directory: str | Path) -> Any:
    """The model with the adapter that `save_pretrained` wrote to `directory` added to its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("LoRA", "local") from error
    return PeftModel.from_pretrained(model, str(directory), use_safetensors=True).merge_and_unload()  # type: ignore[operator]


@contextmanager
def switched_off(model: Any) -> Iterator[Any]:
    """The model as it was before training, inside."""
    with model.disable_adapter():
        yield model


def settings_of(model: Any) -> dict[str, Any]:
    """What decides what an adapter's weights compute; {} without one."""
    if not is_lora(model):
        return {}
    config = model.peft_config[model.active_adapter]
    return {"lora": {"rank": config.r, "alpha": config.lora_alpha, "target": sorted(map(str, config.target_modules))}}


def as_trained(model: Any) -> Any:
    """The model of transformers inside, adapter layers included."""
    return model.get_base_model() if is_lora(model) else model


@torch.no_grad()
def merged_tensors(model: Any) -> dict[str, Tensor]:
    """The weights with the adapter's added to them, by their names without it, on the CPU. The model stays as it is:
    taking the sum apart again would leave rounding errors in its weights."""
    inside = as_trained(model)
    merged = {
        name.replace(".base_layer.", "."): tensor.detach().to("cpu", copy=True)
        for name, tensor in inside.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in inside.named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight = merged[f"{name}.weight"]
            delta = layer.get_delta_weight(model.active_adapter).cpu()
            merged[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return merged
