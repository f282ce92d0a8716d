"""A model by its name or directory: loaded, with an adapter where one is asked for, on the device and in the dtype that
suit what is there. Only safetensors are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError
from .config import LoRAConfig
from .lora import is_lora, settings_of, with_adapter, with_saved_adapter

__all__ = [
    "EMBEDDED",
    "chosen_device",
    "chosen_dtype",
    "described",
    "load",
    "no_progress_bars",
]

EMBEDDED = Path(__file__).parent / "tiny" / "model"
"""The model that ships with finetune_nb: a quarter of a million weights, enough for the calculator example."""
ADAPTER_CONFIG = "adapter_config.json"


def load(
    name_or_dir: str | Path, device: str, dtype: str, lora: LoRAConfig | None = None, seed: int = 0
) -> tuple[Any, Any]:
    """Model and tokenizer. A directory that holds a saved LoRA adapter gives its model with the adapter merged.

    Raises ConfigError where there is no such model, device or dtype, or no layer for the adapter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(EMBEDDED if name_or_dir == "embedded" else name_or_dir)
    on = chosen_device(device)
    in_dtype = chosen_dtype(dtype, on, trains_all=lora is None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with no_progress_bars():
            base = _model_of_adapter(source)
            model: Any = AutoModelForCausalLM.from_pretrained(base or source, dtype=in_dtype, use_safetensors=True)
            if base is not None:
                model = with_saved_adapter(model, source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {str(name_or_dir)!r} cannot be loaded: {error} Expected 'embedded', a directory that "
            "save_pretrained wrote, or the name of a model on the Hugging Face hub."
        ) from error
    try:
        model.to(on)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used: {error} Expected 'auto', 'cpu', 'cuda' or 'mps'."
        ) from error
    return (model if lora is None else with_adapter(model, lora, seed)), tokenizer


def chosen_device(device: str) -> str:
    """ "auto": the first of cuda, mps and cpu that is there."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_dtype(dtype: str, device: str, trains_all: bool) -> torch.dtype:
    """ "auto": float32 for weights that are trained, because small steps vanish in bfloat16; bfloat16 for those beside an
    adapter, which stays in float32, on a GPU that computes with it. Raises ConfigError for what is no such dtype."""
    if dtype == "auto":
        halves = not trains_all and device.startswith("cuda") and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if halves else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is {dtype!r}; expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return found


def described(model: Any, threads: int | None) -> str:
    """In words: how many weights, which are trained, where and in what they are kept."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in model.parameters())
    if is_lora(model):
        rank = settings_of(model)["lora"]["rank"]
        what = f"{_count(weights - trained)} weights and a LoRA adapter of rank {rank}, {_count(trained)}, to train"
    else:
        what = (
            f"{_count(weights)} weights"
            if trained == weights
            else f"{_count(weights)} weights, {_count(trained)} to train"
        )
    threads = threads or torch.get_num_threads()
    cpu = f", {threads} thread{'s' * (threads > 1)}" if model.device.type == "cpu" else ""
    return f"{what}, {str(model.dtype).removeprefix('torch.')} on {model.device}{cpu}"


def _count(weights: int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if weights >= size:
            return f"{weights / size:.3g} {name}"
    return f"{weights:,}"


def _model_of_adapter(source: str) -> str | None:
    """What the adapter in that directory was trained on; None where it holds a model."""
    path = Path(source) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not name the adapter's model.") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} names {base!r:.80} as the adapter's model.")
    return base


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' progress bars: in a notebook they are widgets, which a saved notebook cannot show."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
