"""LoRA (arXiv 2106.09685): a few weights beside the model's own, which alone are trained. The model with the adapter
switched off is the initial model, so KL needs no second copy. The layers themselves are peft's.

The experts of a mixture are often one parameter, (experts, in, out) or (experts, out, in), instead of linear layers. peft
adapts such a parameter by adding the product of its matrices to it before the module that owns it runs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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

ALL_LINEAR = "all-linear"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PARTS_OF_EXPERTS = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "down_proj": ("w2",),
}
"""Names of the parameters of fused experts, and the names that their parts had as layers: lists of targets still have them."""


def is_lora(model: Any) -> bool:
    """Whether the model is wrapped by an adapter."""
    return hasattr(model, "get_base_model")  # peft 0.18 leaves `peft_config` on a model it has merged


def with_adapter(model: Any, config: LoRAConfig, seed: int = 0) -> Any:
    """The model with a fresh adapter, whose weights are drawn by `seed`. It computes what the model does until it is
    trained. Raises ConfigError where the model has no such layers, or peft cannot adapt them; MissingExtra without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("LoRA", "local") from error
    named = _targets(model, config.target)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        **_as_peft_has_it(model, config.target, named),
        lora_dropout=0.0,  # it would make training see another policy than was sampled
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft itself does, about which nobody here can do anything
        torch.manual_seed(seed % 2**63)
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(
                f"lora.target is {config.target!r}, which does not fit {type(model).__name__}: {error} "
                'Expected "all-linear", or names of linear layers such as ["q_proj", "v_proj"].'
            ) from error
    if named is not None:
        _check_adapted(adapted, config.target, {*named[0], *named[1]})
    return adapted


def _check_adapted(adapted: Any, target: str | list[str], names: set[str]) -> None:
    """Raises ConfigError where peft has left something out, or the model does not run with what it has put around it."""
    kind = type(as_trained(adapted)).__name__
    left_out = names - {name for name, _, _ in _adapted(adapted)}
    reason = f"peft leaves out {min(left_out)!r}, for example" if left_out else None
    if reason is None:
        try:
            with torch.no_grad():
                adapted(input_ids=torch.zeros((1, 2), dtype=torch.long, device=adapted.device))
        except Exception as error:  # whatever the model's own code raises where it finds a wrapper
            reason = f"the model does not run with it ({type(error).__name__}: {error})"
    if reason is not None:
        raise ConfigError(
            f"lora.target is {target!r}, and peft cannot adapt all that it names in {kind}: {reason}. Expected layers that it "
            'can adapt: name those of the attention, such as ["q_proj", "v_proj"], or train all weights (lora=None).'
        )


def with_saved_adapter(model: Any, directory: str | Path) -> Any:
    """The model with the adapter that `save_pretrained` wrote to `directory` added to its weights.

    Where the adapter changes only one of two weights that were tied, the embeddings or the output layer, they no longer
    are, and the model's config says so.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("LoRA", "local") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which is seen to below
        adapted = PeftModel.from_pretrained(model, str(directory), use_safetensors=True)
        _load_by_name(adapted, Path(directory) / ADAPTER_WEIGHTS)
    with torch.no_grad():
        for _, layer, parameter in _adapted(adapted):
            base = layer.get_base_layer()
            weight = getattr(base, parameter)
            # A parameter of its own: adding in place would change what is tied to it as well.
            setattr(base, parameter, torch.nn.Parameter(_merged(adapted, layer, parameter).to(weight.dtype)))
    merged: Any = adapted.unload()  # type: ignore[operator]
    merged.requires_grad_(True)  # as from_pretrained gives it: peft has frozen it
    configs = (merged.config, merged.config.get_text_config())
    outputs = merged.get_output_embeddings()
    were_tied = any(config.tie_word_embeddings for config in configs)
    if were_tied and outputs is not None and outputs.weight is not merged.get_input_embeddings().weight:
        for config in configs:
            config.tie_word_embeddings = False
        merged.tie_weights()  # reads the config again
    return merged


@torch.no_grad()
def _load_by_name(adapted: Any, path: Path) -> None:
    """Puts what was saved under a weight's name into that weight: peft takes some names for those of an older checkpoint, and
    leaves their weights as they were drawn. Raises ValueError where a weight is missing, or belongs to nothing."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    # Beside an adapter of embeddings peft saves them as well, as they are in the model.
    saved = {name: weight for name, weight in load_file(path).items() if ".lora_" in name}
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wrong = sorted(saved.keys() ^ own.keys())
    if wrong:
        raise ValueError(
            f"{path} does not fit {type(as_trained(adapted)).__name__}: weight {wrong[0]!r} is in one of the two alone. Expected "
            "the adapter of that model."
        )
    for name, weight in own.items():
        weight.copy_(saved[name])


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
    lora = {"rank": config.r, "alpha": config.lora_alpha, "target": sorted(map(str, config.target_modules))}
    if config.target_parameters:
        lora["parameters"] = sorted(map(str, config.target_parameters))
    return {"lora": lora}


def as_trained(model: Any) -> Any:
    """The model of transformers inside, adapter layers included."""
    return model.get_base_model() if is_lora(model) else model


@torch.no_grad()
def merged_tensors(model: Any) -> dict[str, Tensor]:
    """The weights with the adapter's added to them, by their names without it. The sums are float32 at least, and on the
    CPU; weights without an adapter are the model's own. The model stays as it is: taking the sum apart again would leave
    rounding errors in its weights."""
    tensors = {
        _without_wrappers(name): tensor
        for name, tensor in as_trained(model).state_dict().items()
        if ".lora_" not in name
    }
    for name, layer, parameter in _adapted(model):
        full = name if hasattr(layer, "parameter_name") else f"{name}.{parameter}"
        tensors[full] = _merged(model, layer, parameter).cpu()
    return tensors


# ── layers with an adapter ───────────────────────────────────────────────────────────────────────────────────────────


def _adapted(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Names without peft's wrappers, of layers or of parameters, with their layer and the parameter that it adapts."""
    for name, layer in as_trained(model).named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        name = _without_wrappers(name)
        parameter = getattr(layer, "parameter_name", None)
        yield (name, layer, "weight") if parameter is None else (f"{name}.{parameter}", layer, parameter)


def _without_wrappers(name: str) -> str:
    """Two parameters of one module have a wrapper around a wrapper."""
    return name.replace(".base_layer", "")


def _merged(model: Any, layer: Any, parameter: str) -> Tensor:
    weight = getattr(layer.get_base_layer(), parameter)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype) + layer.get_delta_weight(model.active_adapter).to(dtype)


# ── what is to be adapted ────────────────────────────────────────────────────────────────────────────────────────────

Kind = Literal["layer", "weight", "router"]
"""How a layer is adapted: by what it returns, by its weight, or not at all, as it returns a choice of experts."""


def _targets(model: Any, target: str | list[str]) -> tuple[list[str], list[str]] | None:
    """Names of the layers and of the parameters that get an adapter; None where peft finds them by itself.

    Parameters are named where peft cannot add to what a layer returns: fused experts, layers that return something else
    than a product, and layers whose names peft takes for those of experts. "all-linear" is every linear layer and every
    expert, but neither the output layer, nor a router that returns a choice of experts, nor a layer that peft refuses.
    """
    modules = dict(model.named_modules())
    experts = _parameters_of_experts(modules)
    if target == ALL_LINEAR:
        output = model.get_output_embeddings()
        layers = [name for name, module in modules.items() if _is_linear(module) and module is not output]
        refused = _refused_by_peft(model, layers)
        layers = [name for name in layers if name not in refused]
        wanted_experts = experts
    else:
        wanted, refused = _matcher(target), set()
        layers = [name for name, module in modules.items() if wanted(name) and not _holds_experts(module)]
        wanted_experts = [name for name in experts if any(map(wanted, _names_of_experts(name)))]
    kinds = {name: _kind(modules[name]) for name in layers}
    if target == ALL_LINEAR:
        layers = [name for name in layers if kinds[name] != "router"]
    by_weight = {name for name in layers if kinds[name] != "layer"}
    if experts:
        by_weight |= _taken_for_experts(model, layers)
    parameters = wanted_experts + [f"{name}.weight" for name in layers if name in by_weight]
    # Of a regular expression peft keeps only the ends of the names where a model has experts.
    by_itself = not experts or isinstance(target, list)
    if by_itself and not refused and not parameters and len(layers) == len(kinds):
        return None
    if not layers and not parameters:
        raise ConfigError(
            f"lora.target is {target!r}, which names nothing in {type(model).__name__}. Expected "
            '"all-linear", or names of linear layers or of experts such as ["q_proj", "v_proj", "experts"].'
        )
    return [name for name in layers if name not in by_weight], parameters


def _refused_by_peft(model: Any, layers: list[str]) -> set[str]:
    """Those that peft adapts in no model of this kind: the output projections of Mamba layers, whose kernels read the weight."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:  # an older peft, which refuses nothing
        return set()
    refused = set()
    for own in {name.rpartition(".")[2] for name in layers}:
        try:
            check(LoraConfig(), model, own)
        except ValueError:
            refused.add(own)
    return {name for name in layers if name.rpartition(".")[2] in refused}


def _as_peft_has_it(model: Any, target: str | list[str], named: tuple[list[str], list[str]] | None) -> dict[str, Any]:
    """peft's settings for `_targets`."""
    if named is None:
        return {"target_modules": target if isinstance(target, str) else list(target)}
    layers, parameters = named
    return {
        "target_modules": _ends(layers, [name for name, _ in model.named_modules()]),
        "target_parameters": _ends(parameters, [name for name, _ in model.named_parameters()]),
    }


def _ends(names: list[str], every: list[str]) -> list[str]:
    """The names without the layer's number and what is before it, where that names the same ones among `every` name."""
    others: dict[str, bool] = {}
    chosen = set(names)
    for name in every:
        end = _end(name)
        others[end] = others.get(end, False) or name not in chosen
    return sorted({name if others[_end(name)] else _end(name) for name in names})


def _end(name: str) -> str:
    return re.sub(r"^.*\.\d+\.", "", name)


def _matcher(target: str | list[str]) -> Callable[[str], bool]:
    """As in peft: a text is a regular expression for the whole name, a list has ends of names."""
    if isinstance(target, str):
        return lambda name: re.fullmatch(target, name) is not None
    ends = tuple(f".{end}" for end in target)
    return lambda name: f".{name}".endswith(ends)


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _kind(module: Any) -> Kind:
    if not isinstance(module, torch.nn.Linear):
        # A router of its own class, for example. Embeddings and convolutions are layers that peft knows.
        matrix = module._parameters.get("weight")
        known = _is_linear(module) or isinstance(module, torch.nn.Embedding)
        return "weight" if matrix is not None and matrix.dim() == 2 and not known else "layer"
    weight = module.weight
    if type(module).forward is torch.nn.Linear.forward or not _is_plain(weight):
        return "layer"
    # A class of its own: what it computes is found out with one row.
    row_1I = torch.ones(1, module.in_features, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        try:
            found = module(row_1I)
        except (RuntimeError, ValueError, IndexError):  # it expects another shape
            return "weight"
        if not isinstance(found, Tensor):
            return "router"
        expected_1O = torch.nn.functional.linear(row_1I, weight, module.bias)
    same = found.shape == expected_1O.shape and torch.allclose(found, expected_1O, rtol=1e-2, atol=1e-4)
    return "layer" if same else "weight"


def _is_plain(weight: Tensor) -> bool:
    """Whether it is numbers that can be added to, and not quantized, which peft has layers of its own for."""
    return weight.is_floating_point() and weight.element_size() > 1


def _holds_experts(module: Any) -> bool:
    return "Expert" in type(module).__name__ and any(map(_is_of_experts, module._parameters.items()))


def _is_of_experts(named: tuple[str, Tensor | None]) -> bool:
    """Whether it holds the matrices of all experts, and not their biases: of three dimensions, or of two as Dbrx has them."""
    name, parameter = named
    return parameter is not None and parameter.dim() in (2, 3) and _is_plain(parameter) and "bias" not in name


def _parameters_of_experts(modules: dict[str, Any]) -> list[str]:
    names = []
    for name, module in modules.items():
        if _holds_experts(module):
            names += [f"{name}.{own}" for own, _ in filter(_is_of_experts, module._parameters.items())]
    return names


def _names_of_experts(name: str) -> Iterator[str]:
    """The names by which a parameter of fused experts may be asked for: its own, its module's, and those of its parts."""
    module, _, own = name.rpartition(".")
    yield name
    yield module
    for part in PARTS_OF_EXPERTS.get(own, ()):
        yield f"{module}.{part}"


def _taken_for_experts(model: Any, layers: list[str]) -> set[str]:
    """Those that peft takes for experts by their names, and leaves out: "gate_proj" of a shared expert, for example."""
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # an older peft, which converts no targets
        return set()
    left_out = set()
    for own in {name.rpartition(".")[2] for name in layers}:
        asked = LoraConfig(target_modules=[own])
        try:
            convert(asked, model, None)
        except ValueError:  # it expects the names of the other parts, too
            left_out.add(own)
        else:
            left_out |= {own} - set(asked.target_modules or ())
    return {name for name in layers if name.rpartition(".")[2] in left_out}
