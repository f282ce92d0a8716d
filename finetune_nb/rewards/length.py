"""Rewards for the length of what the policy wrote, as parts of a reward beside what the answer earns."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigError
from ..types import Trajectory, sampled_tokens
from .functions import GroupReward

__all__ = [
    "length_penalty",
    "overlong_penalty",
]


def length_penalty() -> GroupReward:
    """A reward from 0 for the shortest rollout of a group to -1 for its longest, in a straight line between them.

        reward={"right": right, "length": (ft.length_penalty(), 0.1)}

    Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3) without its constant: it compares the rollouts of one example with
    each other, so nobody has to say how long a reply should be. All tokens that the policy sampled in an episode count. Give it a
    weight well below what the answer earns, or add it once answers are right: it pays for short wrong answers too.

    Returns:
        A reward function of a group; 0 for all where they are equally long.
    """

    def length(trajectories: list[Trajectory]) -> list[float]:
        tokens = [sampled_tokens(trajectory) for trajectory in trajectories]
        shortest, longest = min(tokens, default=0), max(tokens, default=0)
        return [-(each - shortest) / max(longest - shortest, 1) for each in tokens]

    length.fingerprint = "length_penalty()"  # type: ignore[attr-defined]
    return GroupReward(length)


def overlong_penalty(longest: int, margin: int) -> Callable[[Trajectory], float]:
    """A reward that grows from 0 to -1 as a reply comes near its longest length, so that replies end before they are cut.

        reward={"right": right, "length": ft.overlong_penalty(4096, margin=512)}

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 up to longest - margin tokens, then in a straight line
    to -1 at `longest`, and -1 beyond. All tokens that the policy sampled in an episode count.

    Args:
        longest: Tokens from which on it is -1; the limit of a reply, `max_tokens`, in episodes of one turn.
        margin: Tokens before that in which it falls.

    Returns:
        A reward function of the trajectory, from -1 to 0.

    Raises:
        ConfigError: `longest` or `margin` is not a whole number above 0, or `margin` is the larger one.
    """
    for name, value in (("longest", longest), ("margin", margin)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r:.40}; expected a whole number of tokens, 1 or more.")
    if margin > longest:
        raise ConfigError(f"margin is {margin}, longest {longest}; expected a margin within the longest length.")

    def overlong(trajectory: Trajectory) -> float:
        return -min(max(sampled_tokens(trajectory) - (longest - margin), 0) / margin, 1.0)

    overlong.fingerprint = f"overlong_penalty({longest}, {margin})"  # type: ignore[attr-defined]
    return overlong
