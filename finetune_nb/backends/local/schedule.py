"""The learning rate over the planned epochs: warm-up, then constant, linear or cosine. Pure arithmetic."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["Schedule", "rate"]

Schedule = Literal["constant", "linear", "cosine"]


def rate(
    schedule: Schedule, done: float, planned: float, step: float, warmup: float = 0.0, floor: float = 0.1
) -> float:
    """What the learning rate is multiplied with for the step that begins at `done`, in (0, 1].

    done, planned, step: epochs, fractions included: `done` of `planned` are over, the step takes `step` of one. warmup:
    the part of the planned epochs in which the rate climbs from near 0 in a straight line. floor: what "linear" and
    "cosine" (a half wave, as in SGDR, arXiv 1608.03983) have fallen to when the planned epochs are over; epochs behind
    the plan keep it, so that they still learn something.
    """
    climbing = warmup * planned
    if done < climbing:
        return min((done + step) / climbing, 1.0)
    if schedule == "constant":
        return 1.0
    over = min((done - climbing) / (planned - climbing), 1.0) if planned > climbing else 1.0
    left = 1 - over if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * over))
    return floor + (1 - floor) * left
