"""The NeMo Agent Toolkit's import path of an evaluator's verdicts."""

from __future__ import annotations

from ....types import EvalOutput, EvalOutputItem

__all__ = [
    "EvalOutput",
    "EvalOutputItem",
]
