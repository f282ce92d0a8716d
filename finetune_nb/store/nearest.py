"""Rollouts that were made without pydantic's checks, as the nearest to them that can be stored and read again.

What is lost by it is noted by the name of the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from ..redaction import redact_text
from ..types import DPOItem, EpisodeItem, EpisodeItemRole, Trajectory
from .json import FAILED, attempt, note_replaced, plain, short_text, type_name

__all__ = [
    "ROLES",
    "all_of",
    "is_whole",
    "known_items",
    "known_number",
    "known_numbers",
    "known_trajectories",
    "preference",
    "stored_text",
]

ROLES = {str(role): role for role in EpisodeItemRole}


def known_trajectories(trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
    """The trajectories; in place of one that was made without pydantic's checks and is not what it should be, the nearest to
    it that can be stored."""
    # Nearly always they are what they should be, which takes a fraction of the time to see in columns.
    metadata, episodes = [each.metadata for each in trajectories], [each.episode for each in trajectories]
    if all_of({dict, type(None)}, metadata) and all_of({list}, episodes):
        return trajectories
    return [_known_trajectory(each) for each in trajectories]


def _known_trajectory(trajectory: Trajectory) -> Trajectory:
    metadata, episode = trajectory.metadata, trajectory.episode
    if (metadata is None or type(metadata) is dict) and type(episode) is list:
        return trajectory
    found = plain(metadata, "metadata")
    if not isinstance(found, dict):
        note_replaced("metadata", type_name(metadata))
        found = {"metadata": found}
    messages = list(episode) if isinstance(episode, list | tuple) else [episode]
    return Trajectory.model_construct(
        episode=messages, reward=trajectory.reward, shaped_rewards=trajectory.shaped_rewards, metadata=found
    )


def known_items(items: Sequence[Any]) -> Sequence[EpisodeItem | DPOItem]:
    """The same of messages."""
    if all_of({EpisodeItem}, items):
        roles, contents = [item.role for item in items], [item.content for item in items]
        metadata = [item.metadata for item in items]
        if all_of({EpisodeItemRole}, roles) and all_of({str}, contents) and all_of({dict, type(None)}, metadata):
            return items
    return [_known_item(item) for item in items]


def _known_item(item: Any) -> EpisodeItem | DPOItem:
    if isinstance(item, EpisodeItem):
        metadata = item.metadata
        is_metadata = metadata is None or type(metadata) is dict
        if is_metadata and isinstance(item.content, str) and isinstance(item.role, str) and item.role in ROLES:
            return item
    elif isinstance(item, DPOItem):
        if attempt(preference, item) is not FAILED:
            return item
    note_replaced("messages", type_name(item))
    content, metadata = getattr(item, "content", item), plain(getattr(item, "metadata", None), "item_metadata")
    role = getattr(item, "role", None)
    return EpisodeItem.model_construct(
        role=ROLES[role] if isinstance(role, str) and role in ROLES else EpisodeItemRole.OTHER,
        content=content if isinstance(content, str) else stored_text(content),
        logprobs=getattr(item, "logprobs", None),
        metadata=metadata if metadata is None or isinstance(metadata, dict) else {"metadata": metadata},
    )


def preference(item: DPOItem) -> dict[str, Any]:
    """A preference as plain data that can be read again; else raises anything."""
    found = plain(item, "messages")
    DPOItem.model_validate(found)
    return found


def known_number(value: Any, field: str) -> float:
    """NaN for what is no number, which is noted."""
    found = attempt(float, value)
    if found is FAILED:
        note_replaced(field, type_name(value))
        return math.nan
    return found


def known_numbers(values: Any, field: str) -> list[float] | None:
    if values is None:
        return None
    found = attempt(list, values)
    if found is FAILED:
        note_replaced(field, type_name(values))
        return None
    return [known_number(each, field) for each in found]


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, Python's or numpy's. Never raises."""
    return attempt(lambda value: isinstance(value, Integral) and not isinstance(value, bool), value) is True


def all_of(kinds: set[type], values: Iterable[Any]) -> bool:
    """Whether the values are of these very types. Never raises."""
    return attempt(lambda values: kinds.issuperset(map(type, values)), values) is True


def stored_text(value: Any) -> str:
    """A value as a text to read and to group by, without secrets. Never raises."""
    text = value if isinstance(value, str) else attempt(str, value)
    return redact_text(short_text(value) if text is FAILED else str.__str__(text))
