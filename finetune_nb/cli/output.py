"""What the command line prints: text without control characters, in whatever encoding the terminal has."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

from ..redaction import redact_text
from ..text import plain

__all__ = [
    "PlainFormatter",
    "complain",
    "say",
    "show_log_records",
    "without_colours",
]

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def say(text: Any) -> None:
    """Print a line, or several. Control characters become visible symbols; line breaks and tabs stay."""
    _write(text, sys.stdout)


def complain(text: Any) -> None:
    """Print to standard error, as `say` does."""
    _write(text, sys.stderr)


def _write(text: Any, stream: Any) -> None:
    shown = redact_text(plain(text))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # A terminal that knows ASCII alone gets escapes in place of a UnicodeEncodeError.
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def without_colours(text: str) -> str:
    """A text without the color codes that tracebacks from a notebook have."""
    return _COLOUR.sub("", text)


class PlainFormatter(logging.Formatter):
    """Formats log records of any library without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def show_log_records(level: int, layout: str) -> None:
    """Print the log records of all libraries to standard error, without control characters.

    Args:
        level: From which level on, such as logging.WARNING.
        layout: As `logging.Formatter` takes it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter(layout))
    logging.basicConfig(level=level, handlers=[handler])
