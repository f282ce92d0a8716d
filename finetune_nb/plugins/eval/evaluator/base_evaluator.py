"""The NeMo Agent Toolkit's import path of the base class of evaluators."""

from __future__ import annotations

from ....rewards.base_evaluator import BaseEvaluator

__all__ = [
    "BaseEvaluator",
]
