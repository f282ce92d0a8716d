"""Evaluators that read a rollout in the Agent Trajectory Interchange Format (ATIF), as in the NeMo Agent Toolkit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..llms.call_recorder import arguments_of
from ..text import text_of
from ..types import EpisodeItem, EpisodeItemRole, EvalInputItem, EvalOutput, EvalOutputItem, MessageKey, Trajectory
from .base_evaluator import score_each

__all__ = [
    "AtifBaseEvaluator",
    "AtifEvalSample",
    "AtifObservation",
    "AtifObservationResult",
    "AtifStep",
    "AtifToolCall",
    "AtifTrajectory",
    "atif_sample",
]

VERSION = "ATIF-v1.7"
_SOURCES = {EpisodeItemRole.SYSTEM: "system", EpisodeItemRole.ASSISTANT: "agent"}
"""Who speaks, by role; every other role is the user."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AtifToolCall(_Strict):
    """A tool that the model called."""

    tool_call_id: str
    function_name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class AtifObservationResult(_Strict):
    """What a tool returned."""

    source_call_id: str | None = None
    content: str | None = None


class AtifObservation(_Strict):
    """What the tools of a step returned."""

    results: list[AtifObservationResult] = Field(default_factory=list)


class AtifStep(_Strict):
    """One message, with the tool calls in it and what they returned."""

    step_id: int = Field(ge=1)
    """From 1."""
    source: Literal["system", "user", "agent"]
    message: str = ""
    model_name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AtifToolCall] | None = None
    observation: AtifObservation | None = None
    extra: dict[str, Any] | None = None


class AtifTrajectory(_Strict):
    """All messages of a rollout."""

    schema_version: str = VERSION
    session_id: str | None = None
    agent: dict[str, Any] = Field(default_factory=dict)
    steps: list[AtifStep] = Field(default_factory=list)


class AtifEvalSample(BaseModel):
    """A finished rollout, as evaluators of this format get it."""

    item_id: Any
    trajectory: AtifTrajectory
    expected_output_obj: Any = None
    output_obj: Any = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class AtifBaseEvaluator(ABC):
    """Scores rollouts one by one, several at a time.

    Args:
        max_concurrency: How many rollouts are scored at once, 1 or more.
    """

    def __init__(self, max_concurrency: int = 4) -> None:
        self.max_concurrency = max_concurrency

    @abstractmethod
    async def evaluate_atif_item(self, sample: AtifEvalSample) -> EvalOutputItem:
        """Score one rollout.

        Args:
            sample: The rollout.

        Returns:
            The verdict.
        """

    async def evaluate_atif_fn(self, atif_samples: Sequence[AtifEvalSample]) -> EvalOutput:
        """Score all rollouts.

        Args:
            atif_samples: The rollouts.

        Returns:
            One verdict a rollout, in their order. One for which `evaluate_atif_item` raised has no score, and the error. (The
            Toolkit gives it a score of 0.)
        """
        return await score_each(
            self, atif_samples, self.evaluate_atif_item, [sample.item_id for sample in atif_samples]
        )


def atif_sample(item: EvalInputItem, trajectory: Trajectory) -> AtifEvalSample:
    """Make what an evaluator of this format gets.

    Args:
        item: The finished rollout.
        trajectory: Its messages.

    Returns:
        The sample. What a tool returned is in the step that called it.
    """
    steps: list[AtifStep] = []
    callers: dict[str, AtifStep] = {}
    for message in trajectory.episode:
        if not isinstance(message, EpisodeItem):
            continue
        metadata = message.metadata or {}
        called_by = callers.get(text_of(metadata.get(MessageKey.TOOL_CALL_ID)))
        if message.role == EpisodeItemRole.TOOL and called_by is not None:
            called_by.observation = called_by.observation or AtifObservation()
            result = AtifObservationResult(source_call_id=metadata[MessageKey.TOOL_CALL_ID], content=message.content)
            called_by.observation.results.append(result)
            continue
        step = AtifStep(step_id=len(steps) + 1, source=_SOURCES.get(message.role, "user"), message=message.content)  # type: ignore[arg-type]
        if step.source == "agent":
            step.reasoning_content = metadata.get(MessageKey.REASONING_CONTENT)
            step.tool_calls = [_tool_call(call) for call in metadata.get(MessageKey.TOOL_CALLS) or ()] or None
            callers.update({call.tool_call_id: step for call in step.tool_calls or ()})
        steps.append(step)
    return AtifEvalSample(
        item_id=item.id,
        trajectory=AtifTrajectory(agent={"name": "finetune_nb"}, steps=steps),
        expected_output_obj=item.expected_output_obj,
        output_obj=item.output_obj,
    )


def _tool_call(call: dict[str, Any]) -> AtifToolCall:
    function = call.get("function") or {}
    arguments = arguments_of(function)
    if not isinstance(arguments, dict):
        arguments = {"input": arguments}
    return AtifToolCall(
        tool_call_id=text_of(call.get("id") or ""),
        function_name=text_of(function.get("name") or ""),
        arguments=arguments,
    )
