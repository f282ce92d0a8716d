"""What a script shows of a run on standard error: lines that stay, and in a terminal one that moves below them."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from ..text import plain

if TYPE_CHECKING:
    from tqdm import tqdm

    from .display import ProgressLine

__all__ = [
    "TerminalBar",
    "print_line",
]


def print_line(line: str) -> None:
    """Writes a line to standard error, for a script. Does nothing where there is none, or nobody reads it any more."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):  # a closed pipe or file must not end a run
        sys.stderr.write(f"{plain(line)}\n")
        sys.stderr.flush()


class TerminalBar:
    """A bar at the bottom of a terminal. Where standard error is a file or a pipe, only `print` shows anything."""

    def __init__(self) -> None:
        self.moves = False
        """Whether there is a terminal for it."""
        self._bar: tqdm | None = None
        with contextlib.suppress(AttributeError, OSError, ValueError):  # none, closed, or something of a test's
            self.moves = sys.stderr.isatty()

    def show(self, line: ProgressLine) -> None:
        """Draws how far something is. Only where it `moves`."""
        with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
            if self._bar is None:
                from tqdm import tqdm

                layout = "{desc} {percentage:3.0f}% |{bar:20}|"
                self._bar = tqdm(bar_format=layout, leave=False, file=sys.stderr, dynamic_ncols=True, total=1)
            self._bar.total, self._bar.n = max(line.total, 1), min(line.done, max(line.total, 1))
            self._bar.set_description_str(str(line), refresh=False)
            self._bar.refresh()

    def print(self, line: str) -> None:
        """Writes a line that stays, above the bar."""
        self.clear()
        print_line(line)

    def clear(self) -> None:
        """Takes the bar away; `show` brings it back."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()
