"""What registered functions of the NeMo Agent Toolkit yield: an evaluator or a function, with a description."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..config.base import EvaluatorBaseConfig
from ..types import EvalInput, EvalOutput

__all__ = [
    "EvaluatorInfo",
    "FunctionInfo",
]


@dataclass(kw_only=True)
class EvaluatorInfo:
    """An evaluator that scores all rollouts in one call, by one of two functions.

    A function that is registered by `register_evaluator` may yield one, or the evaluator itself.
    """

    config: EvaluatorBaseConfig
    """Its config."""
    evaluate_fn: Callable[[EvalInput], Awaitable[EvalOutput]] | None = None
    """Scores the rollouts; `BaseEvaluator.evaluate` is one."""
    description: str = ""
    """For people."""
    evaluate_atif_fn: Callable[[Any], Awaitable[EvalOutput]] | None = None
    """Scores the rollouts in the Agent Trajectory Interchange Format; `AtifBaseEvaluator.evaluate_atif_fn` is one. It goes before
    `evaluate_fn`, as in the Toolkit."""


@dataclass(kw_only=True)
class FunctionInfo:
    """A function of a config.

    A function that is registered by `register_function` may yield one, or the callable itself.
    """

    single_fn: Callable[..., Any]
    """The function, sync or async."""
    description: str | None = None
    """For people."""

    @classmethod
    def from_fn(cls, fn: Callable[..., Any], *, description: str | None = None, **_: Any) -> FunctionInfo:
        """Describe a function.

        Args:
            fn: The function, sync or async.
            description: For people.
            **_: Schemas and converters of the Toolkit, which are ignored: nothing is converted here.

        Returns:
            The description.
        """
        return cls(single_fn=fn, description=description)

    @classmethod
    def create(cls, *, single_fn: Callable[..., Any], description: str | None = None, **_: Any) -> FunctionInfo:
        """Describe a function.

        Args:
            single_fn: The function, sync or async.
            description: For people.
            **_: As in from_fn.

        Returns:
            The description.
        """
        return cls(single_fn=single_fn, description=description)
