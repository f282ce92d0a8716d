"""Credit: which part of an episode's reward each of its turns is trained for, where shaped rewards say it.

Let rollout i of a group have the reward R_i, in all, and let its turn k = 0, 1, ... have earned r_ik of it (its shaped
rewards; 0 where it has none). When turn k began there was still G_ik = R_i - (r_i0 + ... + r_i,k-1) to earn: what the shaped
rewards leave of R_i is earned at the end. All tokens of turn k have the advantage

    A_ik = (G_ik - mean over j of G_j,min(k, last turn of j)) / (std(R) + 1e-4)

so a turn is not praised for what was earned before it. The first turn, and every turn where nothing is shaped, has the
advantage of plain GRPO. Rewards to go are those of DeepSeekMath's process supervision (arXiv 2402.03300, section 4.1.3),
which normalises each step's reward instead. Which groups teach is still decided by the rewards R alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from .errors import BackendError
from .types import DPOItem, EpisodeItem, EpisodeItemRole, Trajectory, logprob_values

__all__ = ["is_sampled", "sampled_turns", "turn_advantages", "where"]


def is_sampled(item: EpisodeItem | DPOItem) -> bool:
    """Whether it is a turn that the policy sampled: an assistant's, but for those without a logprob (`logprobs == []`)."""
    if not isinstance(item, EpisodeItem) or item.role != EpisodeItemRole.ASSISTANT:
        return False
    return item.logprobs != [] if isinstance(item.logprobs, list | None) else logprob_values(item.logprobs) != []


def sampled_turns(trajectory: Trajectory) -> list[int]:
    """Positions in the episode of the turns that the policy sampled."""
    return [position for position, item in enumerate(trajectory.episode) if is_sampled(item)]


def turn_advantages(group: Sequence[Trajectory], scale_rewards: bool = True) -> list[list[float]]:
    """For each trajectory one advantage a sampled turn, NaN where it has no reward. The rewards of the group differ.

    Raises BackendError where shaped rewards are neither one a sampled turn nor one a message, or are not finite.
    """
    counted = [i for i, trajectory in enumerate(group) if not math.isnan(trajectory.reward)]
    turns = [len(sampled_turns(trajectory)) for trajectory in group]
    longest = max(turns, default=0)
    to_go_CK = np.empty((len(counted), longest))
    for row, i in enumerate(counted):
        left = group[i].reward - np.cumsum([0.0, *_earned(group[i])])[: max(turns[i], 1)]
        to_go_CK[row] = np.pad(left, (0, longest - len(left)), mode="edge") if longest else left[:0]
    advantages_CK = to_go_CK - to_go_CK.mean(0)
    if scale_rewards:
        advantages_CK /= np.std([group[i].reward for i in counted], ddof=1) + 1e-4
    found = [[math.nan] * count for count in turns]
    for row, i in enumerate(counted):
        found[i] = advantages_CK[row, : turns[i]].tolist()
    return found


def _earned(trajectory: Trajectory) -> list[float]:
    """What each sampled turn earned. Of values that come one a message, a turn has those from it up to the next turn."""
    shaped, turns = trajectory.shaped_rewards, sampled_turns(trajectory)
    if not shaped:
        return [0.0] * len(turns)
    if not all(map(math.isfinite, shaped)):
        raise BackendError(f"{where(trajectory)} has shaped_rewards that are not finite: {shaped!r:.80}")
    if len(shaped) == len(turns):
        return list(shaped)
    if len(shaped) != len(trajectory.episode) or not turns:
        raise BackendError(
            f"{where(trajectory)} has {len(shaped)} shaped_rewards; expected one for each of its {len(turns)} sampled "
            f"turns or one for each of its {len(trajectory.episode)} messages."
        )
    borders = [0, *turns[1:], len(shaped)]
    return [sum(shaped[begin:end]) for begin, end in itertools.pairwise(borders)]


def where(trajectory: Trajectory, turn: int | None = None) -> str:
    """The place of a trajectory, or of a turn in it, for a message."""
    metadata = trajectory.metadata or {}
    place = f"example {metadata.get('id')!r}, generation {metadata.get('generation')}"
    return f"the trajectory of {place}" if turn is None else f"turn {turn} of {place}"
