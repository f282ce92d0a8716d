"""What widgets need to know of the kernel that they live in: whether anybody sees them, and on which way messages come.

Both are read from private attributes, each with what holds where it is missing; the browser tests try them on every
release of ipykernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["is_seen", "let_through"]


def is_seen() -> bool:
    """Whether this is a kernel with a front end that shows widgets. nbclient, `jupyter execute` and papermill take no
    input from a person, and say so with every cell."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and bool(getattr(kernel, "_allow_stdin", True))


def let_through(widgets: Iterable[Any]) -> None:
    """Lets the front end's messages to these widgets come on the way that the front end chose, a subshell of their own.

    ipykernel 7.4 sends them to the shell from which the kernel last wrote to the widget: the main one, where a busy cell
    holds them up, or after a reload of the page a subshell that is gone.
    """
    for widget in widgets:
        comm = getattr(widget, "comm", None)
        if comm is not None:
            getattr(comm, "__dict__", {}).pop("_reply_subshell_id", None)
