"""Recorded model calls -> the messages of an episode, with the ids and logprobs that training needs.

Calls that carry one conversation on become one sequence of messages; a call that starts anew begins another one behind it
(`metadata["conversation"]` counts them). Each sampled turn keeps its own prompt ids, so it can be trained on exactly
whatever stands around it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import MissingLogprobs
from ..types import (
    DPOItem,
    EpisodeItem,
    EpisodeItemRole,
    EvalInputItem,
    IntermediateStep,
    IntermediateStepType,
    LLMCall,
    SamplingParams,
    Trajectory,
    logprob_values,
    plain_content,
    same_message,
)

__all__ = [
    "drift",
    "episode_of",
    "is_sampled",
    "sampled_turns",
    "tools_of",
]

_ROLES = {
    **{role.value: role for role in EpisodeItemRole},
    "human": EpisodeItemRole.USER,
    "ai": EpisodeItemRole.ASSISTANT,
}


def episode_of(
    item: EvalInputItem,
    target_functions: Sequence[str] | None = None,
    target_model: str | None = None,
    include_tool_calls: bool = True,
) -> tuple[list[EpisodeItem], int | None]:
    """The episode of one finished rollout, and the oldest policy version that sampled in it.

    Steps of other functions or models than the targets are left out. Raises ValueError where nothing is left that could
    be trained on, MissingLogprobs where a sampled turn has no logprobs.
    """
    calls = [
        call
        for step in item.trajectory
        if step.event_type == IntermediateStepType.LLM_END
        and (target_functions is None or step.function_ancestry.function_name in target_functions)
        and (call := call_of(step)) is not None
        and (target_model is None or target_model in (call.model, step.name))
    ]
    if not calls:
        targets = f" to {target_model!r}" if target_model else ""
        raise ValueError(f"the workflow made no model call{targets}: there is nothing to train on")
    episode: list[EpisodeItem] = []
    so_far: list[dict[str, Any]] = []
    conversation = 0
    ids_so_far: list[int] = []
    for call in calls:
        known = len(so_far)
        if not _carries_on(so_far, call.messages):
            conversation, known = conversation + bool(so_far), 0
        episode += [_context(message, conversation) for message in call.messages[known:]]
        episode.append(turn := _sampled(call, conversation))
        ids = call.prompt_ids or []
        if known and ids_so_far and ids and ids[: len(ids_so_far)] != ids_so_far:
            turn.metadata["drifted"] = True  # type: ignore[index]  # a sampled turn has metadata
        so_far, ids_so_far = [*call.messages, call.reply], [*ids, *(call.response_ids or ())]
    if not include_tool_calls:
        episode = [item for item in episode if item.role not in (EpisodeItemRole.TOOL, EpisodeItemRole.FUNCTION)]
    versions = [call.policy_version for call in calls if call.policy_version is not None]
    return episode, min(versions, default=None)


def drift(trajectories: Iterable[Trajectory]) -> tuple[int, int]:
    """How many sampled turns carry a conversation on, and how many of these have drifted: their prompt does not begin with
    the ids of the turn before, because the conversation was rendered or tokenized anew. Training then learns from such a
    turn as from a conversation of its own."""
    carried = drifted = 0
    for trajectory in trajectories:
        seen: set[int] = set()
        for item in trajectory.episode:
            known = item.metadata if isinstance(item, EpisodeItem) and item.role == EpisodeItemRole.ASSISTANT else None
            if known and known.get("token_ids"):
                conversation = known.get("conversation", 0)
                carried += conversation in seen
                drifted += known.get("drifted", False)
                seen.add(conversation)
    return carried, drifted


def tools_of(item: EvalInputItem) -> list[dict[str, Any]] | None:
    """The tools that the model was told of, as OpenAI schemas: those of the first call that had any."""
    calls = (call_of(step) for step in item.trajectory if step.event_type == IntermediateStepType.LLM_END)
    return next((call.tools for call in calls if call is not None and call.tools), None)


def call_of(step: IntermediateStep) -> LLMCall | None:
    """The recorded call of a step. Steps that someone else recorded are read as far as they go: messages from the input,
    text from the output, logprobs from the payload's `logprobs` or `response_metadata`."""
    data = step.data
    if data is None or isinstance(data.payload, LLMCall):
        return data and data.payload
    messages = data.input if isinstance(data.input, list) else [{"role": "user", "content": _text(data.input)}]
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        messages = [{"role": "user", "content": _text(data.input)}]
    payload = data.payload
    logprobs = _get(payload, "logprobs") or _get(_get(payload, "response_metadata"), "logprobs")
    return LLMCall(
        episode=None,
        sequence=0,
        model=step.name or "",
        messages=[dict(message) for message in messages],
        tools=None,
        reply={"role": "assistant", "content": _text(data.output)},
        prompt_ids=_get(payload, "prompt_token_ids"),
        response_ids=_get(payload, "token_ids"),
        tokens=None,
        logprobs=logprob_values(logprobs),
        finish_reason=_get(payload, "finish_reason"),
        policy_version=None,
        sampling=SamplingParams(),
        seconds=float("nan"),
        exact=False,
    )


def _carries_on(so_far: list[dict[str, Any]], messages: list[dict[str, Any]]) -> bool:
    if not so_far or len(messages) < len(so_far):
        return False
    return all(same_message(a, b) for a, b in zip(so_far, messages, strict=False))


def _context(message: Mapping[str, Any], conversation: int) -> EpisodeItem:
    """A message that the policy did not sample: an assistant turn among them is masked by `logprobs=[]`."""
    role = _ROLES.get(str(message.get("role")), EpisodeItemRole.OTHER)
    metadata = {
        key: message[key] for key in ("tool_calls", "tool_call_id", "name", "reasoning_content") if message.get(key)
    }
    if conversation:
        metadata["conversation"] = conversation
    return EpisodeItem(
        role=role,
        content=_text(message.get("content")),
        logprobs=[] if role == EpisodeItemRole.ASSISTANT else None,
        metadata=metadata or None,
    )


def _sampled(call: LLMCall, conversation: int) -> EpisodeItem:
    if call.logprobs is None:
        raise MissingLogprobs(
            f"turn {call.sequence} of model {call.model!r} was sampled without logprobs, so it cannot be trained on. "
            "Ask the server for logprobs, or leave this model out with finetuning.target_model."
        )
    metadata: dict[str, Any] = {
        "finish_reason": call.finish_reason,
        "temperature": call.sampling.temperature,
        "seconds": call.seconds,
    }
    if call.response_ids is not None:
        metadata |= {"token_ids": call.response_ids, "prompt_token_ids": call.prompt_ids, "exact": call.exact}
    if call.tokens is not None:
        metadata["tokens"] = call.tokens
    if call.top_logprobs is not None:
        metadata["top_logprobs"] = call.top_logprobs
    metadata |= {key: call.reply[key] for key in ("tool_calls", "reasoning_content") if call.reply.get(key)}
    if conversation:
        metadata["conversation"] = conversation
    return EpisodeItem(
        role=EpisodeItemRole.ASSISTANT,
        content=_text(call.reply.get("content")),
        logprobs=call.logprobs,
        metadata=metadata,
    )


def _text(content: Any) -> str:
    content = plain_content(content)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def is_sampled(item: EpisodeItem | DPOItem) -> bool:
    """Whether it is a turn that the policy sampled: an assistant's, but for those without a logprob (`logprobs == []`)."""
    if not isinstance(item, EpisodeItem) or item.role != EpisodeItemRole.ASSISTANT:
        return False
    return item.logprobs != [] if isinstance(item.logprobs, list | None) else logprob_values(item.logprobs) != []


def sampled_turns(trajectory: Trajectory) -> list[int]:
    """Positions in the episode of the turns that the policy sampled."""
    return [position for position, item in enumerate(trajectory.episode) if is_sampled(item)]
