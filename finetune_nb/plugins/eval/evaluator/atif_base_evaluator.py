"""The NeMo Agent Toolkit's import path of the base class of evaluators that read ATIF."""

from __future__ import annotations

from ....rewards.atif import AtifBaseEvaluator

__all__ = [
    "AtifBaseEvaluator",
]
