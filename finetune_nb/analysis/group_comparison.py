"""Compares two rollouts, such as the best and the worst of one example, and finds the point where they diverge.

Up to that point they are identical, so what follows explains why one was rewarded and the other was not. Among rollouts
with equal rewards, the pair that stays identical longest is chosen: the later they diverge, the more it tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..errors import RunError
from ..hooks import shown_by
from ..text import short
from ..types import DPOItem, EpisodeItem, Trajectory
from .messages import called_functions, said_text, tokens_of
from .rollout_group import RolloutGroup

__all__ = [
    "ComparedRollout",
    "Divergence",
    "GroupComparison",
    "RolloutComparison",
    "compare_group",
    "compare_rollouts",
    "first_divergence",
]

CANDIDATES = 16
"""How many of the best and of the worst rollouts are tried to find the pair that stays identical longest."""


@dataclass(frozen=True)
class Divergence:
    """The point where two rollouts diverge."""

    turn: int
    """Index of the first message that differs, from 0; where one rollout has ended, the next one of the other."""
    character: int
    """Index of the first character of that message that differs, from 0."""
    token: int | None
    """Index of its first sampled token that differs, from 0; None if that is not known."""


@dataclass(frozen=True, eq=False)
class ComparedRollout:
    """One side of a comparison."""

    name: str
    """What it is called in the view: "best", or "e3/q17/2"."""
    group: RolloutGroup
    place: int
    """Its position in the group."""

    @property
    def trajectory(self) -> Trajectory:
        """Its record."""
        return self.group.trajectories[self.place]

    @property
    def advantage(self) -> float:
        """Within its own group; NaN without reward."""
        return self.group.advantages[self.place]

    @property
    def generation(self) -> Any:
        """Which of its group's rollouts it is."""
        return self.group.generation(self.place)


@dataclass(frozen=True, eq=False)
class RolloutComparison:
    """Two rollouts side by side; displays itself in a cell."""

    first: ComparedRollout
    second: ComparedRollout
    divergence: Divergence | None
    """None if both say the same."""

    @property
    def sides(self) -> tuple[ComparedRollout, ComparedRollout]:
        """The two rollouts."""
        return self.first, self.second

    @property
    def trajectories(self) -> tuple[Trajectory, Trajectory]:
        """Their records."""
        return self.first.trajectory, self.second.trajectory

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.group_comparison:comparison_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.group_comparison:comparison_html", self)


class GroupComparison(RolloutComparison):
    """The best and the worst rollout of one example; displays itself in a cell."""

    @property
    def group(self) -> RolloutGroup:
        """The rollouts of the example."""
        return self.first.group

    @property
    def best(self) -> int:
        """Position of the best in the group."""
        return self.first.place

    @property
    def worst(self) -> int:
        """Position of the worst in the group."""
        return self.second.place


def compare_rollouts(first: ComparedRollout, second: ComparedRollout) -> RolloutComparison:
    """Compare any two rollouts, also of different examples or epochs.

    Args:
        first: A rollout.
        second: Another one.

    Returns:
        Both, and where they diverge.
    """
    return RolloutComparison(first, second, first_divergence(first.trajectory, second.trajectory))


def compare_group(group: RolloutGroup) -> GroupComparison:
    """Compare the best rollout of a group with the worst, by reward.

    Args:
        group: The rollouts of one example. Rollouts without a reward count only if fewer than two have one.

    Returns:
        The two rollouts, and where they diverge.

    Raises:
        RunError: Fewer than two rollouts of the group finished.
    """
    places = group.best_first()
    if len(places) < 2:
        finished = "1 trajectory" if len(places) == 1 else f"{len(places)} trajectories"
        raise RunError(
            f"example {short(group.example, 80)} has {finished} that finished in epoch {group.epoch}; a comparison needs "
            f"two. run.show(epoch={group.epoch}, example=...) shows what there is."
        )
    rewards = [trajectory.reward for trajectory in group.trajectories]
    known = [place for place in places if not math.isnan(rewards[place])]
    if len(known) > 1:
        places = known

    # Several rollouts may share the best or the worst reward: compare the pair that stays identical longest.
    highest, lowest = rewards[places[0]], rewards[places[-1]]
    best = list(takewhile(lambda place: _equal(rewards[place], highest), places))[:CANDIDATES]
    worst = list(takewhile(lambda place: _equal(rewards[place], lowest), reversed(places)))[:CANDIDATES]
    divergences: dict[tuple[int, int], Divergence | None] = {}
    for high in best:
        for low in sorted(worst):
            if high != low:
                divergences[high, low] = first_divergence(group.trajectories[high], group.trajectories[low])

    def togetherness(pair: tuple[int, int]) -> tuple[int, int]:
        where = divergences[pair]
        if where is None:
            return (-1, 0)  # identical rollouts explain nothing
        return (where.turn, where.character)

    pair = max(divergences, key=togetherness)
    best_side, worst_side = (
        ComparedRollout(name, group, place) for name, place in zip(("best", "worst"), pair, strict=True)
    )
    return GroupComparison(best_side, worst_side, divergences[pair])


def first_divergence(a: Trajectory, b: Trajectory) -> Divergence | None:
    """Find the first turn of two rollouts whose role, text or tool calls differ.

    Args:
        a: A rollout.
        b: Another one.

    Returns:
        That turn, and the point in it where the two diverge. None if both say the same.
    """
    for turn, (one, other) in enumerate(zip(a.episode, b.episode, strict=False)):
        if _essence(one) != _essence(other):
            return Divergence(turn, _shared_length(said_text(one), said_text(other)), _first_other_token(one, other))
    if len(a.episode) == len(b.episode):
        return None
    return Divergence(min(len(a.episode), len(b.episode)), 0, None)


def _essence(item: EpisodeItem | DPOItem) -> tuple[Any, ...]:
    """The parts of a message that must be equal for two messages to count as the same."""
    if isinstance(item, DPOItem):
        return item.chosen_response, item.rejected_response
    return str(item.role), item.content, called_functions(item)


def _first_other_token(one: EpisodeItem | DPOItem, other: EpisodeItem | DPOItem) -> int | None:
    """Number of leading sampled tokens that both share; None if their texts are not known."""
    tokens, other_tokens = tokens_of(one), tokens_of(other)
    if not tokens or not other_tokens or tokens[0].text is None:
        return None
    same = 0
    for token, other_token in zip(tokens, other_tokens, strict=False):
        if token.text != other_token.text:
            break
        same += 1
    return same


def _shared_length(a: str, b: str) -> int:
    """Number of leading characters that both share."""
    low, high = 0, min(len(a), len(b))
    # Bisect: comparing slices is fast, comparing single characters in Python is not.
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _equal(a: float, b: float) -> bool:
    """Whether two rewards are the same. Two missing rewards are."""
    return a == b or abs(a - b) <= 1e-9 or (math.isnan(a) and math.isnan(b))
