"""Replicas of a policy in other processes: the model without what is trained, once, and the trained weights, once a version.

With LoRA that is the adapter alone. Weights travel as numpy arrays, which an object store can share between processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError
from . import models
from .families.passes import Batching
from .lora import as_trained, is_lora
from .weights import all_tensors, trained_tensors

__all__ = [
    "Replica",
    "trained_weights",
    "with_weights",
]

Packed = tuple[str, np.ndarray]
"""A tensor's dtype and its bytes in its shape: numpy knows no bfloat16."""


@dataclass(frozen=True)
class Replica:
    """What a replica is made of, but for the trained weights."""

    kind: type
    """The model's class, of transformers."""
    config: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    adapters: Any = field(repr=False)
    """peft's settings; None where all weights are trained."""
    dtypes: dict[str, torch.dtype] = field(repr=False)
    """Of each weight: adapters are float32 beside a model in bfloat16."""
    device: str
    """As in the config: each process looks for itself what it has."""
    threads: int | None
    batching: Batching
    record_entropy: bool
    frozen: dict[str, Packed] = field(repr=False)
    buffers: dict[str, Packed] = field(repr=False)
    """Those that are computed and not saved, such as the frequencies of positions: casting them would change them."""

    @classmethod
    def of(cls, policy: Any) -> Replica:
        """A replica of a `LocalPolicy`. The caller holds `policy.exclusive`."""
        model = policy.model
        inside = as_trained(model)
        trained, tensors = trained_tensors(model).keys(), all_tensors(model)
        frozen = {name: tensor for name, tensor in tensors.items() if name not in trained}
        buffers = {name: buffer for name, buffer in model.named_buffers() if name not in tensors}
        return cls(
            type(inside),
            inside.config,
            policy.tokenizer,
            model.peft_config[model.active_adapter] if is_lora(model) else None,
            {name: tensor.dtype for name, tensor in tensors.items()},
            policy.device,
            policy.exclusive.threads,
            policy.batching,
            policy.record_entropy,
            {name: _packed(tensor) for name, tensor in frozen.items()},
            {name: _packed(tensor) for name, tensor in buffers.items()},
        )

    def model(self) -> Any:
        """The model, with its frozen weights; the trained ones are still to come."""
        model: Any = self.kind(self.config)
        if self.adapters is not None:
            from peft import get_peft_model

            model = get_peft_model(model, self.adapters)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in self.dtypes:
                tensor.data = tensor.data.to(self.dtypes[name])
            elif name in self.buffers:
                tensor.data = _unpacked(*self.buffers[name])
        with_weights(model, self.frozen)
        return model.to(models.chosen_device(self.device))


def trained_weights(model: Any) -> dict[str, Packed]:
    """What training changes, by name: the adapter where there is one, else all. Copies."""
    return {name: _packed(tensor) for name, tensor in trained_tensors(model).items()}


@torch.no_grad()
def with_weights(model: Any, weights: dict[str, Packed]) -> None:
    """Puts these weights into the model. Raises BackendError where they are those of another one."""
    there = all_tensors(model)
    for name, (dtype, values) in weights.items():
        tensor = there.get(name)
        if tensor is None or tensor.shape != values.shape[: tensor.dim()]:
            raise BackendError(
                f"weight {name!r} of shape {list(values.shape)} does not fit the replica's model. Expected the model that "
                "they were taken from: close the run and open it again."
            )
        tensor.copy_(_unpacked(dtype, values))


def _packed(tensor: Tensor) -> Packed:
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return dtype, (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _unpacked(dtype: str, values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(
        np.array(values)
    )  # what lies in an object store cannot be written to, which torch warns of
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
