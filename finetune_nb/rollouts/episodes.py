"""Recorded model calls -> the messages of an episode, with the ids and logprobs that training needs.

Calls that carry one conversation on become one sequence of messages; a call that starts anew begins another one after it
(the metadata's `conversation` counts them). Each sampled turn keeps its own prompt ids, so it can be trained on exactly
whatever is around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MissingLogprobs
from ..llms.chat_messages import content_text, field_of, same_message
from ..types import (
    DPOItem,
    EpisodeItem,
    EpisodeItemRole,
    EvalInputItem,
    IntermediateStep,
    IntermediateStepType,
    LLMCall,
    MessageKey,
    SamplingParams,
    Trajectory,
    as_float,
    chat_fields,
    is_model_call,
    is_sampled,
    logprob_values,
    readable_logprobs,
)

__all__ = [
    "SampledTurn",
    "drift",
    "episode_from_steps",
    "is_sampled",
    "recorded_entropies",
    "sampled_turns",
    "tools_from_calls",
]

_ROLES = {
    **{role.value: role for role in EpisodeItemRole},
    "human": EpisodeItemRole.USER,
    "ai": EpisodeItemRole.ASSISTANT,
}


def episode_from_steps(
    steps: Sequence[IntermediateStep],
    target_functions: Sequence[str] | None = None,
    target_model: str | None = None,
    include_tool_calls: bool = True,
) -> tuple[list[EpisodeItem], int | None]:
    """The episode of one finished rollout, which is the main work of a builder's `finalize`.

        episode, version = ft.episode_from_steps(item.trajectory)
        metadata = {"id": item.id, "generation": 0, "policy_version": version}
        ft.Trajectory(episode=episode, reward=reward, metadata=metadata)

    Args:
        steps: What the rollout recorded: the `trajectory` of an EvalInputItem. Only its model calls count.
        target_functions: Functions whose calls count, as in `finetuning.target_functions`. Default: all.
        target_model: The model whose calls count, as in `finetuning.target_model`. Default: all.
        include_tool_calls: Whether messages of tools are part of it.

    Returns:
        The messages, in order, each sampled one with its ids and logprobs; and the oldest policy version that sampled one of
        them, None where that is not known.

    Raises:
        ValueError: No model call is left, so there is nothing to train on.
        MissingLogprobs: A message was sampled without logprobs.
    """
    calls = [
        call
        for step in steps
        if is_model_call(step, target_functions, target_model) and (call := call_from_step(step)) is not None
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
            turn.metadata[MessageKey.DRIFTED] = True  # type: ignore[index]  # a sampled turn has metadata
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
    assistant, token_ids = EpisodeItemRole.ASSISTANT, MessageKey.TOKEN_IDS
    for trajectory in trajectories:
        seen: set[int] = set()
        for item in trajectory.episode:
            known = getattr(item, "metadata", None)  # a preference has none
            ids = known.get(token_ids) if known else None
            if isinstance(ids, list | tuple) and ids and item.role == assistant:  # type: ignore[union-attr]
                conversation = known.get(MessageKey.CONVERSATION, 0)  # type: ignore[union-attr]
                if not isinstance(conversation, int):  # somebody else's
                    conversation = 0
                carried += conversation in seen
                drifted += known.get(MessageKey.DRIFTED, False) is True  # type: ignore[union-attr]
                seen.add(conversation)
    return carried, drifted


def tools_from_calls(item: EvalInputItem) -> list[dict[str, Any]] | None:
    """The tools that the model was told of, as OpenAI schemas: those of the first call that had any."""
    calls = (call_from_step(step) for step in item.trajectory if step.event_type == IntermediateStepType.LLM_END)
    return next((call.tools for call in calls if call is not None and call.tools), None)


def call_from_step(step: IntermediateStep) -> LLMCall | None:
    """The recorded call of a step. Steps that someone else recorded are read as far as they go: messages from the input,
    text from the output, logprobs from the payload's `logprobs` or `response_metadata`."""
    data = step.data
    if data is None or isinstance(data.payload, LLMCall):
        return data and data.payload
    messages = data.input if isinstance(data.input, list) else [{"role": "user", "content": content_text(data.input)}]
    if not all(isinstance(message, Mapping) and "role" in message for message in messages):
        messages = [{"role": "user", "content": content_text(data.input)}]
    payload = data.payload
    logprobs = field_of(payload, "logprobs") or field_of(field_of(payload, "response_metadata"), "logprobs")
    return LLMCall(
        episode=None,
        sequence=0,
        model=step.name or "",
        messages=[dict(message) for message in messages],
        tools=None,
        reply={"role": "assistant", "content": content_text(data.output)},
        prompt_ids=field_of(payload, MessageKey.PROMPT_TOKEN_IDS),
        response_ids=field_of(payload, MessageKey.TOKEN_IDS),
        tokens=None,
        logprobs=logprob_values(logprobs),
        finish_reason=field_of(payload, MessageKey.FINISH_REASON),
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
    metadata = chat_fields(message)
    if message.get(MessageKey.REASONING_CONTENT):
        metadata[MessageKey.REASONING_CONTENT] = message[MessageKey.REASONING_CONTENT]
    if conversation:
        metadata[MessageKey.CONVERSATION] = conversation
    return EpisodeItem(
        role=role,
        content=content_text(message.get("content")),
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
        MessageKey.FINISH_REASON: call.finish_reason,
        MessageKey.TEMPERATURE: call.sampling.temperature,
        MessageKey.SECONDS: call.seconds,
    }
    if call.response_ids is not None:
        metadata[MessageKey.TOKEN_IDS] = call.response_ids
        metadata[MessageKey.PROMPT_TOKEN_IDS] = call.prompt_ids
        metadata[MessageKey.EXACT] = call.exact
    if call.tokens is not None:
        metadata[MessageKey.TOKENS] = call.tokens
    if call.top_logprobs is not None:
        metadata[MessageKey.TOP_LOGPROBS] = call.top_logprobs
    if call.entropies is not None:
        metadata[MessageKey.ENTROPIES] = call.entropies
    if call.ignored:
        metadata[MessageKey.IGNORED] = list(call.ignored)
    for key in (MessageKey.TOOL_CALLS, MessageKey.REASONING_CONTENT):
        if call.reply.get(key):
            metadata[key] = call.reply[key]
    if conversation:
        metadata[MessageKey.CONVERSATION] = conversation
    return EpisodeItem(
        role=EpisodeItemRole.ASSISTANT,
        content=content_text(call.reply.get("content")),
        logprobs=call.logprobs,
        metadata=metadata,
    )


def recorded_entropies(trajectory: Trajectory) -> Iterator[list[float]]:
    """The entropies of each turn that has them, see `MessageKey.ENTROPIES`. Of a record that somebody else made, only those
    that are finite numbers; never raises."""
    for item in trajectory.episode:
        known = getattr(item, "metadata", None)  # a preference has none
        found = known.get(MessageKey.ENTROPIES) if known else None
        if type(found) is list and found:
            if set(map(type, found)) != {float} or not math.isfinite(sum(found)):
                found = [value for value in map(as_float, found) if math.isfinite(value)]
            yield found


def sampled_turns(trajectory: Trajectory) -> list[int]:
    """Positions in the episode of the turns that the policy sampled."""
    return [position for position, item in enumerate(trajectory.episode) if is_sampled(item)]


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """A turn that the policy sampled, as its record has it. T is the number of sampled tokens; None is not recorded.

    Values are handed over as they were recorded. Episodes made here have the types below; a trajectory that somebody else
    made may hold anything.
    """

    ids: list[int] | None
    """(T,) what was sampled, in the policy's vocabulary."""
    prompt_ids: list[int] | None
    """The prompt that it was sampled after."""
    tokens: list[str] | None
    """(T,) the text of each token."""
    logprobs: list[float] | None
    """(T,) natural logarithm of each token's probability at `temperature`; None also where nobody can read them."""
    alternatives: list[dict[str, float]] | None
    """(T,) the likeliest tokens in each place, text -> natural logprob."""
    entropies: list[float] | None
    """(T,) the policy's entropy in each place, in nats, at temperature 1."""
    temperature: float | None
    """At which it was sampled; 0 is greedy, with logprobs as at 1."""
    finish_reason: str | None
    """Why it ended: "stop", "length" (cut at the token limit), "tool_calls", ..."""
    seconds: float | None
    """That the model call took; in a batch, with the time that it waited for the others."""
    exact: bool | None
    """Whether the ids are those that the model saw and sampled, not those of a text that was tokenized again."""
    drifted: bool
    """The prompt does not begin with the ids of the turn before."""
    conversation: int
    """Which conversation of the episode it belongs to, from 0."""
    tool_calls: list[dict[str, Any]]
    """The tools that it calls, as OpenAI has them."""
    reasoning: str | None
    """What the model thought before its answer, if the record has it apart."""

    @classmethod
    def of(cls, item: EpisodeItem | DPOItem) -> SampledTurn | None:
        """What the record says of a message that the policy sampled; None for any other message. Never raises."""
        if not is_sampled(item):
            return None
        assert isinstance(item, EpisodeItem)
        get = (item.metadata or {}).get
        return cls(
            ids=get(MessageKey.TOKEN_IDS),
            prompt_ids=get(MessageKey.PROMPT_TOKEN_IDS),
            tokens=get(MessageKey.TOKENS),
            logprobs=readable_logprobs(item.logprobs),
            alternatives=get(MessageKey.TOP_LOGPROBS),
            entropies=get(MessageKey.ENTROPIES),
            temperature=get(MessageKey.TEMPERATURE),
            finish_reason=get(MessageKey.FINISH_REASON),
            seconds=get(MessageKey.SECONDS),
            exact=get(MessageKey.EXACT),
            drifted=bool(get(MessageKey.DRIFTED)),
            conversation=get(MessageKey.CONVERSATION) or 0,
            tool_calls=get(MessageKey.TOOL_CALLS) or [],
            reasoning=get(MessageKey.REASONING_CONTENT),
        )
