"""How hard each example is, as the record of a run measures it, and which examples an epoch draws by that.

Everything is worked out from the rewards of the epochs that are recorded: pure functions over numpy columns, so that a run that
continues draws what it would have drawn, and a preview what the next epoch draws. A missing reward is no reward of 0: it does not
count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from ..store.json import plain
from ..text import text_of
from ..types import GroupStatistics

__all__ = [
    "Difficulty",
    "DifficultySettings",
    "ExampleState",
    "Visits",
    "draw_by_difficulty",
    "states_of",
]

SOLVED = 1 - 1e-9
"""The pass rate from which an example is solved: every rollout of its newest visit passed."""
LONGEST_REST = 8
"""By how many times a rest grows at most, when an example stays solved, or too hard."""
NEWEST = 0.5
"""Weight of the newest visit in an example's pass rate; those before it share the rest in the same way."""
DRAWS = 2
"""Tells these draws from others by the same seed."""


class ExampleState(StrEnum):
    """What an example is to the next epoch."""

    FRESH = "fresh"
    """It has no reward yet."""
    LEARNING = "learning"
    SOLVED = "solved"
    """Every rollout of its newest visit passed, and it is to be checked again."""
    TOO_HARD = "too hard"
    """No rollout of its newest two visits passed, and it is to be tried again."""
    RESTING = "resting"
    """Solved or too hard, and not drawn for some epochs."""


STATES = tuple(ExampleState)


@dataclass(frozen=True)
class DifficultySettings:
    """Which examples are drawn."""

    target: float = 0.5
    """The pass rate to draw around."""
    width: float = 0.25
    """How far from it examples are still drawn often: the standard deviation of a bell curve."""
    rest: int = 5
    """Epochs that a solved example rests; twice as many each time that it is still solved."""


@dataclass
class Visits:
    """What the record says of N examples, one entry each, in the order in which they were first drawn."""

    examples: list[Any] = field(default_factory=list)
    rollouts: list[int] = field(default_factory=list)
    """Rollouts that finished."""
    rewarded: list[int] = field(default_factory=list)
    """Those of them with a finite reward."""
    total: list[float] = field(default_factory=list)
    """Sum of these rewards."""
    passed: list[int] = field(default_factory=list)
    """How many of them are at least 1."""
    rate: list[float] = field(default_factory=list)
    """Pass rate: the mean reward of a visit, held to 0 .. 1, averaged over visits, of which the newest counts half."""
    newest: list[float] = field(default_factory=list)
    """That of the newest visit with a reward."""
    streak: list[int] = field(default_factory=list)
    """How many visits in a row, up to the newest, everything passed, or nothing; 0 where it was in between."""
    epochs: list[int] = field(default_factory=list)
    """How many epochs drew it."""
    last: list[int] = field(default_factory=list)
    """The newest of them."""
    checked: list[int] = field(default_factory=list)
    """The newest of them that gave it a reward; -1 where none did."""
    place_of: dict[str, int] = field(default_factory=dict)
    """Position by the text of the example's id."""

    def copy(self) -> Visits:
        """The same, to count more."""
        return Visits(**{name: value.copy() for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.examples)

    def add(self, epoch: int, statistics: GroupStatistics) -> None:
        """Counts the groups of an epoch."""
        if not len(statistics):
            return
        rewards, starts = statistics.rewards, statistics.offsets
        finite = np.isfinite(rewards)
        values = np.where(finite, rewards, 0.0)

        def sums(of: np.ndarray) -> list[Any]:
            running = np.concatenate([[0], np.cumsum(of)])
            return (running[starts[1:]] - running[starts[:-1]]).tolist()

        sizes, counts = np.diff(starts).tolist(), sums(finite.astype(np.int64))
        totals, passed = sums(values), sums(finite & (values >= SOLVED))
        clipped = sums(np.clip(values, 0.0, 1.0))
        for place, example in enumerate(statistics.example_ids):
            at = self._place(example)
            self.epochs[at] += 1
            self.last[at] = epoch
            self.rollouts[at] += sizes[place]
            if counts[place]:
                self._rewarded(at, epoch, counts[place], totals[place], passed[place], clipped[place] / counts[place])

    def _place(self, example: Any) -> int:
        key = text_of(example)
        at = self.place_of.get(key)
        if at is None:
            at = self.place_of[key] = len(self.examples)
            self.examples.append(example)
            for counted in (self.rollouts, self.rewarded, self.passed, self.streak, self.epochs):
                counted.append(0)
            for values in (self.rate, self.newest):
                values.append(math.nan)
            self.total.append(0.0)
            self.last.append(-1)
            self.checked.append(-1)
        return at

    def _rewarded(self, at: int, epoch: int, count: int, total: float, passed: int, rate: float) -> None:
        before = self.newest[at]
        extreme = rate >= SOLVED or rate <= 1 - SOLVED
        self.streak[at] = 0 if not extreme else self.streak[at] + 1 if self.streak[at] and _alike(before, rate) else 1
        self.rewarded[at] += count
        self.total[at] += total
        self.passed[at] += passed
        self.rate[at] = rate if math.isnan(before) else NEWEST * rate + (1 - NEWEST) * self.rate[at]
        self.newest[at] = rate
        self.checked[at] = epoch

    # ── what a fork keeps of its parent's record ─────────────────────────────────────────────────────────────────────

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON, NaN as None."""
        found = {name: value for name, value in vars(self).items() if name != "place_of"}
        found["examples"] = plain(list(self.examples), "examples")
        for name in ("rate", "newest"):
            found[name] = [None if math.isnan(value) else value for value in found[name]]
        return found

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Visits:
        """Reads it. Raises ValueError, TypeError or KeyError for what is none."""
        values: dict[str, Any] = {name: [int(each) for each in record[name]] for name in _WHOLE}
        for name in ("rate", "newest"):
            values[name] = [math.nan if each is None else float(each) for each in record[name]]
        visits = cls(examples=list(record["examples"]), total=[float(each) for each in record["total"]], **values)
        if {len(value) for name, value in vars(visits).items() if name != "place_of"} - {len(visits.examples)}:
            raise ValueError("its columns differ in length")
        visits.place_of = {text_of(example): place for place, example in enumerate(visits.examples)}
        return visits


_WHOLE = ("rollouts", "rewarded", "passed", "streak", "epochs", "last", "checked")


def _alike(one: float, other: float) -> bool:
    return (one >= SOLVED) == (other >= SOLVED)


@dataclass(frozen=True)
class Difficulty:
    """N examples as the next epoch sees them."""

    rate: np.ndarray
    """(N,) float64, NaN where there is no reward."""
    state: np.ndarray
    """(N,) int8, positions in STATES."""
    rests_until: np.ndarray
    """(N,) int64, the first epoch that may draw it again; of an example that does not rest, at most the next one."""

    def is_state(self, state: ExampleState) -> np.ndarray:
        """(N,) bool."""
        return self.state == STATES.index(state)


def states_of(
    visits: Visits, epoch: int, settings: DifficultySettings, examples: Sequence[Any] | None = None
) -> Difficulty:
    """What each example is to an epoch.

    Args:
        visits: What the record says, of epochs before it.
        epoch: Its number, from 0.
        settings: How long examples rest.
        examples: Which, by id. Default: those of `visits`.
    """
    if examples is None:
        places = np.arange(len(visits))
    else:
        places = np.array([visits.place_of.get(text_of(example), -1) for example in examples], dtype=np.int64)
    known = places >= 0

    def column(values: Sequence[Any], missing: Any, dtype: Any) -> np.ndarray:
        out = np.full(len(places), missing, dtype=dtype)
        out[known] = np.array(values, dtype=dtype)[places[known]] if known.any() else out[known]
        return out

    rate, newest = column(visits.rate, math.nan, np.float64), column(visits.newest, math.nan, np.float64)
    streak, checked = column(visits.streak, 0, np.int64), column(visits.checked, -1, np.int64)
    solved = (newest >= SOLVED) & (streak > 0)
    hard = (newest <= 1 - SOLVED) & (streak > 1)
    times = np.where(solved, streak, streak - 1)
    rest = settings.rest * np.minimum(2.0 ** np.clip(times - 1, 0, 30), LONGEST_REST)
    until = np.where(solved | hard, checked + 1 + rest, 0).astype(np.int64)
    state = np.full(len(places), STATES.index(ExampleState.LEARNING), dtype=np.int8)
    state[np.isnan(newest)] = STATES.index(ExampleState.FRESH)
    state[solved] = STATES.index(ExampleState.SOLVED)
    state[hard] = STATES.index(ExampleState.TOO_HARD)
    state[until > epoch] = STATES.index(ExampleState.RESTING)
    return Difficulty(rate, state, until)


def draw_by_difficulty(
    examples: Sequence[Any], size: int, epoch: int, seed: int, visits: Visits, settings: DifficultySettings
) -> list[int]:
    """Positions of the examples of one epoch, drawn without replacement by a bell curve around the target rate.

    A fresh example counts as if it were at the target. Examples that rest are drawn only where there are too few others: those
    first whose rest ends first.

    Args:
        examples: Ids of the whole dataset, in its order.
        size: How many to draw; at most as many as there are.
        epoch: Number of the epoch, from 0.
        seed: The run's.
        visits: What the record says, of epochs before it.
        settings: Where to draw.

    Returns:
        The positions. The same arguments give the same ones.
    """
    found = states_of(visits, epoch, settings, examples)
    distance = (found.rate - settings.target) / settings.width
    log_weight = np.where(found.is_state(ExampleState.FRESH), 0.0, -(distance**2) / 2)
    noise = np.random.default_rng([seed, epoch, DRAWS]).gumbel(size=len(examples))
    resting = found.is_state(ExampleState.RESTING)
    # Gumbel noise and the largest sums are a draw by these weights without replacement.
    order = np.lexsort((-(log_weight + noise), np.where(resting, found.rests_until, 0)))
    return order[:size].tolist()
