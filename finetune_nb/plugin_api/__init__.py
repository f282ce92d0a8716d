"""The NeMo Agent Toolkit's import path of what plugins are made of."""

from __future__ import annotations

from ..components.builder import Builder
from ..components.info import EvaluatorInfo, FunctionInfo
from ..components.registry import register_evaluator, register_function, register_llm_provider
from ..config.base import EvaluatorBaseConfig, FunctionBaseConfig, LLMBaseConfig

EvalBuilder = Builder
"""What the function of an evaluator gets."""

__all__ = [
    "Builder",
    "EvalBuilder",
    "EvaluatorBaseConfig",
    "EvaluatorInfo",
    "FunctionBaseConfig",
    "FunctionInfo",
    "LLMBaseConfig",
    "register_evaluator",
    "register_function",
    "register_llm_provider",
]
