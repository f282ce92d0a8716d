"""The way back: the rows of a table (trajectory_table.py) as trajectories and failures.

The table may come from anybody: a value that does not fit is a ValueError, and no other code than ours ever runs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .stored_json import decode, decode_steps, encode
from .trajectory_table import COLUMNS, PREFERENCE
from .types import DPOItem, EpisodeItem, EpisodeItemRole, RolloutFailure, Trajectory, TrajectoryCollection

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["collection_of"]


def collection_of(table: pa.Table, run_id: str, groups: int | None) -> TrajectoryCollection:
    """The trajectories and failures of a table whose columns are those of COLUMNS.

    groups: how many there were, empty ones too; None: by example, in the order in which they first appear.
    Raises ValueError where a value does not fit.
    """
    if groups is not None and not 0 <= groups <= len(table) + _EMPTY_GROUPS:
        raise ValueError(f"{groups} groups for {len(table)} rows")
    columns = {name: _pythonic(table.column(name).combine_chunks()) for name in COLUMNS if name not in _DERIVED}
    out: list[list[Trajectory]] = [[] for _ in range(groups or 0)]
    by_example: dict[str, list[Trajectory]] = {}
    failures: list[RolloutFailure] = []
    messages = list(zip(*(columns[name] for name in _OF_MESSAGES), strict=True))
    alone = zip(*(columns[name] for name in _OF_ROWS), strict=True)
    for (kind, group, reward, shaped, metadata, steps), lists in zip(alone, messages, strict=True):
        if kind == "failure":
            known = decode(metadata, dict)
            example, generation, error = known["id"], known["generation"], known["error"]
            if type(generation) is not int or not isinstance(error, str):
                raise ValueError("a failure without generation or error")
            failures.append(RolloutFailure(example, generation, error, decode_steps(steps)))
            continue
        known = None if metadata is None else decode(metadata, dict)
        if kind != "trajectory" or reward is None or None in lists or len({len(values) for values in lists}) != 1:
            raise ValueError("a row that is neither a trajectory nor a failure")
        trajectory = Trajectory.model_construct(
            episode=[_item(*values) for values in zip(*lists, strict=True)],
            reward=reward,
            shaped_rewards=shaped,
            metadata=known,
        )
        if groups is None:
            by_example.setdefault(encode((known or {}).get("id")), []).append(trajectory)
        elif group is None or not 0 <= group < groups:
            raise ValueError(f"group {group} of {groups}")
        else:
            out[group].append(trajectory)
    trajectories = list(by_example.values()) if groups is None else out
    return TrajectoryCollection.model_construct(trajectories=trajectories, run_id=run_id, failures=failures)


_EMPTY_GROUPS = 100_000
"""More of them than that are no record but an attack on the memory."""
_OF_ROWS = ("kind", "group", "reward", "shaped_rewards", "metadata", "steps")
_OF_MESSAGES = (
    "roles",
    "contents",
    "logprobs",
    "token_ids",
    "token_texts",
    "prompt_token_ids",
    "item_metadata",
    "others",
)
_DERIVED = COLUMNS.keys() - {*_OF_ROWS, *_OF_MESSAGES}
"""Columns that repeat what stands in others, for those who read the file with other tools."""
_ROLES = {str(role): role for role in EpisodeItemRole}


def _item(
    role: Any, content: Any, logprobs: Any, ids: Any, texts: Any, prompt_ids: Any, metadata: Any, others: Any
) -> Any:
    other = {} if others is None else decode(others, dict)
    if role == PREFERENCE:
        return DPOItem.model_validate(other.get(PREFERENCE))
    content = other.get("content", content)
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(f"a message of role {role!r}")
    found = None if metadata is None else decode(metadata, dict)
    for name, value in (("token_ids", ids), ("tokens", texts), ("prompt_token_ids", prompt_ids)):
        if value is not None:
            found = {} if found is None else found
            found[name] = value
    logprobs = other.get("logprobs") if logprobs is None else logprobs
    return EpisodeItem.model_construct(role=_ROLES[role], content=content, logprobs=logprobs, metadata=found)


def _pythonic(array: Any) -> list[Any]:
    """Like to_pylist, which makes an object of Arrow's for every token on the way."""
    import pyarrow as pa

    if pa.types.is_list(array.type):
        entries = _pythonic(array.values)
        offsets = array.offsets.to_pylist()
        parts = [entries[start:stop] for start, stop in pairwise(offsets)]
        if array.null_count:
            parts = [part if there else None for part, there in zip(parts, array.is_valid().to_pylist(), strict=True)]
        return parts
    if array.null_count == 0 and (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        return array.to_numpy().tolist()
    if pa.types.is_integer(array.type) and array.null_count == len(array):
        return [None] * len(array)
    return array.to_pylist()
