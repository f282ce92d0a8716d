"""Finds the rollouts of one example in one epoch by its id, with their advantages and whether the group was kept.

Works on any Epoch, complete or not, from any Trainer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RunError
from ..text import short
from ..training.metrics import advantages
from ..types import Epoch, GroupReason, RolloutFailure, Trajectory, same_id

__all__ = [
    "RolloutGroup",
    "rollout_group",
]


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """The rollouts of one example in one epoch."""

    epoch: int
    example: Any
    trajectories: Sequence[Trajectory]
    """Rollouts that finished, in the collection's order."""
    advantages: Sequence[float]
    """One per trajectory: (r - mean) / std within the group; NaN without reward."""
    failures: Sequence[RolloutFailure]
    reason: GroupReason | None
    """Why the group was kept or not; None if no rollout finished, so that there is no group."""
    inferred: bool
    """Whether the reason was inferred from what another Trainer chose."""

    def generation(self, place: int) -> Any:
        """The generation of the trajectory at that position; "#2" if it was not recorded."""
        found = (self.trajectories[place].metadata or {}).get("generation")
        return f"#{place}" if found is None else found

    def best_first(self) -> list[int]:
        """Positions of the trajectories: highest reward first, ties in order, those without a reward last."""
        rewards = [trajectory.reward for trajectory in self.trajectories]
        return sorted(range(len(rewards)), key=lambda place: (math.isnan(rewards[place]), -rewards[place]))

    def finished(self, chosen: int | RolloutFailure) -> Trajectory:
        """The trajectory of what `rollout` found. Raises RunError for a rollout that failed."""
        if isinstance(chosen, int):
            return self.trajectories[chosen]
        raise RunError(
            f"generation {short(chosen.generation, 40)} of example {short(self.example, 80)} failed in epoch {self.epoch} "
            f"({short(chosen.error, 200)}): it has no tokens."
        )

    def rollout(self, generation: Any = None) -> int | RolloutFailure:
        """Find one rollout of the group.

        Args:
            generation: Which one. Default: the best one.

        Returns:
            The position of its trajectory, or its failure.

        Raises:
            RunError: There is no such generation.
        """
        if generation is None:
            return self.best_first()[0] if self.trajectories else self.failures[0]
        known = []
        for place in range(len(self.trajectories)):
            known.append(self.generation(place))
            if same_id(known[-1], generation):
                return place
        for failure in self.failures:
            known.append(failure.generation)
            if same_id(failure.generation, generation):
                return failure
        raise RunError(
            f"found generation={generation!r}; example {short(self.example, 80)} has the generations "
            f"{_some(known)} in epoch {self.epoch}."
        )


def rollout_group(epoch: Epoch, example: Any = None) -> RolloutGroup:
    """Find the rollouts of one example.

    Args:
        epoch: The record of the epoch.
        example: The example's id, as in the dataset or as text. Default: the example whose rewards differ most, as it
            shows the most.

    Returns:
        Its trajectories and failures in that epoch.

    Raises:
        RunError: The epoch has no such example, or no rollouts at all.
    """
    statistics, failures = epoch.statistics, epoch.collection.failures
    if not len(statistics.example_ids) and not failures:
        raise RunError(f"epoch {epoch.index} has no rollouts to look at.")

    position = _widest_group(epoch) if example is None else _position_of(epoch, example)
    if position is not None:
        example = statistics.example_ids[position]
    elif example is None:
        example = failures[0].example_id
    failures_of_it = [failure for failure in failures if same_id(failure.example_id, example)]

    if position is None:
        # Every rollout of the example failed, so the epoch has no group of it.
        if not failures_of_it:
            raise RunError(_unknown_example(epoch, example))
        example = failures_of_it[0].example_id
        return RolloutGroup(epoch.index, example, (), (), failures_of_it, None, epoch.selection.inferred)

    start, stop = statistics.offsets[position : position + 2].tolist()
    if start == stop and not failures_of_it:
        # A third-party builder may leave an empty group.
        raise RunError(f"example {short(example, 80)} has no rollouts in epoch {epoch.index}.")
    return RolloutGroup(
        epoch=epoch.index,
        example=example,
        trajectories=epoch.collection.trajectories[position],
        advantages=advantages(statistics)[start:stop].tolist(),
        failures=failures_of_it,
        reason=epoch.selection.reason_of(position),
        inferred=epoch.selection.inferred,
    )


def _widest_group(epoch: Epoch) -> int | None:
    """The position of the group whose rewards differ most; None if the epoch has no group."""
    spreads = epoch.statistics.spreads.tolist()
    if not spreads:
        return None
    # An unknown spread ranks below a spread of 0.
    return max(range(len(spreads)), key=lambda position: -1.0 if math.isnan(spreads[position]) else spreads[position])


def _position_of(epoch: Epoch, example: Any) -> int | None:
    """The position of the example's group; None if it has none."""
    for position, known in enumerate(epoch.statistics.example_ids):
        if same_id(known, example):
            return position
    return None


def _unknown_example(epoch: Epoch, example: Any) -> str:
    failed = [failure.example_id for failure in epoch.collection.failures]
    known = list(dict.fromkeys(map(str, [*epoch.statistics.example_ids, *failed])))
    message = f"found example={short(repr(example), 80)}; epoch {epoch.index} has {_some(known)}."
    near = difflib.get_close_matches(str(example), known, n=1, cutoff=0.6)
    if near:
        message += f" Did you mean {short(near[0], 80)!r}?"
    return message


def _some(values: Iterable[Any], most: int = 12) -> str:
    values = list(values)
    listed = ", ".join(short(value, 40) for value in values[:most])
    return listed + (f", … ({len(values):,} in all)" if len(values) > most else "")
