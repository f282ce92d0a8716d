"""What the package logs while a run is at work stands in that run's log.jsonl too.

Which run a line belongs to is known from the context (a contextvar, which tasks inherit and which our threads are started
with), so several runs of one process do not mix. What a line looks like in the file is store.py's.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["logging_to"]


class EventLog(Protocol):
    def event(self, kind: str, **data: object) -> None:
        """Takes one line."""
        ...


_current: contextvars.ContextVar[EventLog | None] = contextvars.ContextVar("finetune_nb_run_log", default=None)


@contextmanager
def logging_to(log: EventLog) -> Iterator[None]:
    """Inside, everything that finetune_nb logs goes to `log` as well."""
    package = logging.getLogger("finetune_nb")
    if not any(isinstance(handler, _ToRun) for handler in package.handlers):
        package.addHandler(_ToRun())
    token = _current.set(log)
    try:
        yield
    finally:
        _current.reset(token)


class _ToRun(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log = _current.get()
        if log is None:
            return
        token = _current.set(None)  # a log that cannot be written says so, and must not come back here
        try:
            trace = {"traceback": record.exc_text} if record.exc_text else {}
            log.event("log", level=record.levelname, logger=record.name, text=record.getMessage(), **trace)
        except Exception:
            self.handleError(record)
        finally:
            _current.reset(token)
