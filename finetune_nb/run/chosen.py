"""Rollouts that somebody chose by name, to be trained on: as they are, or as preferences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..rollouts.preferences import Pairing, preference_pairs
from ..text import count, plain, short
from ..types import Epoch, Trajectory, TrajectoryCollection
from .labelling import names_in

if TYPE_CHECKING:
    from ..rewards.labels import Tags

__all__ = [
    "chosen_rollouts",
    "preferences",
    "values_in",
]


def chosen_rollouts(names: Iterable[str], epoch_of: Callable[[int], Epoch], run_id: str) -> TrajectoryCollection:
    """Put recorded rollouts together, one group an example.

    Args:
        names: The rollouts, such as "e3/q17/2".
        epoch_of: Returns an epoch's record by its number; raises IndexError where there is none.
        run_id: Of the run.

    Returns:
        Copies of their trajectories, numbered anew within their groups; `metadata["chosen_from"]` is the name of each.

    Raises:
        RunError: A name is none, or one of a group, an epoch or a failed rollout.
    """
    groups: dict[str, list[Trajectory]] = {}
    for name, trajectory in _trajectories(names, epoch_of):
        group = groups.setdefault(plain((trajectory.metadata or {}).get("id")), [])
        metadata = {**(trajectory.metadata or {}), "generation": len(group), "chosen_from": name}
        group.append(trajectory.model_copy(update={"metadata": metadata}))
    return TrajectoryCollection(trajectories=list(groups.values()), run_id=run_id)


def preferences(
    values: dict[str, float],
    epoch_of: Callable[[int], Epoch],
    run_id: str,
    pairs: Pairing = "best_worst",
    max_pairs: int = 8,
) -> TrajectoryCollection:
    """Make preferences of recorded rollouts: of two of one example, also of two epochs, the one with the higher value is chosen.

    Args:
        values: What each rollout is worth, by its name.
        epoch_of: As in `chosen_rollouts`.
        run_id: Of the run.
        pairs: "best_worst" or "all_pairs", as in `preference_pairs`.
        max_pairs: Most pairs of one example.

    Returns:
        One trajectory a pair, which holds a DPOItem; its reward is the difference. `metadata` names both rollouts.

    Raises:
        RunError: A name is none, or one of a group, an epoch or a failed rollout; or there is no pair.
    """
    chosen = chosen_rollouts(values, epoch_of, run_id)
    groups = []
    for group in chosen.trajectories:
        valued = []
        for trajectory in group:
            name = (trajectory.metadata or {})["chosen_from"]
            valued.append(trajectory.model_copy(update={"reward": values[name]}))
        found = preference_pairs(valued, pairs, max_pairs=max_pairs)
        for pair in found:
            metadata = pair.metadata or {}
            for side, generation in (("chosen", metadata["generation"]), ("rejected", metadata["rejected_generation"])):
                metadata[side] = (group[generation].metadata or {})["chosen_from"]
        if found:
            groups.append(found)
    if not groups:
        raise RunError(
            f"{count(len(values), 'rollout')} of {count(len(chosen.trajectories), 'example')} make no preference. A pair is two "
            "rollouts of one example, one of which is worth more, that part at a turn of the policy. Label more rollouts of the "
            "same example."
        )
    return TrajectoryCollection(trajectories=groups, run_id=run_id)


def values_in(frame: Any, tags: Tags | None = None) -> dict[str, float]:
    """What each rollout is worth, by its name.

    Args:
        frame: `run.labels()` or some of its rows; a mapping from names to numbers; or a frame with the columns `trajectory` and
            `label` or `reward`.
        tags: Which labels count, as in `label_reward`.

    Raises:
        ConfigError: It is none of these.
    """
    from ..analysis.agreement import labels_of

    columns = getattr(frame, "columns", ())
    if "trajectory" in columns and "label" not in columns and "reward" in columns and tags is None:
        frame = {
            name: reward for name, reward in zip(frame["trajectory"], frame["reward"], strict=True) if reward == reward
        }
    return {name: value for name, value in labels_of(frame, tags).items() if math.isfinite(value)}


def _trajectories(names: Iterable[str], epoch_of: Callable[[int], Epoch]) -> Sequence[tuple[str, Trajectory]]:
    """The record of each rollout, with the name as it was given."""
    from ..frames.names import find_names
    from ..frames.trajectories import EpochColumns

    names = names_in(names)
    found = find_names(names, epoch_of)
    by_epoch: dict[int, dict[str, Trajectory]] = {}
    for one in found:
        if one.generation is None:
            what = "an epoch" if one.example is None else "a group"
            raise RunError(
                f"{short(one.name, 80)!r} is the name of {what}; expected names of rollouts, such as 'e3/q17/2'."
            )
        if one.epoch not in by_epoch:
            columns, epoch = EpochColumns(epoch_of(one.epoch)), epoch_of(one.epoch)
            named = columns.named(columns.generations(columns.values(["generation"])["generation"]))
            every = [trajectory for group in epoch.collection.trajectories for trajectory in group]
            by_epoch[one.epoch] = dict(zip(map(plain, named), every, strict=False))  # failures come last
    if failed := [one.name for one in found if one.name not in by_epoch[one.epoch]]:
        raise RunError(f"{short(failed[0], 80)!r} failed, so nothing can be learned from it: leave it out.")
    return [(name, by_epoch[one.epoch][one.name]) for name, one in zip(names, found, strict=True)]
