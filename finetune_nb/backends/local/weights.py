"""Model and optimizer as named tensors, and whether such tensors fit a model."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError

__all__ = [
    "TrainedWeights",
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
MOST_SAMPLED = 2**16
"""Values of one weight matrix that are looked at to see how many have changed."""


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


class TrainedWeights:
    """The trained weights of a model, and what the optimizer steps on in their place.

    A step is much smaller than a weight: at a learning rate of 1e-6 most of them are lost where the weights are bfloat16,
    whose values lie 0.4 % apart, or float16. So the optimizer steps on a float32 copy of such weights, and the model gets
    the copy's values, rounded. That takes 18 bytes a weight while a step is made: 2 for the weight, 4 each for the copy, its
    gradient, and the two means of AdamW. Float32 weights take 16. Half precision saves memory on activations and time on
    a GPU, not memory on trained weights; LoRA does that.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.by_name: dict[str, torch.nn.Parameter] = {}
        """What the optimizer steps on, by the weight's name: the weight itself, or its float32 copy."""
        self._copies: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            self.by_name[name] = weight
            if weight.dtype in (torch.bfloat16, torch.float16):
                self.by_name[name] = torch.nn.Parameter(weight.detach().float())
                self._copies.append((weight, self.by_name[name]))
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.by_name.values())

    @torch.no_grad()
    def follow(self) -> None:
        """Takes over weights that somebody else has put into the model since the last step."""
        for weight, copy in self._copies:
            if not torch.equal(copy.to(weight.dtype), weight):
                copy.copy_(weight)

    def copies(self) -> dict[str, Tensor]:
        """The float32 copies by the names of their weights."""
        self.follow()
        kept = {id(copy) for _, copy in self._copies}
        return {name: copy.detach() for name, copy in self.by_name.items() if id(copy) in kept}

    @torch.no_grad()
    def put(self) -> None:
        """Gives the model the values of the copies, rounded."""
        for weight, copy in self._copies:
            weight.copy_(copy)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside, gradients are added up in float32, each as soon as it is there, and weights in half precision have none."""

        def gather(copy: torch.nn.Parameter, weight: Tensor) -> None:
            assert weight.grad is not None  # the hook is called for that
            if copy.grad is None:
                copy.grad = weight.grad.float()
            else:
                copy.grad.add_(weight.grad)
            weight.grad = None

        hooks = [w.register_post_accumulate_grad_hook(functools.partial(gather, copy)) for w, copy in self._copies]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for weight, _ in self._copies:
                weight.grad = None

    def sample(self) -> list[Tensor]:
        """Copies of weights as they are sampled from: all of a small one, evenly spaced ones of a large one."""
        return [_few(weight).clone() for weight in self._weights]

    def share_changed(self, since: Sequence[Tensor]) -> float:
        """The share of the weights that differ from those of an earlier `sample`; NaN without weights."""
        sizes = [weight.numel() for weight in self._weights]
        if not sum(sizes):
            return math.nan
        different = [(_few(now) != before).float().mean() for now, before in zip(self._weights, since, strict=True)]
        shares = torch.stack(different).nan_to_num().tolist()  # at once: on a GPU each number is a wait
        return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)


def _few(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: -(-flat.numel() // MOST_SAMPLED) or 1]


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: TrainedWeights) -> dict[str, Tensor]:
    """AdamW's state, as `exp_avg/<name of the weight>` and so on; nothing for a weight that has taken no step."""
    tensors = {}
    for name, parameter in trained.by_name.items():
        if parameter in optimizer.state:
            tensors |= {f"{key}/{name}": optimizer.state[parameter][key] for key in OPTIMIZER_STATE}
    return tensors


def parameter_states(tensors: dict[str, Tensor], trained: TrainedWeights, path: Path) -> dict[int, dict[str, Tensor]]:
    """What `optimizer_tensors` made, by position, as torch's load_state_dict wants it."""
    state: dict[int, dict[str, Tensor]] = {}
    expected: dict[str, Tensor] = {}
    for position, (name, parameter) in enumerate(trained.by_name.items()):
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
