"""The rollouts of one example in one epoch: found by the example's id, with their advantages and what became of the group.

Works on any Epoch, complete or not, whoever's Trainer made it. Showing is left to rollout_view.py and
group_comparison.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .conversation import short
from .errors import RunError
from .metrics import advantages
from .types import Epoch, GroupReason, RolloutFailure, Trajectory

__all__ = ["RolloutGroup", "rollout_group"]


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """One example in one epoch."""

    epoch: int
    example: Any
    trajectories: Sequence[Trajectory]
    """Rollouts that finished, in the collection's order."""
    advantages: Sequence[float]
    """(len(trajectories),) as in metrics.advantages."""
    failures: Sequence[RolloutFailure]
    reason: GroupReason | None
    """Why the group was trained on, or was not; None where no rollout finished, so that there is no group."""
    inferred: bool
    """The reason is concluded from the choice of someone else's Trainer."""

    def generation(self, place: int) -> Any:
        """The generation of the trajectory in that place; "#2" where the record does not say."""
        found = (self.trajectories[place].metadata or {}).get("generation")
        return f"#{place}" if found is None else found

    def best_first(self) -> list[int]:
        """Places of the trajectories, highest reward first, ties in order, those without a reward last."""
        rewards = [trajectory.reward for trajectory in self.trajectories]
        return sorted(range(len(rewards)), key=lambda place: (math.isnan(rewards[place]), -rewards[place]))

    def rollout(self, generation: Any = None) -> int | RolloutFailure:
        """The place of a generation's trajectory, or its failure. None: the best one. Raises RunError."""
        if generation is None:
            return self.best_first()[0] if self.trajectories else self.failures[0]
        for place in range(len(self.trajectories)):
            if _same(self.generation(place), generation):
                return place
        for failure in self.failures:
            if _same(failure.generation, generation):
                return failure
        known = [*map(self.generation, range(len(self.trajectories))), *(f.generation for f in self.failures)]
        raise RunError(
            f"found generation={generation!r}; example {short(self.example, 80)} has the generations "
            f"{_some(known)} in epoch {self.epoch}."
        )


def rollout_group(epoch: Epoch, example: Any = None) -> RolloutGroup:
    """The rollouts of an example. `example`: its id, as it stands in the dataset or as text; None = the one whose rewards
    differ most, as most can be seen there. Raises RunError where the epoch has no such example, or none at all."""
    statistics, failures = epoch.statistics, epoch.collection.failures
    ids = statistics.example_ids
    if not len(ids) and not failures:
        raise RunError(f"epoch {epoch.index} has no rollouts to look at.")
    position: int | None = None
    if example is not None:
        position = next((p for p, known in enumerate(ids) if _same(known, example)), None)
        failed = [failure for failure in failures if _same(failure.example_id, example)]
        if position is None and not failed:
            known = list(dict.fromkeys(map(str, [*ids, *(failure.example_id for failure in failures)])))
            near = difflib.get_close_matches(str(example), known, n=1, cutoff=0.6)
            raise RunError(
                f"found example={short(repr(example), 80)}; epoch {epoch.index} has {_some(known)}."
                + (f" Did you mean {short(near[0], 80)!r}?" if near else "")
            )
        example = ids[position] if position is not None else failed[0].example_id
    elif len(ids):
        spreads = statistics.spreads.tolist()
        position = max(range(len(ids)), key=lambda p: -1.0 if math.isnan(spreads[p]) else spreads[p])
        example = ids[position]
    else:
        example = failures[0].example_id
    mine = [failure for failure in failures if _same(failure.example_id, example)]
    if position is None:
        return RolloutGroup(epoch.index, example, (), (), mine, None, epoch.selection.inferred)
    start, stop = statistics.offsets[position : position + 2].tolist()
    if start == stop and not mine:  # a foreign builder's empty group
        raise RunError(f"example {short(example, 80)} has no rollouts in epoch {epoch.index}.")
    return RolloutGroup(
        epoch=epoch.index,
        example=example,
        trajectories=epoch.collection.trajectories[position],
        advantages=advantages(statistics)[start:stop].tolist(),
        failures=mine,
        reason=epoch.selection.reason_of(position),
        inferred=epoch.selection.inferred,
    )


def _same(known: Any, wanted: Any) -> bool:
    return str(known) == str(wanted)


def _some(values: Iterable[Any], most: int = 12) -> str:
    values = list(values)
    listed = ", ".join(short(value, 40) for value in values[:most])
    return listed + (f", … ({len(values):,} in all)" if len(values) > most else "")
