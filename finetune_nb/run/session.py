"""What a waiting cell does with interrupts."""

from __future__ import annotations

from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from ..errors import RunError

if TYPE_CHECKING:
    from .run import LiveRun

T = TypeVar("T")

ABORT_SECONDS = 1.0
"""After so long an abort is over for whoever waits, whatever a workflow still does."""
_inside: ContextVar[object] = ContextVar("inside", default=None)
"""The run whose work this is, also in the threads of its workflows."""
LAST_WORD = "finishing this epoch; interrupt again to abort it"


class _Pressed:
    """What the two interrupts of a waiting cell do. cell: the one whose loop the first is to end, too."""

    def __init__(self, run: LiveRun, cell: object = None) -> None:
        self.run, self.cell, self.aborted = run, cell, False

    def first(self) -> str:
        self.run._stopped_in = self.cell
        self.run._ask_quietly("stop", LAST_WORD)
        return LAST_WORD

    def second(self) -> None:
        self.aborted = True
        with suppress(RunError):  # it has ended meanwhile
            self.run.abort()
            self.run._stopped_in = None
