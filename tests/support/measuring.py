"""Two ways to do one thing, measured side by side: what a benchmark compares, and what it may fail on.

The same work takes up to twice as long on a machine that others use, for minutes at a time. So the sides take turns, and
are compared turn by turn.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process, all threads together."""
    started = time.process_time()
    work()
    return time.process_time() - started


@dataclass
class Measured:
    seconds: dict[str, list[float]]
    """CPU seconds of each side, turn by turn."""
    made: dict[str, Any] = field(default_factory=dict)
    """What each side returned, in its last turn."""

    def __getitem__(self, side: str) -> float:
        """CPU seconds of a side: the median."""
        return statistics.median(self.seconds[side])

    def ratio(self, side: str, other: str) -> float:
        """How many times as long as the other a side takes: the median over the turns."""
        return statistics.median(a / b for a, b in zip(self.seconds[side], self.seconds[other], strict=True))


def by_turns(rounds: int, collecting: bool = False, /, **sides: Callable[[], Any]) -> Measured:
    """Runs each side once to warm up, then `rounds` times, in turns. Garbage collection rests, since it would fall on either
    side by chance, unless it is to be `collecting`: then a side that makes many objects pays for it.

    A side that returns a float has measured itself, in seconds."""
    found = Measured({name: [] for name in sides})
    gc.collect()
    if collecting:
        gc.enable()  # pytest-benchmark has disabled it
    else:
        gc.disable()
    try:
        for turn in range(rounds + 1):
            for name, work in sides.items():
                started = time.process_time()
                made = work()
                seconds = time.process_time() - started
                found.made[name] = made
                if turn:
                    found.seconds[name].append(made if isinstance(made, float) else seconds)
    finally:
        gc.enable()
    return found
