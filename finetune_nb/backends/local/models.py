"""A model by its name or directory: loaded, with an adapter where one is asked for, on the device and in the dtype that
suit what is there, and written again. Only safetensors are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ...errors import BackendError, ConfigError
from .config import LoRAConfig
from .lora import as_trained, is_lora, merged_tensors, settings_of, with_adapter, with_saved_adapter
from .weights import shortened

__all__ = [
    "EMBEDDED",
    "check_place",
    "chosen_device",
    "chosen_dtype",
    "described",
    "load",
    "no_progress_bars",
    "write",
    "write_config",
]

EMBEDDED = Path(__file__).parent / "tiny" / "model"
"""The model that ships with finetune_nb: a quarter of a million weights, enough for the calculator example."""
ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
WRITTEN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that weights are saved in. Fewer bits need scales, which quantized models have."""


def load(
    name_or_dir: str | Path, device: str, dtype: str, lora: LoRAConfig | None = None, seed: int = 0
) -> tuple[Any, Any, torch.dtype]:
    """Model, tokenizer, and the dtype that the model is stored in. A directory that holds a saved LoRA adapter gives its
    model with the adapter merged.

    Raises ConfigError where there is no such model, device or dtype, or no layer for the adapter.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = str(EMBEDDED if name_or_dir == "embedded" else name_or_dir)
    on = chosen_device(device)
    in_dtype = chosen_dtype(dtype, on, trains_all=lora is None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with no_progress_bars():
            base = _model_of_adapter(source)
            stored = _stored_dtype(AutoConfig.from_pretrained(base or source), base or source)
            model: Any = AutoModelForCausalLM.from_pretrained(base or source, dtype=in_dtype, use_safetensors=True)
            if base is not None:
                model = with_saved_adapter(model, source)
                model.name_or_path = model.config.name_or_path = source
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
    return (model if lora is None else with_adapter(model, lora, seed)), tokenizer, stored or in_dtype


def _stored_dtype(config: Any, source: str) -> torch.dtype | None:
    """What a model's config says that its weights are stored in, or what those in its directory are; None: unknown."""
    said = config.dtype or config.get_text_config().dtype
    if said is not None:
        dtype = said if isinstance(said, torch.dtype) else getattr(torch, str(said).removeprefix("torch."), None)
        return dtype if dtype in WRITTEN else None
    for path in sorted(Path(source).glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                dtype = file.get_tensor(name).dtype
                if dtype in WRITTEN:
                    return dtype
    return None


def write(
    model: Any,
    directory: Path,
    dtype: torch.dtype,
    merge: bool,
    values: Mapping[str, Tensor],
) -> None:
    """Writes the model to `directory` so that `from_pretrained` gives the model that is sampled.

    Args:
        model: With or without an adapter. It stays as it is.
        directory: Where to.
        dtype: Of the weights in the files. Those that the model keeps in float32 in this dtype, too, stay in float32.
        merge: Add an adapter to the weights. Otherwise it is written alone, in its own dtype.
        values: Weights by name, to write in place of the model's own.

    Raises:
        BackendError: An adapter alone would not be the model.
    """
    inside = as_trained(model)
    if is_lora(model) and not merge:
        base = Path(inside.config.name_or_path or ".")
        if (base / ADAPTER_CONFIG).is_file():
            raise BackendError(
                f"the model was loaded from {str(base)!r}, an adapter that was added to its model's weights. Expected a whole "
                "model below an adapter that is saved alone: it would be loaded without the first one. Save with merge=True."
            )
        # The embeddings are the base model's, also where they have an adapter.
        model.save_pretrained(directory, save_embedding_layers=False)
        return
    tensors = dict(merged_tensors(model)) if is_lora(model) else dict(inside.state_dict())
    for group in _tied_names(inside):
        tensors |= {name: values[exact] for name in group for exact in group if exact in values}
    if getattr(inside, "hf_quantizer", None) is None:
        tensors = _in_dtype(tensors, dtype, _kept_in_float32(inside, dtype))
    tied = _are_tied(inside, tensors)
    inside.save_pretrained(directory, state_dict=tensors)
    _correct_config(directory / MODEL_CONFIG, dtype, tied)


def write_config(model: Any, directory: Path, merge: bool) -> None:
    """Writes the config of what `write` would write; of an adapter alone, the adapter's."""
    if is_lora(model) and not merge:
        model.peft_config[model.active_adapter].save_pretrained(directory)
        return
    inside = as_trained(model)
    config = copy.deepcopy(inside.config)
    config.architectures = [type(inside).__name__]
    config.save_pretrained(directory)


def check_place(model: Any, directory: Path, merge: bool) -> None:
    """Raises BackendError where an adapter alone would be written beside a whole model, which is taken for its base."""
    if is_lora(model) and not merge and (directory / MODEL_CONFIG).exists():
        raise BackendError(
            f"{directory} holds a whole model, and the adapter's model is {as_trained(model).config.name_or_path!r}. Expected "
            "another folder for an adapter alone: from_pretrained would add it to the model beside it. Choose another one, or "
            "save with merge=True."
        )


def _kept_in_float32(model: Any, dtype: torch.dtype) -> list[str]:
    """Regular expressions for the names of weights that transformers loads in float32 whatever dtype it is asked for."""
    kept: list[str] = []
    if dtype in (torch.bfloat16, torch.float16):
        kept += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or []
    return [pattern.replace("*", ".*") for pattern in kept]


def _in_dtype(tensors: dict[str, Tensor], dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Tensor]:
    """Tied weights stay one tensor: only so does transformers see that they are tied."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in cast:
            wanted = torch.float32 if any(re.search(pattern, name) for pattern in kept) else dtype
            cast[place] = tensor.detach().to("cpu", wanted if tensor.is_floating_point() else None)
        result[name] = cast[place]
    return result


def _tied_names(model: Any) -> list[list[str]]:
    """The names of each weight, of which tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name.replace(".base_layer", ""))
    return list(names.values())


def _are_tied(model: Any, tensors: Mapping[str, Tensor]) -> bool | None:
    """Whether `tensors` has one weight for embeddings and output layer; None where the model has no such pair.

    Raises BackendError where other weights were tied and no longer are: no config can say that.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f"{name.replace('.base_layer', '')}.weight" for name, module in model.named_modules() if module in ends]
    for group in _tied_names(model):
        written = {tensors[name].data_ptr() for name in group if name in tensors}
        if len(written) > 1 and not set(group) <= set(names):
            raise BackendError(
                f"the weights {shortened(group)} are one in the model, and the adapter changes only some of them. Expected an "
                "adapter that leaves such layers out: name others in lora.target. Save without merge to keep this one."
            )
    if len(names) < 2 or not all(name in tensors for name in names):
        return None
    return tensors[names[0]].data_ptr() == tensors[names[1]].data_ptr()


def _correct_config(path: Path, dtype: torch.dtype, tied: bool | None) -> None:
    """Puts what is true of the written weights into a config, which save_pretrained wrote for those in memory."""

    def correct(settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            if name in ("dtype", "torch_dtype") and value is not None:
                settings[name] = str(dtype).removeprefix("torch.")
            elif name == "tie_word_embeddings" and tied is not None:
                settings[name] = tied
            elif isinstance(value, dict):
                correct(value)

    settings = json.loads(path.read_text(encoding="utf-8"))
    if tied is not None:
        settings.setdefault("tie_word_embeddings", tied)
    correct(settings)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def chosen_device(device: str) -> str:
    """ "auto": the first of cuda, mps and cpu that is there."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_dtype(dtype: str, device: str, trains_all: bool) -> torch.dtype:
    """ "auto": float32 for weights that are trained, as bfloat16 takes more memory with the masters that it needs; bfloat16
    for those beside an adapter, which stays in float32, on a GPU that computes with it. Raises ConfigError for what is no
    such dtype."""
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
