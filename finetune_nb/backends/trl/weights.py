"""Weights from a model's directory into a policy that is being sampled. Needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import BackendError

__all__ = ["load_weights"]


def load_weights(policy: Any, directory: Path, version: int) -> None:
    """Puts the weights of `directory` in the place of the policy's, between two batches, and sets its version.

    Only safetensors are read. Raises BackendError, and changes nothing, where they are not this model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        trained = AutoModelForCausalLM.from_pretrained(str(directory), dtype=policy.model.dtype, use_safetensors=True)
        found, own = trained.state_dict(), policy.model.state_dict()
    except (OSError, ValueError, RuntimeError) as error:
        raise BackendError(
            f"the model in {directory.name} cannot be read: {error}. Load another checkpoint."
        ) from error
    wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
    if wrong or len(found) != len(own):
        raise BackendError(
            f"the model in {directory.name} is another one: {(wrong or sorted(set(found) - set(own)))[:3]} differ. Expected "
            "weights of the model that the trainer adapter names: name that one, or load another checkpoint."
        )
    with policy.exclusive.hold(), torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
        policy.version = version
