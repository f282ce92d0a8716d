"""What brings out faults of the Toolkit: a builder whose rewards are not finite, and agents that its parser drops.

Importing this registers them, as an installed plugin would.
"""

from __future__ import annotations

import math
from typing import Any

from nat.builder.framework_enum import LLMFrameworkEnum
from nat.builder.function_info import FunctionInfo
from nat.cli.register_workflow import register_function, register_trajectory_builder
from nat.data_models.component_ref import LLMRef
from nat.data_models.function import FunctionBaseConfig
from nat.plugins.openpipe.config import ARTTrajectoryBuilderConfig
from nat.plugins.openpipe.trajectory_builder import ARTTrajectoryBuilder


class ShapingConfig(ARTTrajectoryBuilderConfig, name="test_shaping_builder"):
    """The ART plugin's builder with rewards of its own."""


class ShapingBuilder(ARTTrajectoryBuilder):
    async def compute_reward(self, output_item: Any, meta: dict | None = None) -> float:
        """Shaped: the logarithm of the score, which no score of 0 has."""
        return math.log(output_item.score) if output_item.score else math.nan


@register_trajectory_builder(config_type=ShapingConfig)
async def shaping(config: ShapingConfig, builder: Any):
    yield ShapingBuilder(config)


class InsistingConfig(FunctionBaseConfig, name="test_insisting_agent"):
    """An agent whose user says the same thing twice."""

    llm: LLMRef


@register_function(config_type=InsistingConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])
async def insisting(config: InsistingConfig, builder: Any):
    llm = await builder.get_llm(config.llm, wrapper_type=LLMFrameworkEnum.LANGCHAIN)

    async def answer(question: str) -> str:
        messages: list[Any] = [("user", question)]
        for _ in range(2):
            reply = await llm.ainvoke(messages)
            messages += [reply, ("user", question)]
        return "done"

    yield FunctionInfo.from_fn(answer, description="asks twice")


class SilentConfig(FunctionBaseConfig, name="test_silent_agent"):
    """An agent whose model calls the Toolkit does not see."""


@register_function(config_type=SilentConfig)
async def silent(config: SilentConfig, builder: Any):
    async def answer(question: str) -> str:
        return question

    yield FunctionInfo.from_fn(answer, description="calls no model that is recorded")
