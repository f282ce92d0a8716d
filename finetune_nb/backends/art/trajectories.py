"""Trajectories as ART's own types. Sampled tokens travel as `token_id:N`, which ART takes as they are; text is not tokenized
again.
"""

from __future__ import annotations

import json
import math
from typing import Any

from ...errors import BackendError, MissingLogprobs
from ...hooks import resolve
from ...rollouts.episodes import SampledTurn
from ...training.batch import LARGEST_ADVANTAGE
from ...types import DPOItem, EpisodeItem, EpisodeItemRole, MessageKey, Trajectory, TrajectoryCollection, chat_fields
from .job import is_number

__all__ = [
    "art_groups",
]

_ROLES = {EpisodeItemRole.ENVIRONMENT: "user", EpisodeItemRole.OTHER: "user"}
"""Roles that no chat template knows."""


def art_groups(collection: TrajectoryCollection) -> list[Any]:
    """Groups of trajectories as art.TrajectoryGroups. Rollouts without a reward are left out. Raises BackendError or
    MissingLogprobs for a sampled turn without exact ids."""
    group_of = resolve("art:TrajectoryGroup")
    groups = []
    for group in collection.trajectories:
        made = [_art_trajectory(trajectory) for trajectory in group if math.isfinite(trajectory.reward)]
        if made:
            groups.append(group_of(made))
    return groups


def _art_trajectory(trajectory: Trajectory) -> Any:
    metadata = trajectory.metadata or {}
    where = f"example {metadata.get('id')!r}, generation {metadata.get('generation')}"
    conversations: dict[int, list[Any]] = {}
    for turn, item in enumerate(trajectory.episode):
        if isinstance(item, DPOItem):
            raise BackendError(
                f"{where} is a preference (DPOItem); expected an episode of EpisodeItems with a reward. Use a backend that "
                "learns from preferences."
            )
        place = (item.metadata or {}).get(MessageKey.CONVERSATION, 0)
        conversations.setdefault(place, []).append(_message(item, f"turn {turn} of {where}"))
    first, *others = conversations.values()
    if abs(trajectory.reward) > LARGEST_ADVANTAGE:  # ART computes the advantages itself
        raise BackendError(
            f"{where} has the reward {trajectory.reward:.3g}; expected at most {LARGEST_ADVANTAGE:.0e} in size, which is all "
            "that a float32 loss can take. Bound the reward function."
        )
    tools = metadata.get("tools")
    version = metadata.get("policy_version")
    history = resolve("art.trajectories:History")
    return resolve("art:Trajectory")(
        messages_and_choices=first,
        tools=tools,
        additional_histories=[history(messages_and_choices=other, tools=tools) for other in others],
        reward=trajectory.reward,
        initial_policy_version=version,
        final_policy_version=version,
        metrics={k: v for k, v in (metadata.get("scores") or {}).items() if is_number(v)},
        metadata={k: v for k, v in metadata.items() if isinstance(v, str | int | float | bool) and k != "reasoning"},
    )


def _message(item: EpisodeItem, where: str) -> Any:
    """A plain message; of a turn that the policy sampled, a Choice with the sampled ids."""
    message: dict[str, Any] = {"role": _ROLES.get(item.role, str(item.role.value)), "content": item.content}
    message |= chat_fields(item.metadata)
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    turn = SampledTurn.of(item)
    if turn is None:
        return message
    from openai.types.chat.chat_completion import Choice

    values, ids, texts = turn.logprobs, turn.ids, turn.tokens or []
    if values is None:
        raise MissingLogprobs(f"{where} has no logprobs, so it cannot be trained on.")
    if ids is None or len(ids) != len(values):
        raise BackendError(
            f"{where} has {len(values)} logprobs and {'no' if ids is None else len(ids)} token_ids; expected one id for each. "
            "Text is not tokenized again, as that can give other tokens than were sampled: sample from a server that "
            "returns token ids (vLLM: return_token_ids)."
        )
    content = [
        {
            "token": f"token_id:{token}",
            "bytes": list((texts[i] if i < len(texts) else "").encode()),
            "logprob": value,
            "top_logprobs": [],
        }
        for i, (token, value) in enumerate(zip(ids, values, strict=True))
    ]
    reason = turn.finish_reason
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": reason if reason in ("stop", "length", "tool_calls", "content_filter") else "stop",
            "logprobs": {"content": content, "refusal": None},
            "message": message,
        }
    )


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """In OpenAI's form, whose arguments are a JSON text."""
    function = call.get("function") or {"name": call.get("name"), "arguments": call.get("args")}
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    function = {**function, "arguments": text}
    return {"id": str(call.get("id") or function.get("name")), "type": "function", "function": function}
