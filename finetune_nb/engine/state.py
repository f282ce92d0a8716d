"""What a run is doing, and what may be asked of it then: one table of states and moves.

A Standing may be asked from any thread; the engine waits at its gate while the run is paused. Nothing here knows what an
epoch is.
"""

from __future__ import annotations

import asyncio
import threading
import time
from enum import StrEnum

from ..errors import RunError

__all__ = [
    "ACTIVE",
    "Standing",
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
    """It ends behind the epoch that is running."""
    ABORTING = "aborting"
    FAILED = "failed"
    """The last epoch raised; it can be gone on with."""
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
    "held": {_PG: _PD, _PD: _PD},
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


class Standing:
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

    def move(self, name: str, notice: str | None = None, error: BaseException | None = None) -> State:
        """Makes a move. Raises RunError where the table has none."""
        with self._changed:
            moves = MOVES[name]
            if self._state not in moves:
                raise RunError(f"cannot {name}: the run is {self._state}. {_HINTS.get(name, '')}".rstrip())
            self._state = moves[self._state]
            if name == "begin" or error is not None:
                self.error = error
            if name != "held":
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

    async def gate(self) -> float:
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
