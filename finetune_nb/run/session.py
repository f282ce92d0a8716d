"""A run's thread and the one piece of work on it: started, joined, waited for, interrupted, aborted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from ..engine.driver import Driver
from ..engine.state import RunState, State
from ..errors import EpochAborted, FinetuneError, RunError
from ..notebook.display import CellProgress, CellRecord, ProgressLine, watch_progress
from ..notebook.kernel import current_cell, in_kernel, in_notebook, interrupts, refuse_input
from ..notebook.terminal import TerminalBar
from ..redaction import error_text, redact_exception
from ..threads import EngineThread, LoopTask
from ..user_code import contained
from ..views.summary import epoch_text

__all__ = [
    "ScriptLines",
    "Session",
]

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, T]]

ABORT_SECONDS = 1.0
"""An abort lets its waiter go after this time, whatever a workflow is still doing."""
LEFT_SECONDS = 10.0
"""How long a cell waits for the work of a canceled one to end."""
LAST_WORD = "finishing this epoch; interrupt again to abort it"
_inside: ContextVar[object] = ContextVar("inside", default=None)
"""The id of the run that the current code works for, also in the threads of its workflows."""


class Session:
    """What runs of one run: its engine thread, and at most one piece of work on it at a time."""

    def __init__(self, run_id: str, driver: Driver, state: RunState) -> None:
        self.run_id = run_id
        self.driver = driver
        self.state = state
        self.engine = EngineThread(f"ft-{run_id}")
        self.record: CellRecord | None = None
        """The display in the cell that started the run in the background."""
        self.lines: ScriptLines | None = None
        """The lines of a script that started the run in the background."""
        self._turn = threading.RLock()  # an abort must meet the work that has begun, not the one before it
        self._work: LoopTask[Any] | None = None
        self._aborted_at: float | None = None  # by time.monotonic
        self._left: LoopTask[Any] | None = None  # the work whose waiting cell was canceled
        self._stopped_in: object = None  # the cell whose epoch was ended by an interrupt

    # ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, work: Work[T], fails: bool = True, in_background: bool = False) -> LoopTask[T]:
        """Starts the work on the engine thread.

        Args:
            work: Makes the coroutine.
            fails: Whether the run has failed if the work raises.
            in_background: Whether no cell waits for it, so that the record alone shows its end.

        Raises:
            RunError: Something is running already.
        """
        started: list[bool] = []

        async def settling() -> T:
            started.append(True)
            return await self._settle(work, fails, in_background)

        def ended() -> None:
            if not started:
                self.state.transition("ended", "aborted before it began")

        refuse_input(lambda: _inside.get() is not None)
        with self._turn:
            self.state.transition("begin")
            self._aborted_at = None
            self._work = begun = self.engine.launch(settling(), ended)
        return begun

    async def _settle(self, work: Work[T], fails: bool, in_background: bool) -> T:
        """Runs the work, and leaves the run in the state that its end means."""
        _inside.set(self.run_id)
        try:
            result = await contained("the run", _without_secrets(work))
            self.state.transition("ended")
            return result
        except Exception as error:
            self.state.transition("failed" if fails else "ended", error=error if fails else None)
            raise
        except BaseException:
            self.state.transition(
                "ended", "aborted; what was collected is in run.partial" if self._aborted_at else None
            )
            raise
        finally:
            self.show_record(has_ended=in_background)

    async def join(self, task: LoopTask[T]) -> T:
        """The result of the work. An abort from elsewhere raises EpochAborted here: it does not look like a cancellation of
        the waiting cell."""
        joining = asyncio.ensure_future(task.join())
        try:
            while not joining.done():
                await asyncio.wait({joining}, timeout=0.2)
                if self._given_up():
                    raise EpochAborted(f"the epoch was aborted. {self.state.notice}")
            return joining.result()
        except asyncio.CancelledError:
            if not joining.cancelled() and not joining.done():  # the cell itself was canceled
                self._left = task
                joining.cancel()
                await asyncio.wait({joining}, timeout=ABORT_SECONDS + 0.5)
                raise
            if self._aborted_at:
                raise EpochAborted("the epoch was aborted; what was collected until then is in run.partial.") from None
            raise

    async def ask(self, work: Work[T]) -> T:
        """Runs something small beside the epochs, such as one rollout, and returns its result."""
        return await self.engine.run(contained("the run", _without_secrets(work)))

    def _given_up(self) -> bool:
        """Whether an abort has taken so long that whoever waits is let go."""
        aborted_at = self._aborted_at
        return aborted_at is not None and self.state.active and time.monotonic() - aborted_at > ABORT_SECONDS

    # ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run_in_cell(self, work: Work[T], progress: Callable[[bool], ProgressLine], lines: bool = True) -> T:
        """Runs the work while a cell waits for it and shows its progress; a script gets a line for each epoch, if `lines`.

        The first interrupt lets the work finish, and ends a loop around it in the same cell; the second aborts it.

        Raises:
            KeyboardInterrupt: The cell was interrupted.
        """
        cell, asked_in, self._stopped_in = current_cell(), self._stopped_in, None
        if asked_in == cell:
            raise KeyboardInterrupt("stopped after the current epoch, as requested; run the cell again to continue")
        # On a busy machine the work of a canceled cell takes a moment to end; the next cell need not fail for that.
        left, self._left = self._left, None
        if left is not None:
            await left.wait_ended(LEFT_SECONDS)
        script = ScriptLines(self.driver) if lines and not in_kernel() else None
        task, pressed = self.begin(work), InterruptHandler(self, cell)
        tick = None if script is None else partial(script.tell, self.state, progress)
        with interrupts(pressed.first, pressed.second):
            try:
                return await watch_progress(self.join(task), progress, tick)
            except EpochAborted:
                if pressed.aborted:
                    raise KeyboardInterrupt from None
                raise
            finally:
                if script is not None:
                    script.settle()

    def wait(self, timeout: float | None, progress: Callable[[bool], ProgressLine], lines: bool) -> None:
        """Blocks until nothing is running, or for `timeout` seconds. Raises what the run raised. lines: whether a script
        gets a line for each epoch."""
        self.require_outside("wait")
        deadline = None if timeout is None else time.monotonic() + timeout
        pressed, shown, script = InterruptHandler(self), CellProgress(progress), self._script(lines)
        with interrupts(pressed.first, pressed.second):
            while not self.state.wait(0.1):
                shown.tick()
                if script is not None:
                    script.tell(self.state, progress)
                if self._given_up() or (deadline is not None and time.monotonic() >= deadline):
                    break
            if script is not None:
                script.settle()
            shown.tick(done=not self.state.active and self.state.error is None)
        self._after_waiting(pressed.aborted)

    async def wait_async(self, timeout: float | None, progress: Callable[[bool], ProgressLine], lines: bool) -> None:
        """Like `wait`, for a cell that awaits."""
        self.require_outside("wait_async")
        deadline = None if timeout is None else time.monotonic() + timeout

        script = self._script(lines)

        async def waiting() -> None:
            while self.state.active and not self._given_up():
                await asyncio.sleep(0.05)
                if script is not None:
                    script.tell(self.state, progress)
                if deadline is not None and time.monotonic() >= deadline:
                    return

        pressed = InterruptHandler(self)
        with interrupts(pressed.first, pressed.second):
            await watch_progress(waiting(), progress)
        if script is not None:
            script.settle()
        self._after_waiting(pressed.aborted)

    def _script(self, lines: bool) -> ScriptLines | None:
        """What a script is shown while it waits. A notebook's cell shows its progress instead."""
        return self.lines if lines and not in_kernel() else None

    def _after_waiting(self, aborted: bool) -> None:
        if self.record is not None and in_notebook():
            self.record.draw()
        if aborted:
            raise KeyboardInterrupt
        if not self.state.active and self.state.error is not None:
            raise self.state.error

    def show_record(self, has_ended: bool = False) -> None:
        """Brings the display in the cell that started the run up to date."""
        if self.record is not None:
            self.record.update(has_ended)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask_quietly(self, move: str, notice: str) -> None:
        """Makes a move of the run's state, if it can still be made."""
        with suppress(RunError):  # the run has ended in the meantime
            self.state.transition(move, notice)

    def abort(self) -> None:
        """Cancels the work. Returns at once, from any thread."""
        with self._turn:
            self.state.transition("abort", "the epoch is being aborted")
            self._aborted_at = self._aborted_at or time.monotonic()
            if self._work is not None:
                self._work.cancel()

    def end(self) -> None:
        """Ends what is running, for good: nothing can be started after this."""
        if self.state.active:
            self.abort()
            self.state.wait(ABORT_SECONDS)
        self.state.transition("close")

    def require_outside(self, call: str) -> None:
        """Raises RunError in a workflow, a reward or a tripwire of this run, where waiting for the run would never end."""
        if _inside.get() == self.run_id:
            raise RunError(
                f"{call} was called by what the run itself runs, and would wait for that to end. There, use run.stop() or "
                f"run.abort(), which return at once, and call {call} from a cell."
            )


class ScriptLines:
    """What a script that waits sees: a line for each epoch that is recorded from now on, one when the run is paused, and in a
    terminal how far the epoch is.

    Args:
        driver: The driver whose epochs these are.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._printed = len(driver.epochs)
        self._paused: str | None = None
        self._bar: TerminalBar | None = None

    def tell(self, state: RunState, progress: Callable[[bool], ProgressLine]) -> None:
        """Prints what is new."""
        bar = self._print_new()
        paused = (state.notice or "paused") if state.state is State.PAUSED else None
        if paused is not None and paused != self._paused:
            bar.print(f"{paused}. run.resume() continues the run, run.stop() ends it.")
        self._paused = paused
        if paused is None and bar.moves:
            bar.show(progress(False))

    def settle(self) -> None:
        """Prints what is left to be printed."""
        self._print_new().clear()

    def _print_new(self) -> TerminalBar:
        bar = self._bar = self._bar or TerminalBar()
        epochs = list(self._driver.epochs)
        first = min(self._printed, len(epochs))  # fewer than before, where the run went back to an earlier epoch
        self._printed = len(epochs)
        for epoch in epochs[first:]:
            bar.print(epoch_text(epoch))
        return bar


class InterruptHandler:
    """What the first and the second interrupt of a waiting cell do.

    Args:
        session: The session that the cell waits for.
        cell: The cell whose loop the first interrupt ends, too.
    """

    def __init__(self, session: Session, cell: object = None) -> None:
        self.session = session
        self.cell = cell
        self.aborted = False

    def first(self) -> str:
        """Stops the run after the current epoch. Returns what to tell the person."""
        self.session._stopped_in = self.cell
        self.session.ask_quietly("stop", LAST_WORD)
        return LAST_WORD

    def second(self) -> None:
        """Aborts the current epoch."""
        self.aborted = True
        with suppress(RunError):  # the run has ended in the meantime
            self.session.abort()
            self.session._stopped_in = None


async def _without_secrets(work: Work[T]) -> T:
    """Runs the work; an error leaves it without secrets, such as a key that a server repeats."""
    try:
        return await work()
    except Exception as error:
        text = error_text(error)
        if not redact_exception(error):
            raise FinetuneError(text) from None
        raise
