"""The calculator agent, as NAT-style components: a workflow that calls the tool as often as the model asks for it, the
reward, and three evaluators that say what an episode consisted of.

What GRPO teaches here is "use the tool instead of guessing": the warm start can copy an operation into a tool call, but it
cannot add. It learns no new skill.
"""

from __future__ import annotations

from typing import Any, Literal

from ...components.builder import Builder
from ...components.registry import register_evaluator, register_function
from ...config.base import EvaluatorBaseConfig, FunctionBaseConfig
from ...types import EvalInputItem
from .task import TOOLS, calculate, first_operation

MAX_TURNS = 7


async def solve(question: str, llm: Any) -> str:
    """Asks the model until it answers ("=16"), does what it asks of the calculator, and returns the answer ("16")."""
    messages: list[Any] = [{"role": "user", "content": question}]
    remaining = question
    for _ in range(MAX_TURNS):
        reply = await llm.chat(messages, tools=TOOLS)
        if not reply.tool_calls:
            return reply.content.removeprefix("=")
        call = reply.tool_calls[0]
        result = calculate(str(call.arguments.get("expression")), remaining)
        if result is None:
            return f"malformed call: {call.arguments}"
        remaining = result
        messages += [reply, {"role": "tool", "tool_call_id": call.id, "content": result}]
    return "no answer"


def correct(item: EvalInputItem) -> float:
    """1 if the answer is right."""
    return float(item.output_obj == item.expected_output_obj)


def kind_of(item: EvalInputItem) -> str:
    """What a finished episode consisted of: "used_tool" (every operation was done by the tool), "guessed" (answered while
    operations were left) or "malformed"."""
    call: Any = item.trajectory[-1].data and item.trajectory[-1].data.payload
    reply = call.reply
    if reply.get("tool_calls") or not str(reply.get("content")).startswith("="):
        return "malformed"
    remaining = call.messages[-1]["content"]
    return "guessed" if first_operation(remaining) else "used_tool"


class CalculatorAgentConfig(FunctionBaseConfig, name="calculator_agent"):
    """Answers sums with a calculator that does one operation at a time."""

    llm: str
    """Name of the llm that plays the agent."""


@register_function(config_type=CalculatorAgentConfig)
async def calculator_agent(config: CalculatorAgentConfig, builder: Builder):
    yield solve


class CalculatorRewardConfig(EvaluatorBaseConfig, name="calculator_reward"):
    """1 for the right answer, else 0."""


@register_evaluator(config_type=CalculatorRewardConfig)
async def calculator_reward(config: CalculatorRewardConfig, builder: Builder):
    yield correct


class CalculatorEpisodeConfig(EvaluatorBaseConfig, name="calculator_episode"):
    """1 if the episode was of this kind."""

    kind: Literal["used_tool", "guessed", "malformed"]
    """How the agent came to its answer."""


@register_evaluator(config_type=CalculatorEpisodeConfig)
async def calculator_episode(config: CalculatorEpisodeConfig, builder: Builder):
    yield lambda item: float(kind_of(item) == config.kind)
