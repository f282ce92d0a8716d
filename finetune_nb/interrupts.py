"""Ctrl-C, and the stop button of a notebook, while a cell or a script waits for a run: the first ends it in good order,
the second at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .kernel import in_notebook

__all__ = ["interrupts", "place"]


@contextmanager
def interrupts(first: Callable[[], str], second: Callable[[], None]) -> Iterator[None]:
    """Inside, the first interrupt calls `first` (which returns a word to people), the second `second`, and later ones do
    what they did before. Only where this is the main thread; elsewhere no interrupt arrives. Both must return at once:
    they are called from a signal handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    count = 0

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal count
        count += 1
        if count == 1:
            word = first()
            if not in_notebook():  # there the progress line says it; print is not for signal handlers
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{word}\n".encode())
        elif count == 2:
            second()
        elif callable(before):
            before(number, frame)  # type: ignore[arg-type]

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def place() -> object:
    """Which cell is running; in a script always the same."""
    if not in_notebook():
        return "script"
    from IPython import get_ipython

    return getattr(get_ipython(), "execution_count", 0)
