"""The Jupyter kernel that this process may be: whether anybody sees its widgets, and whether they are heard while a cell
waits.

A cell that waits blocks the kernel's main shell. ipykernel 7 has a second one for widgets (a "subshell"), where the front
end asks for it; ipykernel 6 has none, so that what a slider does then arrives after the cell. What is read here are partly
the kernel's private attributes, each with what holds where it is missing; the browser tests try them on every release of
ipykernel. Nothing here knows a run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import RunError

__all__ = [
    "answering_a_widget",
    "in_kernel",
    "in_notebook",
    "interrupts",
    "has_frontend",
    "refuse_input",
    "route_to_subshell",
    "let_widgets_through",
    "current_cell",
    "why_widgets_wait",
    "no_frontend_message",
    "widgets_wait_message",
]

RELOAD = "if a slider is dead then, reload the page"
"""ipykernel 7.4 takes such a message while a cell awaits, but never says that it has: the front end sends no other."""
_told = False


def _kernel() -> Any:
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None)


_answering = threading.local()


@contextmanager
def answering_a_widget() -> Iterator[None]:
    """Inside, nothing is displayed: the code answers a widget, which may be in the main thread, and no cell would show it."""
    _answering.now = True
    try:
        yield
    finally:
        _answering.now = False


def in_notebook() -> bool:
    """Whether this is the main thread of a Jupyter kernel, and runs a cell."""
    if getattr(_answering, "now", False):
        return False
    return threading.current_thread() is threading.main_thread() and _kernel() is not None


def in_kernel() -> bool:
    """Whether this process is a Jupyter kernel, in whatever thread."""
    return _kernel() is not None


def has_frontend() -> bool:
    """Whether this is a kernel with a front end that shows widgets. nbclient, `jupyter execute` and papermill take no
    input from a person, and say so with every cell."""
    kernel = _kernel()
    return kernel is not None and bool(getattr(kernel, "_allow_stdin", True))


def no_frontend_message() -> str | None:
    """What to tell whoever looks at the notebook: why there are no widgets; None where there may be."""
    if _in_marimo():
        return "no widgets: marimo does not show Jupyter's; run.curriculum and run.live change settings"
    if _kernel() is None or has_frontend():
        return None
    return "no widgets: this notebook was executed without a front end"


def _in_marimo() -> bool:
    """Whether a cell of a marimo notebook is running in this thread."""
    running = getattr(sys.modules.get("marimo"), "running_in_notebook", None)
    return running is not None and running()


def _comms() -> list[Any]:
    """The open channels between widgets here and in the front end."""
    if _kernel() is None or "comm" not in sys.modules:
        return []
    from comm import get_comm_manager

    return list(getattr(get_comm_manager(), "comms", {}).values())


def let_widgets_through() -> None:
    """`route_to_subshell` for every widget, the user's own too: comes before a cell waits."""
    _route_to_subshell(_comms())


def route_to_subshell(widgets: Iterable[Any]) -> None:
    """Lets the front end's messages to these widgets come on the way that the front end chose, a subshell of their own.

    ipykernel 7.4 sends them to the shell from which the kernel last wrote to the widget: the main one, where a busy cell
    holds them up, or after a reload of the page a subshell that is gone. The memory of it is the kernel's own attribute;
    in other releases nothing happens.
    """
    _route_to_subshell(getattr(widget, "comm", None) for widget in widgets)


def _route_to_subshell(comms: Iterable[Any]) -> None:
    for comm in comms:
        getattr(comm, "__dict__", {}).pop("_reply_subshell_id", None)


def why_widgets_wait() -> str | None:
    """Why a widget's messages do not arrive while a cell of this kernel waits; None where they do, or there is no kernel.
    A front end asks for its subshell when it shows the first widget: before that the answer may be wrong."""
    kernel = _kernel()
    if kernel is None:
        return None
    if not getattr(kernel, "_supports_kernel_subshells", False):
        release = getattr(sys.modules.get("ipykernel"), "__version__", "")
        return f"ipykernel {release} has one shell for cells and widgets".replace("  ", " ")
    try:
        subshells = kernel.shell_channel_thread.manager.list_subshell()
    except Exception:  # a release that keeps them elsewhere
        return None
    return None if subshells else f"the front end uses no subshells; {RELOAD}"


def widgets_wait_message() -> str | None:
    """What to tell people in a cell that waits; once, and only where there are widgets and somebody who sees them."""
    global _told
    if _told or not has_frontend() or "ipywidgets" not in sys.modules or not _comms():
        return None
    why = why_widgets_wait()
    if why is None:
        return None
    _told = True
    return (
        f"changes made in widgets count when this cell has ended ({why}); run.start() without a wait leaves them free"
    )


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


def refuse_input(inside: Callable[[], bool]) -> None:
    """Refuses `input()` and `getpass()` to code that runs in the background of this kernel.

    Such code runs in threads of its own, several at a time, and the kernel's channel for questions belongs to the main
    thread: used from another one, it takes the kernel down.

    Args:
        inside: Whether the calling code is such code; asked whenever somebody asks a question.
    """
    kernel = _kernel()
    ask = getattr(kernel, "_input_request", None)
    if ask is None or hasattr(ask, "refuses"):
        return

    def asked(*args: Any, **kwargs: Any) -> Any:
        if inside():
            raise RunError(
                "input() was called by code that a run runs, where several rollouts run at once and nobody can be asked. Ask "
                "before the run starts, or try one rollout with `await run.rollout(0)`."
            )
        return ask(*args, **kwargs)

    asked.refuses = True  # type: ignore[attr-defined]
    kernel._input_request = asked


def current_cell() -> object:
    """Which cell is running; in a script always the same."""
    if not in_notebook():
        return "script"
    from IPython import get_ipython

    return getattr(get_ipython(), "execution_count", 0)
