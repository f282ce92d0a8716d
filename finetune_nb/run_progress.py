"""How a run stands: its state, how far the running epoch is, what it failed with, its log. Only told here; steering.py and
live_run.py change it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .display import ProgressLine
from .html import cut, duration, plain
from .redaction import error_text
from .states import Standing, State
from .steering import Steering
from .viewer import epoch_text

if TYPE_CHECKING:
    from .evaluation.evaluate import Progress

__all__ = ["RunProgress"]


class RunProgress(Steering):
    """A run that tells how it stands."""

    _standing: Standing
    _planned: int | None = None

    @property
    def error(self) -> str | None:
        """What the last epoch raised; None once another one begins."""
        error = self._standing.error
        return None if error is None else error_text(error)

    @property
    def progress(self) -> Progress:
        """How far the running epoch is."""
        return self._driver.progress

    @property
    def planned(self) -> int:
        """The epoch before which `start` will end, or has ended."""
        return self._planned or self.config.finetuning.num_epochs

    @property
    def notice(self) -> str | None:
        """Why it is paused, or what it is about to do."""
        return self._standing.notice

    def log_lines(self, count: int = 20) -> list[str]:
        """The last lines of the run's log."""
        store = self._stored()
        return [] if store is None else [_line(event) for event in store.events(last=count)]

    @property
    def state(self) -> str:
        """See states.State; of a run that is only read here also interrupted (its process ended in the middle of an
        epoch), archived, or what the process that writes it is doing."""
        if not self._closed and self._standing.state in (State.NEW, State.READY):
            told = self._told_on_disk()
            if told is not None:
                return told
        return str(State.CLOSED if self._closed else self._standing.state)

    def _progress_line(self, done: bool) -> ProgressLine:
        progress, epochs = self._driver.progress, self._driver.epochs
        if done and epochs:
            return ProgressLine(epoch_text(epochs[-1]), progress.done, progress.total)
        left_out = f", {progress.failed} failed" if progress.failed else ""
        # Not every builder tells how many rollouts there will be.
        far = f"{progress.done} of {progress.total} rollouts{left_out}" if progress.total else ""
        reached, total = progress.done, progress.total
        if progress.phase == "training" and progress.job:
            far, reached, total = plain(cut(progress.job, 80)), round(progress.trained), 100
        parts = [f"epoch {self.next_index}", progress.phase or "starting", far, duration(progress.seconds), self.notice]
        return ProgressLine("  ".join(filter(None, parts)), reached, total)


def _line(event: Mapping[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event.get("time", 0.0)))
    told = {
        key: value
        for key, value in event.items()
        if key not in ("time", "kind", "traceback", "level", "logger", "text")
    }
    text = event.get("text") or " ".join(f"{key}={value}" for key, value in told.items() if value is not None)
    return f"{clock} {event.get('level', event['kind'])} {text}"
