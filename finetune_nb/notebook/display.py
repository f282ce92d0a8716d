"""What a cell shows of a run in progress: how far it is while the cell waits, and the record that stays.

Both are plain HTML (the record with a picture) in one display each, updated in place: a saved notebook keeps the last
state. Only in a notebook's kernel, and begun only from its main thread; everywhere else the work is just waited for.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..redaction import redacting_logger
from ..text import plain
from ..views.html import Html, bar, element, view
from .kernel import current_cell, in_notebook, let_widgets_through, widgets_wait_message

__all__ = [
    "CellProgress",
    "CellRecord",
    "ProgressLine",
    "watch_progress",
]

T = TypeVar("T")
INTERVAL = 0.5
"""Seconds between two updates of one display, at least."""
SHARE = 0.05
"""Of its time, at most, that a run gives to drawing its record."""
LONGEST = 10.0
"""Seconds between two updates, at most: the first picture takes long, to load what draws it."""
SECONDS_UNTIL_SUBSHELL = 3.0
"""A front end that has a subshell for widgets has asked for it by then."""
logger = redacting_logger(__name__)


# ── how far it is ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ProgressLine:
    """How far something is, as one line with a bar."""

    text: str
    done: int
    total: int

    def __str__(self) -> str:
        return plain(self.text)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        line = bar(self.done, self.total or 1, self.text.replace("  ", " · "))
        return view(line, styled=False)  # it needs no style sheet, which would be stored with every cell that waits


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


class CellProgress:
    """The line of a cell that waits. Made when it begins to; `tick` as often as you like. show(done) makes the line."""

    def __init__(self, show: Callable[[bool], ProgressLine]) -> None:
        self._make, self._here = show, in_notebook()
        self._begun = self._next = time.monotonic()
        self._last: ProgressLine | None = None
        self._word: str | None = None
        if self._here:
            let_widgets_through()

    def tick(self, done: bool = False) -> None:
        now = time.monotonic()
        if not self._here or (now < self._next and not done):
            return
        self._next = now + INTERVAL
        line = self._make(done)
        if now - self._begun > SECONDS_UNTIL_SUBSHELL:
            self._word = self._word or widgets_wait_message()
        if self._word:
            line = replace(line, text=f"{line.text}  {self._word}")
        if line != self._last:
            _show(line)
            self._last = line


async def watch_progress(
    work: Awaitable[T], show: Callable[[bool], ProgressLine], tick: Callable[[], None] | None = None
) -> T:
    """Awaits `work`. In a notebook, shows meanwhile what `show(done)` returns, at most twice a second; elsewhere calls `tick`."""
    progress = CellProgress(show) if in_notebook() else None
    if progress is not None:
        tick = progress.tick
    if tick is None:
        return await work
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=INTERVAL))[0]:
            tick()
        if progress is not None and not task.cancelled() and task.exception() is None:
            progress.tick(done=True)
        return task.result()
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task}, timeout=2.0)
        raise


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────────


_news = threading.Condition()
_stale: set[CellRecord] = set()
_drawing: list[threading.Thread] = []


def _draw_for_ever() -> None:
    """Draws the records that are stale, each at its time. One thread for all of them, as long as the process lives: every
    new thread keeps the memory that its first pictures took (measured: 0.2 MB more an epoch)."""
    while True:
        with _news:
            while not _stale:
                _news.wait()
            record = min(_stale, key=lambda each: each.due)
            left = record.due - time.monotonic()
            if left > 0:
                _news.wait(left)
                continue
        record.settle()
        del record  # and the run with it


def _marked(bundle: Mapping[str, Any]) -> dict[str, Any]:
    """What it shows, marked as a record: a panel in the same cell hides it."""
    return {**bundle, "text/html": str(element("div", Html(bundle["text/html"]), data_ft_record=""))}


class CellRecord:
    """One display in the cell that started a run. bundle() makes what it shows, by mime type; it is asked in a thread for
    all records, so that neither the run nor a cell waits for a picture. first: what it shows until then."""

    def __init__(self, bundle: Callable[[], Mapping[str, Any]], first: Mapping[str, Any]) -> None:
        from IPython.display import display

        self._bundle = bundle
        self.cell = current_cell()
        """The cell that shows it."""
        self._handle: Any = display(_marked(first), raw=True, display_id=True)
        self.due = time.monotonic() + INTERVAL
        """When it may be drawn next, by time.monotonic."""
        self._turn = threading.Lock()
        self._has_ended = False

    def update(self, has_ended: bool = False) -> None:
        """Something has changed: shows it soon; at once if the run has ended, as the notebook may be saved now. May be called
        from any thread."""
        with _news:
            if has_ended:
                self._has_ended, self.due = True, time.monotonic()
            _stale.add(self)
            _news.notify()
            if not _drawing:
                _drawing.append(threading.Thread(target=_draw_for_ever, name="ft-record", daemon=True))
                _drawing[0].start()

    def settle(self) -> None:
        """Shows what is still to be shown, if anything, or waits until somebody has: what comes next may belong to another
        record."""
        with self._turn:
            with _news:
                is_stale = self in _stale
            if is_stale:
                self._draw()

    def draw(self) -> None:
        """Shows the run as it is now, from this thread. A cell that has waited does so at its end: who executes a notebook
        without a front end keeps only what the running cell sends."""
        with self._turn:
            self._draw()

    def _draw(self) -> None:
        """Whoever calls this has the turn: one after the other, so that the newest comes last."""
        with _news:
            _stale.discard(self)
            self._has_ended = False
        began = time.monotonic()
        try:
            self._handle.update(_marked(self._bundle()), raw=True)
        except Exception:  # a view must not end a run
            logger.warning("the record of a run could not be shown", exc_info=True)
        with _news:
            if not self._has_ended:  # it has not ended while it was drawn
                self.due = time.monotonic() + min(max(INTERVAL, (time.monotonic() - began) / SHARE), LONGEST)
