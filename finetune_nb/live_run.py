"""A run at work: epochs in a cell or in the background, paused, stopped, aborted and waited for, steered while it goes on.

Everything is handed to the driver on the engine thread. A cell only waits: it does not matter from which thread or loop
the run is asked. What may be asked when stands in states.py.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .display import CellProgress, CellRecord, watch_progress
from .engine import EngineThread, Launched
from .errors import EpochAborted, FinetuneError, RunError
from .interrupts import interrupts, place
from .kernel import in_notebook
from .redaction import error_text, redact_exception
from .run_progress import RunProgress
from .states import State
from .tripwires import Tripwire, tripped
from .types import Epoch, RolloutFailure, Trajectory, Validation

if TYPE_CHECKING:
    from .evaluation.recording import ChatReply

__all__ = ["LiveRun"]

T = TypeVar("T")
ABORT_SECONDS = 1.0
"""After so long an abort is over for whoever waits, whatever a workflow still does."""
_inside: ContextVar[object] = ContextVar("inside", default=None)
"""The run whose work this is, also in the threads of its workflows."""
LAST_WORD = "finishing this epoch; interrupt again to abort it"


class LiveRun(RunProgress):
    """A run that can be driven."""

    tripwires: list[Tripwire]
    """Asked after every epoch of `start`: one that answers pauses the run. See tripwires.py."""
    _engine: EngineThread
    _turn: threading.RLock  # an abort meets the work that has begun, not the one before
    _work: Launched[Any] | None = None
    _aborted: float | None = None  # when the epoch that is running was, by time.monotonic
    _panel: Any = None
    _stopped_in: object = None  # the cell whose epoch was ended by an interrupt
    _shown: CellRecord | None = None  # in the cell that started the run

    # ── in a cell ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def next_epoch(self) -> Epoch:
        """Runs one epoch: collect, select, train, record. Returns its record.

        The first interrupt lets the epoch come to its end, and a loop around it stop there; the second aborts it. Raises
        RunError while something of this run is running, JobFailed (with the record in `.epoch`) where the training job
        failed or was canceled, BackendError for an unhealthy backend, ConfigError and DatasetError for what is wrong with
        the config, EpochAborted after `abort()`; what was collected until then is in `partial`.
        """
        cell, asked_in, self._stopped_in = place(), self._stopped_in, None
        if asked_in == cell:
            raise KeyboardInterrupt("ended behind the epoch that was running, as asked; run the cell again to go on")
        work, pressed = self._begin(self._driver.next_epoch), _Pressed(self, cell)
        with interrupts(pressed.first, pressed.second):
            try:
                return await watch_progress(self._joined(work), self._progress_line)
            except EpochAborted:
                if pressed.aborted:
                    raise KeyboardInterrupt from None
                raise

    async def _joined(self, work: Launched[T]) -> T:
        """The result; an abort from elsewhere does not look like a cancellation of the waiting cell."""
        joining = asyncio.ensure_future(work.join())
        try:
            while not joining.done():
                await asyncio.wait({joining}, timeout=0.2)
                if self._given_up():
                    raise EpochAborted(f"the epoch was aborted. {self._standing.notice}")
            return joining.result()
        except asyncio.CancelledError:
            if not joining.cancelled() and not joining.done():  # the cell itself was canceled
                joining.cancel()
                await asyncio.wait({joining}, timeout=ABORT_SECONDS + 0.5)
                raise
            if self._aborted:
                raise EpochAborted("the epoch was aborted; what was collected until then is in run.partial.") from None
            raise

    def _given_up(self) -> bool:
        """Whether an abort has gone on for so long that whoever waits is let go."""
        return self._aborted is not None and self._standing.active and time.monotonic() - self._aborted > ABORT_SECONDS

    async def validate(self) -> Validation:
        """Evaluates the policy, as it is now, on the validation dataset."""
        return await self._joined(self._begin(self._driver.validate, fails=False))

    async def rollout(self, example: Any = 0) -> Trajectory | RolloutFailure:
        """Tries one example, by position or id: one rollout, scored and shown as a conversation, recorded nowhere."""
        return await self._ask(lambda: self._driver.rollout(example))

    async def chat(self, messages: Any, **options: Any) -> ChatReply:
        """The policy's reply to a text or to OpenAI messages. options: tools, temperature, max_tokens, stop."""
        return await self._ask(lambda: self._driver.chat(messages, **options))

    def save_model(self, directory: str | Path, **options: Any) -> Path:
        """Writes the trained model and its tokenizer, loadable by `from_pretrained`. options: of the adapter's `save`;
        `merge=True` adds a LoRA adapter to the model's weights, which otherwise is written alone."""
        self._require_open()
        self._require_outside("save_model")
        return Path(self._engine.submit(self._driver.save_model(str(directory), **options)).result())

    async def _ask(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Something small beside the epochs."""
        self._require_open()
        return await self._engine.run(self._safely(work))

    async def _safely(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Lets no secret out with an error: a server that repeats the key it was given, say; no cell may show that."""
        try:
            return await work()
        except Exception as error:
            text = error_text(error)
            if not redact_exception(error):
                raise FinetuneError(text) from None
            raise

    def _begin(self, work: Callable[[], Coroutine[Any, Any, T]], fails: bool = True) -> Launched[T]:
        """Starts what only one may be of at a time. fails: whether the run has failed if this does."""
        self._require_open()
        settled: list[bool] = []

        async def settling() -> T:
            settled.append(True)
            return await self._settled(work, fails)

        def ended() -> None:
            if not settled:
                self._standing.move("ended", "aborted before it began")

        with self._turn:
            self._standing.move("begin")
            self._aborted = None
            self._work = begun = self._engine.launch(settling(), ended)
        return begun

    async def _settled(self, work: Callable[[], Coroutine[Any, Any, T]], fails: bool) -> T:
        _inside.set(self.id)
        try:
            result = await self._safely(work)
            self._standing.move("ended")
            return result
        except Exception as error:
            self._standing.move("failed" if fails else "ended", error=error if fails else None)
            raise
        except BaseException:
            self._standing.move("ended", "aborted; what was collected is in run.partial" if self._aborted else None)
            raise
        finally:
            self._show_record()

    def _require_open(self) -> None:
        if self._closed:
            raise RunError(f"run {self.id!r} is closed: its records can be read, but nothing more can be run.")
        if self._unable:
            raise RunError(self._unable)

    def _require_outside(self, call: str) -> None:
        """Raises RunError in a workflow, a reward or a tripwire of this run, where waiting for it would never end."""
        if _inside.get() == self.id:
            raise RunError(
                f"{call} was called by what the run itself runs, and would wait for that to end. There, use run.stop() or "
                f"run.abort(), which return at once, and call {call} from a cell."
            )

    # ── in the background ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, epochs: int | None = None) -> None:
        """Runs epochs in the background: as many as that, or those that are left of `num_epochs`. Returns at once. In a
        notebook the cell keeps a display of the run, current at each epoch's end, which a saved notebook shows.

        `pause`, `resume`, `stop`, `abort` steer it; `wait` waits for it and raises what it raised. Raises RunError where
        something is running already, or no epoch is left.
        """
        self._require_open()
        left = self.config.finetuning.num_epochs - self._driver.next_index if epochs is None else epochs
        if left < 1:
            raise RunError(
                f"found {left} epochs to run: the {self.config.finetuning.num_epochs} that were planned are done. Say how "
                "many more: run.start(epochs=5)."
            )
        first = self._driver.next_index

        async def many() -> None:
            if await self._driver.trains_in_run():
                await self._driver.whole_run(left)
                return
            for _ in range(left):
                epoch = await self._driver.next_epoch()
                self._show_record()
                reason = tripped(self.tripwires, self.records)
                if reason is not None:
                    self._ask_quietly("pause", f"paused behind epoch {epoch.index}: {reason}")
                    self._show_record()
                await self._standing.gate()
                if self._standing.state is not State.RUNNING:
                    return

        self._begin(many)
        self._planned = first + left
        if in_notebook():
            self._shown = CellRecord(self._record, {"text/plain": repr(self), "text/html": self._repr_html_()})

    def _show_record(self) -> None:
        if self._shown is not None:
            self._shown.update()

    def pause(self) -> None:
        """Holds the run at the next safe point: rollouts in flight come to their end, no other begins."""
        self._standing.move("pause", "paused by hand")

    def resume(self) -> None:
        """Goes on after a pause."""
        self._standing.move("resume")

    def stop(self) -> None:
        """Ends the run behind the epoch that is running."""
        self._standing.move("stop", "ends behind this epoch")

    def abort(self) -> None:
        """Ends the running epoch at once; what was collected is kept, and shown by `partial`. Returns at once; a workflow
        that hangs in code of its own is left behind in its thread."""
        with self._turn:
            self._standing.move("abort", "the epoch is being aborted")
            self._aborted = self._aborted or time.monotonic()
            if self._work is not None:
                self._work.cancel()

    def _ask_quietly(self, move: str, notice: str) -> None:
        with suppress(RunError):  # it has ended meanwhile
            self._standing.move(move, notice)

    def wait(self, timeout: float | None = None) -> Self:
        """Waits until nothing is running, or for `timeout` seconds. Raises what the run raised. The first interrupt ends
        the run behind the running epoch, the second aborts that and raises KeyboardInterrupt."""
        self._require_outside("wait")
        deadline = None if timeout is None else time.monotonic() + timeout
        pressed, progress = _Pressed(self), CellProgress(self._progress_line)
        with interrupts(pressed.first, pressed.second):
            while not self._standing.wait(0.1):
                progress.tick()
                if self._given_up() or (deadline is not None and time.monotonic() >= deadline):
                    break
            progress.tick(done=not self._standing.active and self._standing.error is None)
        return self._after_waiting(pressed.aborted)

    async def wait_async(self, timeout: float | None = None) -> Self:
        """The same for a cell that awaits: it shows how far the run is."""
        self._require_outside("wait_async")
        deadline = None if timeout is None else time.monotonic() + timeout

        async def waiting() -> None:
            while self._standing.active and not self._given_up():
                await asyncio.sleep(0.05)
                if deadline is not None and time.monotonic() >= deadline:
                    return

        pressed = _Pressed(self)
        with interrupts(pressed.first, pressed.second):
            await watch_progress(waiting(), self._progress_line)
        return self._after_waiting(pressed.aborted)

    def _after_waiting(self, aborted: bool) -> Self:
        if self._shown is not None and in_notebook():
            self._shown.draw()
        if aborted:
            raise KeyboardInterrupt
        if not self._standing.active and self._standing.error is not None:
            raise self._standing.error
        return self

    # ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def panel(self) -> Any:
        """The control panel: state and progress, buttons, the live settings with what they would do, the reward curve, the
        newest epochs, the log. Shown again, in any cell, it is another view of the same panel; `close()` takes it away.
        Where nobody would see widgets (nbclient, a script), the same without them."""
        from .helm import panel_of

        return panel_of(self)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _end_work(self) -> None:
        """Ends what is running, for good."""
        if self._standing.active:
            self.abort()
            self._standing.wait(ABORT_SECONDS)
        self._standing.move("close")


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
