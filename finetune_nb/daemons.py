"""Daemon threads that leave before the interpreter does.

A daemon thread never keeps a process from ending, which is right for work that somebody abandoned. But one that is
inside torch, or frees the last tensor, while the interpreter is taken down crashes the process. So at exit `leaving` is
set, which the work looks at between its steps, and the threads get a moment to come to their end.
"""

from __future__ import annotations

import atexit
import contextvars
import threading
import time
from collections.abc import Callable

__all__ = ["leaving", "start_daemon"]

leaving = threading.Event()
"""Set when the interpreter begins to end: stop after the step at hand."""
PARTING_SECONDS = 3.0
_wakes: dict[threading.Thread, Callable[[], None]] = {}


def start_daemon(work: Callable[[], None], name: str, wake: Callable[[], None] = lambda: None) -> threading.Thread:
    """Runs `work` in a thread of its own, with the caller's context variables. `wake` makes it look at `leaving` where it
    sleeps for long."""
    context = contextvars.copy_context()

    def run() -> None:
        try:
            context.run(work)
        finally:
            _wakes.pop(threading.current_thread(), None)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _wakes[thread] = wake
    thread.start()
    return thread


@atexit.register
def _part() -> None:
    leaving.set()
    deadline = time.monotonic() + PARTING_SECONDS
    threads = dict(_wakes)
    for wake in threads.values():
        wake()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
