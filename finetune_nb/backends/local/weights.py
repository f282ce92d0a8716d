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
    "known_by",
    "optimizer_tensors",
    "parameter_states",
    "shortened",
    "trained_tensors",
]

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
MASTER = "master"
HALF_PRECISION = (torch.bfloat16, torch.float16)
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
    whose values lie 0.4 % apart, or float16. So the optimizer steps on a float32 master of such a weight, and the model gets
    the master's values, rounded. That takes 18 bytes a weight while a step is made: 2 for the weight, 4 each for the master,
    its gradient, and the two means of AdamW. A float32 weight takes 16. Half precision saves memory on activations, and time
    on a GPU, but no memory on trained weights; LoRA does that.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.masters = {
            name: torch.nn.Parameter(weight.detach().float())
            for name, weight in self.weights.items()
            if weight.dtype in HALF_PRECISION
        }
        self.by_name: dict[str, torch.nn.Parameter] = self.weights | self.masters
        """What the optimizer steps on, by the weight's name."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer steps on."""
        return list(self.by_name.values())

    @torch.no_grad()
    def follow(self) -> None:
        """Takes over weights that somebody else has put into the model since the last step."""
        for name, master in self.masters.items():
            if not torch.equal(master.to(self.weights[name].dtype), self.weights[name]):
                master.copy_(self.weights[name])

    @torch.no_grad()
    def put(self) -> None:
        """Gives the model the values of the masters, rounded."""
        for name, master in self.masters.items():
            self.weights[name].copy_(master)

    def exact(self) -> dict[str, Tensor]:
        """The masters, by the names of their weights."""
        self.follow()
        return {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def take_masters(self, stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Takes the masters that `optimizer_tensors` gave, where there are any; others have the values of `weights`."""
        for name, master in self.masters.items():
            master.copy_(stored.get(f"{MASTER}/{name}", weights[name]))
        self.put()

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside, gradients of weights in half precision are added up in float32, each as soon as it is there."""

        def gather(master: torch.nn.Parameter, weight: Tensor) -> None:
            assert weight.grad is not None  # the hook is called for that
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad.add_(weight.grad)
            weight.grad = None

        hooks = [
            self.weights[name].register_post_accumulate_grad_hook(functools.partial(gather, master))
            for name, master in self.masters.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name in self.masters:
                self.weights[name].grad = None

    def sample(self) -> list[Tensor]:
        """Copies of what the optimizer steps on: all of a small weight, evenly spaced values of a large one."""
        return [_few(weight).clone() for weight in self.parameters]

    def share_changed(self, since: Sequence[Tensor]) -> float:
        """The share of the weights that differ from an earlier `sample`; NaN without weights."""
        sizes = [weight.numel() for weight in self.parameters]
        if not sum(sizes):
            return math.nan
        now = map(_few, self.parameters)
        different = [(value != before).float().mean() for value, before in zip(now, since, strict=True)]
        shares = torch.stack(different).nan_to_num().tolist()  # at once: on a GPU each number is a wait
        return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)


def _few(weight: Tensor) -> Tensor:
    """At most `MOST_SAMPLED` of its values, at the same places every time."""
    flat = weight.detach().reshape(-1)
    return flat[:: -(-flat.numel() // MOST_SAMPLED) or 1]


def known_by(model: torch.nn.Module) -> str | None:
    """A fingerprint of a few values of each weight, by which a model is known again."""
    return fingerprint({name: _few(weight) for name, weight in model.named_parameters()})


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: TrainedWeights) -> dict[str, Tensor]:
    """AdamW's state and the masters, as `exp_avg/<name of the weight>` and so on; nothing for a weight that no step has moved."""
    trained.follow()
    tensors = {}
    for name, parameter in trained.by_name.items():
        has_steps = parameter in optimizer.state
        if has_steps:
            tensors |= {f"{key}/{name}": optimizer.state[parameter][key] for key in OPTIMIZER_STATE}
        # After a warm-up, whose optimizer is gone, a master may be more exact than its weight all the same.
        if name in trained.masters and (has_steps or not torch.equal(parameter, trained.weights[name].float())):
            tensors[f"{MASTER}/{name}"] = parameter.detach()
    return tensors


def parameter_states(tensors: dict[str, Tensor], trained: TrainedWeights, path: Path) -> dict[int, dict[str, Tensor]]:
    """What `optimizer_tensors` made of AdamW's state, by position, as torch's load_state_dict wants it."""
    state: dict[int, dict[str, Tensor]] = {}
    expected: dict[str, Tensor] = {}
    for position, (name, parameter) in enumerate(trained.by_name.items()):
        names = {key: f"{key}/{name}" for key in OPTIMIZER_STATE}
        if f"{MASTER}/{name}" in tensors:  # not in float32, and not in an older checkpoint
            expected[f"{MASTER}/{name}"] = parameter.detach()
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
