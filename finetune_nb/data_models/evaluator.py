"""The NeMo Agent Toolkit's import path of the nouns of an evaluation."""

from __future__ import annotations

from ..config.base import EvaluatorBaseConfig
from ..types import EvalInput, EvalInputItem, EvalOutput, EvalOutputItem

__all__ = [
    "EvalInput",
    "EvalInputItem",
    "EvalOutput",
    "EvalOutputItem",
    "EvaluatorBaseConfig",
]
