"""Tripwires: asked after every epoch of a run in the background; one that answers pauses the run with its words.

    run.tripwires += [spread_below(0.2), validation_falls(3), lambda epoch: epoch.metrics.failures > 50]

Any function of the newest Epoch is one: it answers with text, or True, to pause, and with None or False to continue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .errors import ConfigError, UserCodeError
from .redaction import error_text, redact_text, redacting_logger
from .types import Epoch
from .user_code import contained_call

__all__ = [
    "EntropyBelow",
    "LengthExplainsReward",
    "RepliesCut",
    "RewardsMissing",
    "SpreadBelow",
    "Tripwire",
    "ValidationFalls",
    "entropy_below",
    "length_explains_reward",
    "replies_cut",
    "rewards_missing",
    "spread_below",
    "tripped",
    "validation_falls",
]

logger = redacting_logger(__name__)

Tripwire = Callable[[Epoch], Any]


@dataclass(frozen=True)
class SpreadBelow:
    """Pauses where too few groups teach.

    Args:
        share: Least share of an epoch's groups whose rewards differ, above 0 and at most 1.

    Raises:
        ConfigError: The share is out of that range.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"spread_below: share is {self.share!r}; expected a number above 0 and at most 1.")

    def __call__(self, epoch: Epoch) -> str | None:
        found = epoch.metrics
        if not found.groups or found.groups_with_spread >= self.share * found.groups:
            return None
        return f"only {found.groups_with_spread} of {found.groups} groups teach, less than {self.share:.0%}"


@dataclass(frozen=True)
class ValidationFalls:
    """Pauses where the validation reward has fallen several times in a row.

    Args:
        times: How many falls in a row, at least 1.

    Raises:
        ConfigError: `times` is not a whole number of at least 1.
    """

    times: int

    def __post_init__(self) -> None:
        if not (isinstance(self.times, int) and self.times >= 1):
            raise ConfigError(f"validation_falls: times is {self.times!r}; expected a whole number of at least 1.")

    def of_run(self, epochs: Sequence[Epoch]) -> str | None:
        """Asked in place of a call, with all epochs of the run.

        Args:
            epochs: Its epochs so far, oldest first.

        Returns:
            Why the run should pause, or None.
        """
        rewards = [check.mean_reward for epoch in epochs for check in epoch.validations]
        if not epochs or not epochs[-1].validations:
            return None
        last = [reward for reward in rewards if math.isfinite(reward)][-self.times - 1 :]
        if len(last) <= self.times or any(later >= earlier for earlier, later in pairwise(last)):
            return None
        return f"the validation reward fell {self.times} times in a row, from {last[0]:.3g} to {last[-1]:.3g}"

    def __call__(self, epoch: Epoch) -> str | None:
        return self.of_run([epoch])


@dataclass(frozen=True)
class RewardsMissing:
    """Pauses where too many rewards are missing. share: of an epoch's trajectories, in [0, 1)."""

    share: float

    def __post_init__(self) -> None:
        if not (isinstance(self.share, int | float) and 0 <= self.share < 1):
            raise ConfigError(f"rewards_missing: share is {self.share!r}; expected a number from 0 to below 1.")

    def __call__(self, epoch: Epoch) -> str | None:
        found = epoch.metrics
        missing = found.rewards_missing or 0
        if missing <= self.share * found.trajectories:
            return None
        return f"{found.rewards_missing_text}; more than {100 * self.share:g} %"


@dataclass(frozen=True)
class EntropyBelow:
    """Pauses where the policy's entropy is too low. nats: least mean entropy a sampled token, above 0."""

    nats: float

    def __post_init__(self) -> None:
        if not (_is_number(self.nats) and self.nats > 0):
            raise ConfigError(f"entropy_below: nats is {self.nats!r}; expected a number above 0.")

    def __call__(self, epoch: Epoch) -> str | None:
        entropy = epoch.metrics.mean_entropy
        if entropy is None or entropy >= self.nats:
            return None
        return f"the policy's entropy is {entropy:.3g} nats a token, less than {self.nats:g}"


@dataclass(frozen=True)
class LengthExplainsReward:
    """Pauses where the reward follows the reply's length. share: of the rewards' spread inside groups, in (0, 1]."""

    share: float

    def __post_init__(self) -> None:
        if not (_is_number(self.share) and 0 < self.share <= 1):
            raise ConfigError(
                f"length_explains_reward: share is {self.share!r}; expected a number above 0 and at most 1."
            )

    def __call__(self, epoch: Epoch) -> str | None:
        correlation = epoch.metrics.length_correlation
        if correlation is None or correlation**2 < self.share:
            return None
        which = "longer" if correlation > 0 else "shorter"
        return (
            f"the reply's length explains {correlation**2:.0%} of what rewards differ by inside groups ({which} is better), "
            f"at least {self.share:.0%}"
        )


@dataclass(frozen=True)
class RepliesCut:
    """Pauses where too many replies are cut at the token limit. share: of an epoch's trajectories, in [0, 1)."""

    share: float

    def __post_init__(self) -> None:
        if not (_is_number(self.share) and 0 <= self.share < 1):
            raise ConfigError(f"replies_cut: share is {self.share!r}; expected a number from 0 to below 1.")

    def __call__(self, epoch: Epoch) -> str | None:
        cut, trajectories = epoch.metrics.replies_cut or 0, epoch.metrics.trajectories
        if cut <= self.share * trajectories:
            return None
        return f"{cut:,} of {trajectories:,} replies were cut at the token limit; more than {100 * self.share:g} %"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def entropy_below(nats: float) -> EntropyBelow:
    """Make a tripwire that pauses when the policy hardly explores any more.

    It never pauses a run whose backend records no entropy. `local_grpo` does.

    Args:
        nats: Least mean entropy at a sampled token, above 0. A policy that is sure of itself has less than 0.05; of one that has
            learned its task that is no fault.

    Returns:
        The tripwire.

    Raises:
        ConfigError: `nats` is no number above 0.
    """
    return EntropyBelow(nats)


def length_explains_reward(share: float) -> LengthExplainsReward:
    """Make a tripwire that pauses when the reward is decided by how long a reply is.

    Args:
        share: How much of what rewards differ by inside groups the length of whole replies may explain, above 0 and at most 1:
            the square of the epoch's `length_correlation`. Tasks that are learned as they should be stay below 0.8.

    Returns:
        The tripwire.

    Raises:
        ConfigError: The share is out of that range.
    """
    return LengthExplainsReward(share)


def replies_cut(share: float) -> RepliesCut:
    """Make a tripwire that pauses when too many replies are cut at the token limit.

    Args:
        share: Largest share of trajectories whose last reply was cut, from 0 to below 1. At 0 a single one pauses the run.

    Returns:
        The tripwire.

    Raises:
        ConfigError: The share is out of that range.
    """
    return RepliesCut(share)


def rewards_missing(share: float) -> RewardsMissing:
    """Make a tripwire that pauses when too many rewards are missing.

    Args:
        share: Largest share of trajectories without a reward, from 0 to below 1. At 0 a single one pauses the run.

    Returns:
        The tripwire.
    """
    return RewardsMissing(share)


def spread_below(share: float) -> SpreadBelow:
    """Make a tripwire that pauses when too few groups teach.

    Args:
        share: Least share of an epoch's groups whose rewards differ, above 0 and at most 1.

    Returns:
        The tripwire.

    Raises:
        ConfigError: The share is out of that range.
    """
    return SpreadBelow(share)


def validation_falls(times: int) -> ValidationFalls:
    """Make a tripwire that pauses when the validation reward keeps falling.

    Args:
        times: How many falls in a row, at least 1.

    Returns:
        The tripwire.

    Raises:
        ConfigError: `times` is not a whole number of at least 1.
    """
    return ValidationFalls(times)


def tripped(tripwires: Sequence[Tripwire], epochs: Sequence[Epoch]) -> str | None:
    """Ask all tripwires after an epoch.

    Args:
        tripwires: The run's tripwires. One that raises pauses the run, too.
        epochs: Its epochs so far, oldest first.

    Returns:
        Why the run should pause after its newest epoch; None if it may continue.
    """
    for tripwire in list(tripwires):
        name = getattr(tripwire, "__name__", type(tripwire).__name__)
        try:
            of_run = getattr(tripwire, "of_run", None)
            ask, asked = (tripwire, epochs[-1]) if of_run is None else (of_run, epochs)
            answer = contained_call(f"tripwire {name}", _reason, ask, asked)
        except UserCodeError as error:
            logger.warning("tripwire %s raised", name, exc_info=True)
            return redact_text(str(error))
        except Exception as error:
            logger.warning("tripwire %s raised", name, exc_info=True)
            return f"tripwire {name} raised {error_text(error)}"
        if answer:
            return redact_text(answer) if isinstance(answer, str) else f"tripwire {name}"
    return None


def _reason(ask: Callable[[Any], Any], asked: Any) -> str | bool:
    """The answer as text, or whether it counts as true, which may be anybody's code too."""
    answer = ask(asked)
    return answer if isinstance(answer, str) else bool(answer)
