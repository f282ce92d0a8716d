"""The weight of the entropy bonus, made larger and smaller so that the policy's entropy stays near a target.

Skywork-OR1's adaptive entropy control (arXiv 2505.22312, section 4): the bonus counts only while the entropy is not above its
target, and its weight goes up by a step for each optimizer step in which it is not, and down by one for each in which it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["EntropyWeight"]


@dataclass
class EntropyWeight:
    """From one optimizer step to the next."""

    start: float
    """The setting that it began with."""
    coef: float = math.nan
    """What the bonus is weighted with while it counts. NaN: the setting."""
    entropy: float | None = None
    """Of the policy in the last step, nats a token. None: no step was made."""

    def __post_init__(self) -> None:
        if math.isnan(self.coef):
            self.coef = self.start

    def follow(self, start: float) -> None:
        """Begins with another setting, where it has been changed."""
        if start != self.start:
            self.start = self.coef = start

    def weight(self, target: float | None) -> float:
        """Of the bonus in the next step. Without a target, the setting; with one, 0 until the entropy is known."""
        if target is None:
            return self.start
        return self.coef if self.entropy is not None and self.entropy <= target else 0.0

    def step(self, entropy: float, target: float | None, by: float, most: float) -> None:
        """An optimizer step was made, with that mean entropy."""
        if target is None or not math.isfinite(entropy):
            return
        self.entropy = entropy
        self.coef = min(self.coef + by, most) if entropy <= target else max(self.coef - by, 0.0)
