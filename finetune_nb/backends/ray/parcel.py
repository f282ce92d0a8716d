"""What goes to another process: a rollout as bytes, functions of a notebook included, with each policy left out.

In the bytes a policy is a name, and a worker puts its replica there: weights go through the object store on their
own, once a version. A policy that has no replicas goes as it is.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError
from ...redaction import error_text

__all__ = [
    "Parcel",
    "PolicyParcel",
    "packed",
    "packed_answer",
    "unpacked",
]


@dataclass(frozen=True)
class PolicyParcel:
    """A policy's replica and the weights that are to be in it."""

    name: str
    version: int
    replica: Any = field(repr=False)
    """Object ref of a function without arguments, which makes one."""
    weights: Any = field(repr=False)
    """Object ref of what its `take` wants."""


@dataclass(frozen=True)
class Parcel:
    """A rollout for workers. `key` stays the same where the bytes do."""

    key: str
    content: Any = field(repr=False)
    """Object ref of bytes."""
    policies: tuple[PolicyParcel, ...] = ()


def packed(value: Any, policies: Mapping[int, str]) -> bytes:
    """policies: id of an object -> the name sent in its place. Raises ConfigError for what cannot be sent to another process."""
    from ray import cloudpickle  # pyright: ignore

    class Packer(cloudpickle.CloudPickler):
        def persistent_id(self, obj: Any) -> str | None:
            return policies.get(id(obj))

    buffer = io.BytesIO()
    try:
        Packer(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:
        raise ConfigError(
            f"the workflow cannot go to another process: {error_text(error)[:300]}. Expected "
            "functions and plain data; make clients, locks and files inside the workflow."
        ) from None
    return buffer.getvalue()


def unpacked(content: bytes, policies: Mapping[str, Any]) -> Any:
    """What `packed` was given, with these policies in it."""

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, pid: str) -> Any:
            return policies[pid]

    return Unpacker(io.BytesIO(content)).load()


def packed_answer(output: Any, steps: Any, seconds: float, error: str | None) -> bytes:
    """A finished rollout. An output that cannot go to another process is an error of its rollout alone."""
    from ray import cloudpickle  # pyright: ignore

    try:
        return cloudpickle.dumps((output, steps, seconds, error))
    except Exception as reason:
        kind = type(output).__name__
        error = (
            f"WorkflowError: the workflow returned a {kind}, which cannot go to another process "
            f"({type(reason).__name__}: {reason}). Return text, numbers, lists or dicts."
        )
        return cloudpickle.dumps((None, steps, seconds, error))
