"""Controls: the mailbox between whoever steers a run (a cell, a widget, another thread) and the engine that runs it.

A change is validated and becomes pending at once; the engine takes it over at its safe point, which for the curriculum is
the next selection, also that of the epoch whose rollouts are running. Every change is kept in the journal. Nothing here
touches asyncio, a trainer or a widget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .config import CurriculumSettings

__all__ = ["Change", "Controls"]


@dataclass(frozen=True)
class Change:
    """One field that somebody changed."""

    time: float
    """Seconds since 1970, UTC."""
    source: str
    """Who: "code", "panel", "replay"."""
    field: str
    old: Any
    new: Any
    epoch: int | None = None
    """The epoch whose selection used it first; None while it is pending, or when another change came before that."""


class Controls:
    """The live settings of a run. Every method may be called from any thread."""

    def __init__(self, curriculum: CurriculumSettings) -> None:
        self._lock = threading.Lock()
        self._applied = curriculum
        self._pending: CurriculumSettings | None = None
        self._journal: list[Change] = []
        self._told = 0  # how many entries of the journal came from the record
        self._waiting: dict[str, int] = {}  # field -> place in the journal of its last change, while that is pending

    @property
    def applied(self) -> CurriculumSettings:
        """What the last selection used; before the first one, what it will use."""
        with self._lock:
            return self._applied

    @property
    def curriculum(self) -> CurriculumSettings:
        """What the next selection will use."""
        with self._lock:
            return self._pending or self._applied

    @property
    def journal(self) -> tuple[Change, ...]:
        with self._lock:
            return tuple(self._journal)

    def change(self, changes: Mapping[str, Any] | CurriculumSettings, source: str = "code") -> CurriculumSettings:
        """Asks for other settings. Raises ConfigError, and changes nothing, if they do not fit."""
        with self._lock:
            before = self._pending or self._applied
            after = before.updated(changes)
            for name in (f.name for f in fields(after)):
                old, new = getattr(before, name), getattr(after, name)
                if old != new:
                    self._waiting[name] = len(self._journal)
                    self._journal.append(Change(time.time(), source, name, old, new))
            self._pending = after
            return after

    def start_from(self, settings: CurriculumSettings | None, journal: Sequence[Change], epoch: int) -> None:
        """The record's word of the settings in force and of the changes so far, from where a run goes on with `epoch`. A
        change that was pending, or used by an epoch that did not come to its end, is pending again; one that was asked for
        here meanwhile stays, behind them."""
        with self._lock:
            own = self._journal[self._told :]
            self._journal, self._told = [*journal, *own], len(journal)
            self._waiting = {}
            for place, change in enumerate(self._journal):
                self._waiting.pop(change.field, None)
                if change.epoch is None or change.epoch >= epoch:
                    self._waiting[change.field] = place
            self._applied = settings or self._applied
            waiting = {field: self._journal[place].new for field, place in self._waiting.items()}
            self._pending = replace(self._applied, **waiting) if waiting else None

    def apply(self, epoch: int) -> tuple[CurriculumSettings, bool]:
        """The engine's safe point: the settings for this epoch's selection, and whether the schedule just became
        automatic again or got another percentile."""
        with self._lock:
            before, after = self._applied, self._pending or self._applied
            self._applied, self._pending = after, None
            for i in self._waiting.values():
                self._journal[i] = replace(self._journal[i], epoch=epoch)
            self._waiting.clear()
            resumed = after.schedule == "automatic" and (
                before.schedule == "manual" or before.percentile != after.percentile
            )
            return after, resumed

    def settle(self, percentile: float) -> None:
        """The engine's word of the percentile that a selection used, which the schedule may have moved."""
        with self._lock:
            before = self._applied
            self._applied = replace(before, percentile=percentile)
            if self._pending is not None and self._pending.percentile == before.percentile:
                self._pending = replace(self._pending, percentile=percentile)
