"""Names of trajectories, such as "e3/q17/2": epoch, example, generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..store.json import decode
from ..store.reader import trajectory_columns
from ..types import Epoch

__all__ = [
    "generations_of",
    "trajectory_names",
]


def generations_of(epoch: Epoch, column: list[Any]) -> list[Any]:
    """Find out which rollout of its group each trajectory is.

    Args:
        epoch: Its record.
        column: (N,) the generations as the file's column has them, which only holds integers.

    Returns:
        (N,) the generations; None where none was recorded.
    """
    if None not in column:
        return column
    texts = trajectory_columns(epoch, ["metadata"]).column("metadata").to_pylist()
    return [None if text is None else decode(text, dict).get("generation") for text in texts]


def trajectory_names(
    epoch: int, examples: Sequence[Any], generations: Sequence[Any], places: Sequence[int]
) -> list[str]:
    """Name rollouts.

    Args:
        epoch: Number of their epoch.
        examples: The example of each.
        generations: The generation of each. None where none was recorded: the place names that rollout.
        places: The place of each in its group.

    Returns:
        The names.
    """
    of_group = [f"#{place}" if known is None else known for known, place in zip(generations, places, strict=True)]
    return [f"e{epoch}/{example}/{name}" for example, name in zip(examples, of_group, strict=True)]
