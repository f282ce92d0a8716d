"""The NeMo Agent Toolkit's import path of what evaluators that read ATIF get."""

from __future__ import annotations

from ....rewards.atif import AtifEvalSample

__all__ = [
    "AtifEvalSample",
]
