"""The Toolkit's nouns as ours, and ours as the Toolkit's: trajectories, preferences, jobs, evaluations.

They have the same fields by design, so nothing is lost on the way but what only one side has: `failures` of a collection
(the Toolkit has none) and the Toolkit's usage records. Objects inside `metadata` and `logprobs` are handed over as they
are. Nothing here imports the Toolkit but the functions that make its nouns.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...llms.chat_messages import field_of
from ...types import (
    DPOItem,
    EpisodeItem,
    EpisodeItemRole,
    EvalInput,
    EvalInputItem,
    EvalOutput,
    EvalOutputItem,
    EvaluationRunOutput,
    IntermediateStep,
    IntermediateStepPayload,
    IntermediateStepType,
    InvocationNode,
    LLMCall,
    MessageKey,
    OpenAIMessage,
    RolloutFailure,
    StreamEventData,
    TrainingJobRef,
    TrainingJobStatus,
    Trajectory,
    TrajectoryCollection,
    TTCEventData,
)

__all__ = [
    "collection_from_nat",
    "collection_to_nat",
    "evaluation_error",
    "evaluation_from_nat",
    "ref_from_nat",
    "ref_to_nat",
    "status_from_nat",
    "status_to_nat",
    "steps_from_nat",
    "trajectory_from_nat",
    "trajectory_to_nat",
    "workflow_error",
]

# ── trajectories ─────────────────────────────────────────────────────────────────────────────────────────────────────


def trajectory_from_nat(trajectory: Any) -> Trajectory:
    """The Toolkit's Trajectory as ours. The values were validated there and are not validated again."""
    return Trajectory.model_construct(
        episode=[_item_from_nat(item) for item in trajectory.episode],
        reward=trajectory.reward,
        shaped_rewards=trajectory.shaped_rewards,
        metadata=trajectory.metadata,
    )


def _item_from_nat(item: Any) -> EpisodeItem | DPOItem:
    if hasattr(item, "chosen_response"):
        prompt = item.prompt
        return DPOItem(
            prompt=prompt
            if isinstance(prompt, str)
            else [OpenAIMessage(role=m.role, content=m.content) for m in prompt],
            chosen_response=item.chosen_response,
            rejected_response=item.rejected_response,
        )
    return EpisodeItem.model_construct(
        role=EpisodeItemRole(str(item.role)), content=item.content, logprobs=item.logprobs, metadata=item.metadata
    )


def trajectory_to_nat(trajectory: Trajectory) -> Any:
    """Our Trajectory as the Toolkit's."""
    from nat.data_models import finetuning as nat

    def item_to_nat(item: EpisodeItem | DPOItem) -> Any:
        if isinstance(item, EpisodeItem):
            return nat.EpisodeItem(
                role=nat.EpisodeItemRole(item.role.value),
                content=item.content,
                logprobs=item.logprobs,
                metadata=item.metadata,
            )
        return nat.DPOItem(
            prompt=item.prompt if isinstance(item.prompt, str) else [nat.OpenAIMessage(**dict(m)) for m in item.prompt],
            chosen_response=item.chosen_response,
            rejected_response=item.rejected_response,
        )

    return nat.Trajectory(
        episode=[item_to_nat(item) for item in trajectory.episode],
        reward=trajectory.reward,
        shaped_rewards=trajectory.shaped_rewards,
        metadata=trajectory.metadata,
    )


def collection_from_nat(collection: Any, convert: Callable[[Any], Trajectory] = trajectory_from_nat) -> Any:
    """The Toolkit's TrajectoryCollection as ours. convert: for a trajectory that is known already."""
    return TrajectoryCollection.model_construct(
        trajectories=[[convert(trajectory) for trajectory in group] for group in collection.trajectories],
        run_id=collection.run_id,
        failures=[],
    )


def collection_to_nat(collection: TrajectoryCollection) -> Any:
    """Our TrajectoryCollection as the Toolkit's; `failures` are left out."""
    from nat.data_models import finetuning as nat

    return nat.TrajectoryCollection(
        trajectories=[[trajectory_to_nat(trajectory) for trajectory in group] for group in collection.trajectories],
        run_id=collection.run_id,
    )


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ref_from_nat(ref: Any) -> TrainingJobRef:
    return TrainingJobRef(run_id=ref.run_id, backend=ref.backend, metadata=ref.metadata)


def ref_to_nat(ref: TrainingJobRef) -> Any:
    from nat.data_models import finetuning as nat

    return nat.TrainingJobRef(run_id=ref.run_id, backend=ref.backend, metadata=ref.metadata)


def status_from_nat(status: Any) -> TrainingJobStatus:
    return TrainingJobStatus(**{**dict(status), "status": str(status.status)})


def status_to_nat(status: TrainingJobStatus) -> Any:
    from nat.data_models import finetuning as nat

    return nat.TrainingJobStatus(**{**dict(status), "status": status.status.value})


# ── evaluations ──────────────────────────────────────────────────────────────────────────────────────────────────────


def evaluation_from_nat(
    output: Any,
    call_of_id: Callable[[str], LLMCall | None] = lambda response_id: None,
    generation: int = 0,
    errors: Sequence[tuple[Any, str]] = (),
) -> EvaluationRunOutput:
    """What the Toolkit's EvaluationRun returned, as ours.

    Its model calls become LLMCalls: of a reply whose id the gateway knows the call as it was recorded, exact ids and all; of
    any other what the Toolkit noted.

    Args:
        output: What it returned.
        call_of_id: Finds the recorded call of a reply.
        generation: Which of the group's rollouts these are.
        errors: The items whose rollout failed, each with its error. An item without output and steps is one of them: a
            workflow elsewhere raised for it.

    Returns:
        The evaluation.
    """
    items, failures = [], []
    known = {id(item): error for item, error in errors}
    for item in output.eval_input.eval_input_items:
        ours = EvalInputItem.model_construct(
            id=item.id,
            input_obj=item.input_obj,
            expected_output_obj=item.expected_output_obj,
            output_obj=item.output_obj,
            expected_trajectory=[],
            trajectory=steps_from_nat(item.trajectory, call_of_id),
            full_dataset_entry=item.full_dataset_entry,
        )
        items.append(ours)
        error = known.get(id(item)) or workflow_error(item)
        if error is not None:
            failures.append(RolloutFailure(item.id, generation, error))
    return EvaluationRunOutput.model_construct(
        workflow_output_file=output.workflow_output_file,
        evaluator_output_files=list(output.evaluator_output_files),
        workflow_interrupted=False,  # said by the failures, one by one
        eval_input=EvalInput.model_construct(eval_input_items=items),
        evaluation_results=[(name, _verdicts(result)) for name, result in output.evaluation_results],
        usage_stats=None,
        profiler_results=None,
        failures=failures,
    )


def steps_from_nat(
    given: Sequence[Any], call_of_id: Callable[[str], LLMCall | None] = lambda response_id: None
) -> list[IntermediateStep]:
    """The model and tool calls among the Toolkit's steps, and what the workflow pushed, as ours."""
    steps = [step for step in given if step.event_type in _KEPT_STEPS]
    starts = {step.UUID: step for step in steps if step.event_type == IntermediateStepType.LLM_START}
    return [_step_from_nat(step, starts.get(step.UUID), call_of_id) for step in steps]


def workflow_error(item: Any) -> str | None:
    """What is known of an item for which a workflow elsewhere raised, or was not run because it raised for another."""
    was_dropped = not item.trajectory and item.output_obj in (None, "")
    return "WorkflowError: the workflow raised; the Toolkit's log has its error" if was_dropped else None


_PUSHED_STEPS = ("CUSTOM_START", "CUSTOM_END", "TTC_START", "TTC_END")
_KEPT_STEPS = ("LLM_START", "LLM_END", "TOOL_START", "TOOL_END", *_PUSHED_STEPS)


def _verdicts(output: Any) -> EvalOutput:
    return EvalOutput.model_construct(
        average_score=output.average_score,
        eval_output_items=[
            EvalOutputItem.model_construct(
                id=item.id,
                score=item.score if evaluation_error(item) is None else None,
                reasoning=item.reasoning,
                error=evaluation_error(item),
            )
            for item in output.eval_output_items
        ],
    )


def evaluation_error(item: Any) -> str | None:
    """Why an item was not scored. The Toolkit's BaseEvaluator gives a score of 0 to an item for which it raised."""
    error = getattr(item, "error", None)
    if error:
        return str(error)
    said = item.reasoning.get("error") if isinstance(item.reasoning, dict) and len(item.reasoning) == 1 else None
    return said if isinstance(said, str) and said.startswith("Evaluator error: ") and not item.score else None


def _step_from_nat(step: Any, start: Any, call_of_id: Callable[[str], LLMCall | None]) -> IntermediateStep:
    if step.event_type in _PUSHED_STEPS:
        return _pushed_from_nat(step)
    data = step.data
    payload, text = (data.payload, data.output) if data is not None else (None, None)
    messages = _messages((start.data.input if start is not None and start.data else None) or (data and data.input))
    if step.event_type == IntermediateStepType.LLM_END:
        message = field_of(payload, "message")
        told = field_of(message, "response_metadata") or {}
        text = text if message is None else field_of(message, "content")  # the Toolkit writes tool calls after it
        known = call_of_id(str(told.get("id") or field_of(message, "id") or ""))
        payload = known or {
            "logprobs": told.get("logprobs"),
            MessageKey.FINISH_REASON: told.get("finish_reason"),
            MessageKey.TOKEN_IDS: None,
            MessageKey.PROMPT_TOKEN_IDS: None,
        }
    return _step(step, None, data and StreamEventData.model_construct(input=messages, output=text, payload=payload))


def _pushed_from_nat(step: Any) -> IntermediateStep:
    """A step of the workflow's own, with all that it says."""
    data, metadata = step.data, step.metadata
    kind = TTCEventData if str(step.event_type).startswith("TTC_") else StreamEventData
    details = dict(data) | (data.model_extra or {}) if data is not None else None
    if details is not None:
        details["input"] = _messages(details.get("input"))
    plain = metadata if metadata is None or isinstance(metadata, dict) else metadata.model_dump()
    return _step(step, plain, None if details is None else kind.model_construct(**details))


def _step(step: Any, metadata: dict[str, Any] | None, data: Any) -> IntermediateStep:
    """The Toolkit's step as ours, with this data."""
    given = step.payload
    return IntermediateStep.model_construct(
        parent_id=step.parent_id,
        function_ancestry=InvocationNode.model_construct(**dict(step.function_ancestry)),
        payload=IntermediateStepPayload.model_construct(
            event_type=IntermediateStepType(str(step.event_type)),
            event_timestamp=given.event_timestamp,
            span_event_timestamp=given.span_event_timestamp,
            framework=given.framework and str(given.framework),
            name=given.name,
            tags=given.tags,
            metadata=metadata,
            data=data,
            usage_info=None,
            UUID=given.UUID,
        ),
    )


_LANGCHAIN_ROLES = {"human": "user", "ai": "assistant"}


def _messages(given: Any) -> Any:
    """A chat as OpenAI messages, from those of LangChain; anything else as it is."""
    if not isinstance(given, list):
        return given
    out = []
    for message in given:
        role = field_of(message, "role") or field_of(message, "type")
        if role is None:
            return given
        out.append({"role": _LANGCHAIN_ROLES.get(str(role), str(role)), "content": field_of(message, "content")})
        if field_of(message, "tool_call_id"):
            out[-1]["tool_call_id"] = field_of(message, "tool_call_id")
    return out
