"""What a run is doing, and what may be asked of it then: one table of states and moves.

A RunState may be asked from any thread; the engine waits while the run is paused. Nothing here knows what an
epoch is.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from ..errors import RunError
from ..rollouts.evaluation import Progress
from ..types import Epoch

__all__ = [
    "ACTIVE",
    "RolloutCount",
    "RunStatus",
    "RunState",
    "State",
]


class State(StrEnum):
    """What a run is doing."""

    NEW = "new"
    """No epoch yet."""
    READY = "ready"
    """Between epochs; nothing is running."""
    RUNNING = "running"
    PAUSING = "pausing"
    """It pauses at the next safe point: between rollouts, before training, after it."""
    PAUSED = "paused"
    STOPPING = "stopping"
    """It ends after the current epoch."""
    ABORTING = "aborting"
    FAILED = "failed"
    """The last epoch raised; the run can be continued."""
    CLOSED = "closed"


_N, _R, _RUN, _PG, _PD, _ST, _AB, _F, _C = State
ACTIVE = frozenset({_RUN, _PG, _PD, _ST, _AB})
_IDLE = (_N, _R, _F)

MOVES: dict[str, dict[State, State]] = {
    # what people ask for
    "begin": dict.fromkeys(_IDLE, _RUN),
    "pause": {_RUN: _PG, _PG: _PG, _PD: _PD},
    "resume": {_PG: _RUN, _PD: _RUN},
    "stop": {_RUN: _ST, _PG: _ST, _PD: _ST, _ST: _ST},
    "abort": {_RUN: _AB, _PG: _AB, _PD: _AB, _ST: _AB, _AB: _AB},
    "close": dict.fromkeys(State, _C),
    # what the engine reports
    "paused": {_PG: _PD, _PD: _PD},
    "ended": {**dict.fromkeys(ACTIVE, _R), _C: _C},
    "failed": {**dict.fromkeys(ACTIVE, _F), _C: _C},
}
"""Move -> the states in which it may be made, and what comes of it. Everything else is a RunError."""

_HINTS = {
    "begin": "One thing at a time: wait for what is running (run.wait()), or stop it (run.stop()).",
    "pause": "Only a run that is running can be paused.",
    "resume": "Only a run that is paused can be resumed; run.start() begins.",
    "stop": "Nothing is running that could be stopped.",
    "abort": "Nothing is running that could be aborted.",
}


class RolloutCount(NamedTuple):
    """How many rollouts of an epoch have ended."""

    done: int
    failed: int
    total: int
    """0 as long as nobody knows."""


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment: what the panel, a saved notebook and `repr` show of it."""

    name: str
    state: str
    epochs: Sequence[Epoch]
    next_index: int
    planned: int
    phase: str = ""
    done: int = 0
    failed: int = 0
    total: int = 0
    trained: float = 0.0
    """Of the training job, 0 to 100 %."""
    job: str = ""
    """What it says of itself."""
    seconds: float = 0.0
    ahead: RolloutCount | None = None
    """Of the epoch after the running one, where that is sampled while this one trains."""
    notice: str | None = None
    error: str | None = None
    read_only: str | None = None
    """Why it can only be looked at; None where it can be steered."""
    writer: str | None = None

    def during(self, progress: Progress, ahead: Progress | None = None) -> RunStatus:
        """The same with how far the running epoch is, and the one after it."""
        return replace(
            self,
            phase=progress.phase,
            done=progress.done,
            failed=progress.failed,
            total=progress.total,
            trained=progress.trained,
            job=progress.job,
            seconds=progress.seconds,
            ahead=None if ahead is None else RolloutCount(ahead.done, ahead.failed, ahead.total),
        )

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    def seconds_left(self) -> float:
        """At the pace of the last five epochs, without pauses and without what overlapped with the epoch before; NaN where there
        is no pace yet."""
        took = [
            e.seconds.get("total", math.nan) - e.seconds.get("paused", 0.0) - e.seconds.get("ahead", 0.0)
            for e in self.epochs[-5:]
        ]
        took = [seconds for seconds in took if math.isfinite(seconds)]
        if not took or self.state not in (State.RUNNING, State.STOPPING):
            return math.nan
        pace = statistics.median(took)
        return max(0.0, pace * (self.planned - self.next_index) - min(self.seconds, pace))


# ── the state ────────────────────────────────────────────────────────────────────────────────────────────────────────


class RunState:
    """The state of one run, with its last error and a word to people. Every method may be called from any thread."""

    def __init__(self, state: State = State.NEW) -> None:
        self._state = state
        self._changed = threading.Condition()
        self.error: BaseException | None = None
        """What the last piece of work raised; None once another one begins."""
        self.notice: str | None = None
        """Why it is paused, or what it is about to do, in words for people."""

    @property
    def state(self) -> State:
        """What the run is doing now."""
        return self._state

    @property
    def active(self) -> bool:
        """Whether something is running, or is on its way to an end."""
        return self._state in ACTIVE

    def transition(self, name: str, notice: str | None = None, error: BaseException | None = None) -> State:
        """Makes a move. Raises RunError where the table has none."""
        with self._changed:
            moves = MOVES[name]
            if self._state not in moves:
                raise RunError(f"cannot {name}: the run is {self._state}. {_HINTS.get(name, '')}".rstrip())
            self._state = moves[self._state]
            if name == "begin" or error is not None:
                self.error = error
            if name != "paused":
                self.notice = notice
            self._changed.notify_all()
            return self._state

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing is running; False if it still is after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while self._state in ACTIVE:
                left = 0.1 if deadline is None else min(0.1, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._changed.wait(left)  # in slices, so that an interrupt arrives
        return True

    async def wait_while_paused(self) -> float:
        """The engine's safe point: waits while the run is paused. Returns the seconds that it waited."""
        started = time.perf_counter()
        if self._state in (_PG, _PD):
            with self._changed:
                if self._state is _PG:
                    self._state = _PD
                    self._changed.notify_all()
            while self._state in (_PG, _PD):
                await asyncio.sleep(0.02)
            return time.perf_counter() - started
        return 0.0
