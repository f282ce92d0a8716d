"""Model and optimizer as named tensors, and whether such tensors fit a model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError

__all__ = [
    "all_tensors",
    "check_like",
    "dtype_name",
    "fingerprint",
    "frozen_tensors",
    "optimizer_tensors",
    "parameter_states",
    "shortened",
    "trained_tensors",
]

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """The trained weights and the persistent buffers, by name; tied weights once."""
    persistent = model.state_dict().keys()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: b for name, b in model.named_buffers() if name in persistent}


def frozen_tensors(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}


def all_tensors(model: Any) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], model: Any
) -> dict[str, Tensor]:
    """AdamW's state, as `exp_avg/<name of the weight>` and so on; nothing for a weight that has taken no step."""
    state = optimizer.state
    return {
        f"{key}/{name}": state[parameter][key]
        for name, parameter in _trained(parameters, model)
        for key in (OPTIMIZER_STATE if parameter in state else ())
    }


def _trained(parameters: Sequence[torch.nn.Parameter], model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The optimizer's weights in its order, with their names."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [(name_of[parameter], parameter) for parameter in parameters]


def parameter_states(
    tensors: dict[str, Tensor], parameters: Sequence[torch.nn.Parameter], model: Any, path: Path
) -> dict[int, dict[str, Tensor]]:
    """What `optimizer_tensors` made, by position, as torch's load_state_dict wants it."""
    state: dict[int, dict[str, Tensor]] = {}
    expected: dict[str, Tensor] = {}
    for position, (name, parameter) in enumerate(_trained(parameters, model)):
        names = {key: f"{key}/{name}" for key in OPTIMIZER_STATE}
        if tensors.keys().isdisjoint(names.values()):
            continue
        expected |= dict.fromkeys(names.values(), parameter.detach()) | {names["step"]: torch.zeros(())}
        state[position] = {key: tensors[full] for key, full in names.items() if full in tensors}
    check_like(tensors, expected, path)
    for values in state.values():
        steps = values["step"].item()
        if not (math.isfinite(steps) and steps >= 0):
            raise BackendError(f"{path} has {steps} optimizer steps of a weight; expected 0 or more. Load another one.")
    return state


def dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def check_like(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Same names, shapes, and kinds of number."""
    wrong: Iterable[str] = sorted(found.keys() ^ expected.keys())
    if not wrong:
        wrong = sorted(
            name
            for name, tensor in expected.items()
            if found[name].shape != tensor.shape or found[name].is_floating_point() != tensor.is_floating_point()
        )
    for name in wrong:
        raise BackendError(
            f"{path} does not fit the model: tensor {shortened(name)} is {_described(found.get(name))} there; expected "
            f"{_described(expected.get(name))}. Load the model that it was saved from, or another checkpoint."
        )


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def fingerprint(tensors: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of names, shapes, dtypes and bytes; None for no tensors."""
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
