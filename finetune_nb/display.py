"""Showing how far a waiting cell is: one display in the cell, updated in place at most twice a second.

Only in a notebook's kernel, and only from its main thread; everywhere else the work is just awaited. What it shows is plain
HTML, so that a saved notebook keeps the last state.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .html import bar, view

__all__ = ["ProgressLine", "in_notebook", "watch_progress"]

T = TypeVar("T")
_INTERVAL = 0.5


@dataclass(frozen=True)
class ProgressLine:
    """How far something is, as one line with a bar."""

    text: str
    done: int
    total: int

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return str(view(bar(self.done, self.total or 1, self.text.replace("  ", " · "))))


def in_notebook() -> bool:
    """Whether this is the main thread of a Jupyter kernel."""
    if "IPython" not in sys.modules or threading.current_thread() is not threading.main_thread():
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


_shown: tuple[int, Any] | None = None  # the cell's execution count, and the display that it has


def _show(line: ProgressLine) -> None:
    """Shows the line in the running cell: in its first display, however many epochs the cell runs."""
    global _shown
    from IPython import get_ipython
    from IPython.display import display

    cell = getattr(get_ipython(), "execution_count", 0)
    if _shown is not None and _shown[0] == cell:
        _shown[1].update(line)
    else:
        _shown = (cell, display(line, display_id=True))


async def watch_progress(work: Awaitable[T], show: Callable[[bool], ProgressLine]) -> T:
    """Awaits `work`. In a notebook, shows meanwhile what `show(done)` returns, at most twice a second."""
    if not in_notebook():
        return await work
    task = asyncio.ensure_future(work)
    last = None
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=_INTERVAL)
            failed = bool(done) and not task.cancelled() and task.exception() is not None
            line = show(bool(done) and not failed)
            if line != last and not failed:
                _show(line)
                last = line
            if done:
                return task.result()
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task}, timeout=2.0)
        raise
