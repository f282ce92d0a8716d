"""The nouns of an evaluation: dataset items, what evaluators say of them, the steps of a workflow's run, and rollouts that
failed. Names, fields and defaults are those of nvidia-nat-core and nvidia-nat-eval 1.9.0. `types` exports them all.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, model_validator

from .observe import resolve

__all__ = [
    "EvalInput",
    "EvalInputItem",
    "EvalOutput",
    "EvalOutputItem",
    "EvaluationRunConfig",
    "EvaluationRunOutput",
    "IntermediateStep",
    "IntermediateStepCategory",
    "IntermediateStepPayload",
    "IntermediateStepState",
    "IntermediateStepType",
    "InvocationNode",
    "RolloutFailure",
    "StreamEventData",
    "UsageStats",
]


class IntermediateStepCategory(StrEnum):
    """What a step is about."""

    LLM = "LLM"
    TOOL = "TOOL"
    WORKFLOW = "WORKFLOW"
    TASK = "TASK"
    FUNCTION = "FUNCTION"
    CUSTOM = "CUSTOM"
    SPAN = "SPAN"
    TTC = "TTC"


class IntermediateStepState(StrEnum):
    """Whether a step begins, goes on or ends."""

    START = "START"
    CHUNK = "CHUNK"
    END = "END"


class IntermediateStepType(StrEnum):
    """What a step is about, and whether it begins, goes on or ends."""

    LLM_START = "LLM_START"
    LLM_END = "LLM_END"
    LLM_NEW_TOKEN = "LLM_NEW_TOKEN"
    TOOL_START = "TOOL_START"
    TOOL_END = "TOOL_END"
    WORKFLOW_START = "WORKFLOW_START"
    WORKFLOW_END = "WORKFLOW_END"
    TASK_START = "TASK_START"
    TASK_END = "TASK_END"
    TTC_START = "TTC_START"
    TTC_END = "TTC_END"
    FUNCTION_START = "FUNCTION_START"
    FUNCTION_END = "FUNCTION_END"
    CUSTOM_START = "CUSTOM_START"
    CUSTOM_END = "CUSTOM_END"
    SPAN_START = "SPAN_START"
    SPAN_CHUNK = "SPAN_CHUNK"
    SPAN_END = "SPAN_END"


class InvocationNode(BaseModel):
    """The function that was running when a step was made."""

    function_id: str
    function_name: str
    parent_id: str | None = None
    parent_name: str | None = None


class StreamEventData(BaseModel):
    """What went in and came out. `payload` is the LLMCall for steps that finetune_nb recorded."""

    model_config = ConfigDict(extra="allow")

    input: Any | None = None
    output: Any | None = None
    chunk: Any | None = None
    payload: Any | None = None


class IntermediateStepPayload(BaseModel):
    """What happened in a step. Times are seconds since 1970, UTC; `span_event_timestamp` of an END is that of its START."""

    model_config = ConfigDict(extra="allow")

    event_type: IntermediateStepType
    event_timestamp: float = Field(default_factory=time.time)
    span_event_timestamp: float | None = None
    framework: str | None = None
    name: str | None = None
    tags: list[str] | None = None
    metadata: dict[str, Any] | None = None
    data: StreamEventData | None = None
    usage_info: Any | None = None
    UUID: str = Field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def event_category(self) -> IntermediateStepCategory:
        return IntermediateStepCategory(self.event_type.split("_")[0])

    @property
    def event_state(self) -> IntermediateStepState:
        last = self.event_type.split("_")[-1]
        return IntermediateStepState.CHUNK if last == "TOKEN" else IntermediateStepState(last)

    @model_validator(mode="after")
    def check_span_event_timestamp(self) -> IntermediateStepPayload:
        if self.event_state != IntermediateStepState.END and self.span_event_timestamp is not None:
            raise ValueError("span_event_timestamp can only be provided for events with an END state")
        return self


class IntermediateStep(BaseModel):
    """One event of a workflow's run: a model call, a tool call."""

    model_config = ConfigDict(extra="forbid")

    parent_id: str
    function_ancestry: InvocationNode
    payload: IntermediateStepPayload

    @property
    def event_type(self) -> IntermediateStepType:
        return self.payload.event_type

    @property
    def event_timestamp(self) -> float:
        return self.payload.event_timestamp

    @property
    def span_event_timestamp(self) -> float | None:
        return self.payload.span_event_timestamp

    @property
    def name(self) -> str | None:
        return self.payload.name

    @property
    def tags(self) -> list[str] | None:
        return self.payload.tags

    @property
    def metadata(self) -> dict[str, Any] | None:
        return self.payload.metadata

    @property
    def data(self) -> StreamEventData | None:
        return self.payload.data

    @property
    def usage_info(self) -> Any | None:
        return self.payload.usage_info

    @property
    def UUID(self) -> str:  # noqa: N802  # NAT's name
        return self.payload.UUID

    @property
    def event_category(self) -> IntermediateStepCategory:
        return self.payload.event_category

    @property
    def event_state(self) -> IntermediateStepState:
        return self.payload.event_state


class EvalInputItem(BaseModel):
    """One dataset row and, after its rollout, what the workflow made of it."""

    id: Any
    input_obj: Any
    expected_output_obj: Any
    output_obj: Any = None
    expected_trajectory: list[IntermediateStep] = Field(default_factory=list)
    trajectory: list[IntermediateStep] = Field(default_factory=list)
    full_dataset_entry: Any

    def copy_with_updates(self, **updates: Any) -> EvalInputItem:
        """A copy with other values of some fields. Raises ValidationError for those that do not fit."""
        return EvalInputItem(**{**dict(self), **updates})


class EvalInput(BaseModel):
    """The items of one evaluation."""

    eval_input_items: list[EvalInputItem]


class EvalOutputItem(BaseModel):
    """One evaluator's verdict on one item. `score` None (with `error`) means that there is none."""

    id: Any
    score: Any
    reasoning: Any
    error: str | None = None


class EvalOutput(BaseModel):
    """One evaluator's verdicts on all items, and their mean."""

    average_score: Any
    eval_output_items: list[EvalOutputItem]


class EvaluationRunConfig(BaseModel):
    """What one evaluation run needs: a config (file or model) and, if not the config's own, a dataset."""

    config_file: Path | BaseModel
    dataset: str | None = None
    result_json_path: str = "$"
    skip_workflow: bool = False
    skip_completed_entries: bool = False
    endpoint: str | None = None
    endpoint_timeout: int = 300
    reps: int = 1
    override: tuple[tuple[str, str], ...] = ()
    write_output: bool = True
    adjust_dataset_size: bool = False
    num_passes: int = 0
    export_timeout: float = 60.0
    user_id: str = "nat_eval_user_id"


class UsageStats(BaseModel):
    """Seconds that the evaluation took, and what each item cost."""

    min_timestamp: float = 0.0
    max_timestamp: float = 0.0
    total_runtime: float = 0.0
    usage_stats_items: dict[Any, Any] = {}


@dataclass(frozen=True)
class RolloutFailure:
    """A rollout that ended without a trajectory. It is data: never reward 0, never gone."""

    example_id: Any
    generation: int
    error: str
    """The error's type and message."""
    steps: list[IntermediateStep] = field(default_factory=list, repr=False)
    """What had happened until then."""

    def _repr_html_(self) -> str:
        return resolve("finetune_nb.viewer:failure_html")(self)


class EvaluationRunOutput(BaseModel):
    """What one evaluation run returns: all items with their outputs, and each evaluator's verdicts."""

    workflow_output_file: Path | None
    evaluator_output_files: list[Path]
    workflow_interrupted: bool
    eval_input: EvalInput
    evaluation_results: list[tuple[str, Any]]
    usage_stats: UsageStats | None = None
    profiler_results: Any = None
    config_original_file: Path | None = None
    config_effective_file: Path | None = None
    config_metadata_file: Path | None = None
    failures: SkipValidation[list[RolloutFailure]] = Field(default_factory=list, exclude=True)
    """Items whose workflow raised, hung or returned nothing; no evaluator saw them."""
