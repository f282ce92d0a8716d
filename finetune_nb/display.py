"""Showing how far a waiting cell is: one display in the cell, updated in place at most twice a second.

Only in a notebook's kernel, and only from its main thread; everywhere else the work is just awaited. What it shows is plain
HTML, so that a saved notebook keeps the last state.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .html import bar, duration, view

__all__ = ["ProgressLine", "in_notebook", "watch_progress"]

T = TypeVar("T")
_INTERVAL = 0.5


@dataclass(frozen=True)
class ProgressLine:
    """How far an epoch is, as one line."""

    phase: str
    done: int
    failed: int
    total: int
    seconds: float

    def __str__(self) -> str:
        left_out = f", {self.failed} failed" if self.failed else ""
        return f"{self.phase}: {self.done} of {self.total} rollouts{left_out}, {duration(self.seconds)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return str(view(bar(self.done, self.total or 1, str(self))))


def in_notebook() -> bool:
    """Whether this is the main thread of a Jupyter kernel."""
    if "IPython" not in sys.modules or threading.current_thread() is not threading.main_thread():
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


async def watch_progress(work: Awaitable[T], show: Callable[..., Any]) -> T:
    """Awaits `work`. In a notebook, shows meanwhile what `show(seconds)` returns; once done, with `done=True`."""
    if not in_notebook():
        return await work
    from IPython.display import display

    task = asyncio.ensure_future(work)
    started = time.monotonic()
    handle: Any = None
    shown = ""
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=_INTERVAL)
            line = show(time.monotonic() - started, done=bool(done))
            if str(line) != shown:
                shown = str(line)
                if handle is None:
                    handle = display(line, display_id=True)
                else:
                    handle.update(line)
            if done:
                return task.result()
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task}, timeout=2.0)
        raise
