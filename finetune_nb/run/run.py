"""Run: the notebook's handle on a finetuning run; here, how one is made: from functions, from YAML, from disk.

Running and steering it is live_run.py's, its folder run_on_disk.py's, tables and plots are run_views.py's.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..components.builder import Builder
from ..components.loading import load_config
from ..config.sections import Config, FinetuneRunConfig
from ..engine.driver import Driver
from ..engine.epoch_record import partial_record
from ..engine.live_settings import Controls, LiveField, live_fields, read_journal
from ..engine.run_writer import take_up
from ..engine.sinks import MetricsSink
from ..engine.state import Standing, State
from ..errors import ConfigError, EpochAborted, FinetuneError, RunError, did_you_mean
from ..hooks import resolve
from ..interfaces import Trainer, TrainerAdapter, TrajectoryBuilder
from ..notebook.display import CellProgress, CellRecord, ProgressLine, watch_progress
from ..notebook.kernel import in_notebook, interrupts, place
from ..redaction import error_text, redact_exception
from ..store import runs as shelf
from ..store.durable import size_of
from ..store.folder import checkpoints
from ..store.reader import RunReader
from ..store.runs import free_id
from ..store.store import RunStore
from ..text import cut, duration, plain
from ..threads import EngineThread, Launched, before_exit
from ..tripwires import Tripwire, tripped
from ..types import Change, CurriculumSettings, Epoch, RolloutFailure, Trajectory, Validation
from ..views.summary import epoch_text
from .history import RunViews
from .opening import branch_of, config_of, copy_for_fork, from_functions, make_fork
from .session import ABORT_SECONDS, T, _inside, _Pressed

if TYPE_CHECKING:
    from ..llms.client import ChatReply
    from ..rollouts.evaluation import Progress
    from ..training.preview import Basis, Preview

__all__ = [
    "LiveRun",
    "Run",
    "RunOnDisk",
    "RunProgress",
    "Steering",
]


class RunOnDisk(RunViews):
    """A run with its folder."""

    config: Config
    _store: RunStore | None
    """The folder as it was opened; None where this run made it, or has not yet."""
    _driver: Driver
    _controls: Controls
    _closed: bool
    _unable: str | None
    """Why it can be read, but not gone on with."""

    @abstractmethod
    def _take(self, config: Config, builder: Builder, run_id: str, store: RunStore | None) -> None:
        """Becomes the run of that config, with what its folder holds."""

    @abstractmethod
    def close(self) -> None:
        """Ends every component."""

    @property
    def records(self) -> Sequence[Epoch]:
        """One Epoch for each epoch that has ended, as of now: a run that goes on adds some while this is looked at."""
        return list(self._driver.epochs)

    def _told_on_disk(self) -> str | None:
        """What the folder says of a run that is only read here."""
        told = self._store.run_state if self._store is not None and self._driver.recorder is None else None
        return told if told in ("running", "paused", "interrupted", "failed", "archived") else None

    @property
    def folder(self) -> Path:
        """All that the run leaves behind."""
        return Path(self.config.finetuning.output_dir) / self.id

    def _stored(self) -> RunReader | None:
        """The folder to read from; None before the first epoch of a new run."""
        return self._driver.recorder.store if self._driver.recorder is not None else self._store

    @property
    def changes(self) -> Sequence[Change]:
        """The journal: every change of the live settings, in order."""
        store = self._stored()
        return self._controls.journal if store is None else store.journal()

    @property
    def partial(self) -> Epoch | None:
        """The epoch that has begun and is not complete, as far as the folder has it: aborted, failed, left behind by a
        kernel that died, or still running. Its rollouts may be unscored. Running the epoch again replaces it."""
        store = self._stored()
        found = store.partial() if store is not None else None
        return found and partial_record(found, self.id, self._controls.applied)

    @property
    def next_index(self) -> int:
        """The epoch that comes next, or is running."""
        return self._driver.next_index

    @property
    def writer(self) -> str | None:
        """Which other process writes this run at the moment; None where none does."""
        store = self._store if self._driver.recorder is None else None
        return None if store is None or self._closed else store.writer

    @property
    def model(self) -> str | None:
        """What is trained: in words where the policy tells, once it is loaded, else as the adapter's config says it."""
        if self._driver.policy_told is not None:
            return self._driver.policy_told
        adapter = self.config.trainer_adapters.get(self.config.finetuning.trainer_adapter or "")
        return getattr(adapter, "model", None)

    def _place(self) -> str:
        sizes = [size_of(path) for path in checkpoints(self.folder).values()]
        kept = f", of which {len(sizes)} checkpoint{'s' * (len(sizes) != 1)} {sum(sizes) / 1e6:.1f} MB" if sizes else ""
        return (
            f"{self.folder} ({size_of(self.folder) / 1e6:.1f} MB{kept})" if self.folder.is_dir() else str(self.folder)
        )

    def refresh(self) -> None:
        """Sees what another process has added to a run that it writes and this one reads. `writer` says who that is."""
        if self._store is not None and self._driver.recorder is None:
            self._store.refresh()
            self._driver.epochs = list(self._store.epochs)
            take_up(self._controls, self._store)

    # ── other runs ───────────────────────────────────────────────────────────────────────────────────────────────────

    def fork(
        self,
        epoch: int | None = None,
        *,
        curriculum: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        name: str | None = None,
        builder: TrajectoryBuilder | None = None,
        adapter: TrainerAdapter | None = None,
        trainer: Trainer | None = None,
    ) -> Self:
        """A new run that goes on behind an epoch of this one, from a copy of its weights and its curriculum's state.

            better = run.fork(epoch=5, curriculum=dict(percentile=0.8))

        Its first epoch has the next number and draws the same examples, so `ft.compare([run, better])` pairs them.
        epoch: None = the last one that is complete. curriculum: changes of the settings that were in force then; giving
        some switches the curriculum on unless they say `enabled`. training: other fields of the adapter's config. builder,
        adapter, trainer: new ones, where this run was given them as objects. Raises RunError where that epoch, or its
        weights, are not there.
        """
        if self._unable:
            raise RunError(self._unable)
        store, recorder = self._stored(), self._driver.recorder
        if store is None:
            raise RunError(f"run {self.id!r} has no epoch to go on from. Run one first, or make a new Run.")
        components = {"trajectory_builder": builder, "trainer_adapter": adapter, "trainer": trainer}
        config, again = copy_for_fork(self.config, self._driver.builder, training, components)
        branch = branch_of(store, epoch, curriculum, training)
        run_id = free_id(name or f"{self.id[:90]}-fork", self.folder.parent)
        if recorder is not None and not self._closed:
            recorder.forked(branch.epoch, run_id, branch.checkpoint)
        folder = self.folder.parent / run_id
        make_fork(store.folder, branch, folder, run_id, config.stored())
        run = type(self).__new__(type(self))
        run._unable = None
        run._take(config, again, run_id, RunStore.open(folder))
        return run

    def archive(self, checkpoints: bool = True) -> Path:
        """Closes the run and puts its folder away, into `archive` beside it; returns where. `ft.runs` does not list it
        there unless asked, and `Run.open` opens it as ever. checkpoints: False deletes them, which saves most of the room;
        the run can then be looked at, not gone on with. Raises StoreError where somebody else writes it."""
        self.close()
        folder = shelf.archive(self.folder, checkpoints)
        self.config.finetuning.output_dir, self.id = folder.parent, folder.name
        self._store = RunStore.open(folder)
        self._driver.recorder, self._driver.epochs = None, list(self._store.epochs)  # type: ignore[assignment]
        return folder

    def delete(self) -> None:
        """Closes the run and deletes its folder with all that is in it. Raises StoreError where somebody else writes it."""
        self.close()
        shelf.delete(self.folder)


class Steering(RunOnDisk):
    """A run whose settings can be changed while it goes on."""

    _basis: Basis | None = None

    @property
    def curriculum(self) -> CurriculumSettings:
        """The settings that the next selection uses. Set it to a dict of changes, or to whole CurriculumSettings: they
        count from the next selection, also that of an epoch whose rollouts are running. A dict switches the curriculum on
        unless it says `enabled`. A percentile that is set stays ("manual") until `schedule="automatic"`."""
        self._driver.require_single_epochs()
        return self._controls.curriculum

    @curriculum.setter
    def curriculum(self, changes: Mapping[str, Any] | CurriculumSettings) -> None:
        self._driver.require_single_epochs()
        self._change(_switched_on(changes))

    @property
    def live(self) -> dict[str, Any]:
        """The settings of components that may be changed while the run goes on, by name: `adapter.learning_rate`, ..."""
        return {field.name: field.value for field in self._controls.live_fields}

    @live.setter
    def live(self, changes: Mapping[str, Any]) -> None:
        if unknown := [name for name in changes if name not in self.live]:
            raise ConfigError(f"{unknown[0]!r} cannot be changed live. {did_you_mean(unknown[0], self.live)}")
        self._change(changes)

    def _change(self, changes: Mapping[str, Any] | CurriculumSettings) -> None:
        self._controls.change(changes)
        self._write_journal()

    def _write_journal(self) -> None:
        """Writes down what was asked for."""
        if self._driver.is_open:
            self._driver.recorder.journal(self._controls)

    @property
    def live_fields(self) -> tuple[LiveField, ...]:
        """The same with limits and descriptions."""
        return self._controls.live_fields

    # ── before it is done ────────────────────────────────────────────────────────────────────────────────────────────

    def preview(self, changes: Mapping[str, Any] | CurriculumSettings | None = None, **more: Any) -> Preview:
        """What other curriculum settings would do: `run.preview(percentile=0.5)`. Nothing is changed.

        The next selection is made on the newest epoch's rewards, with these settings and with those that are in force:
        which groups enter and leave, and why; trajectories, tokens and seconds of training. Shows itself as a card. Raises
        RunError before the first epoch, ConfigError for settings that do not fit.
        """
        from ..training.preview import preview

        self._driver.require_single_epochs()
        if not isinstance(changes, CurriculumSettings):
            changes = {**(changes or {}), **more}
        asked = self._controls.curriculum
        settings = asked.updated(_switched_on(changes)) if changes else asked
        basis = self._preview_basis()
        if basis is None:
            raise RunError("there is nothing to preview on: no epoch has ended yet. Run one, then ask again.")
        return preview(basis, self._controls.applied, asked, settings, self.config.run.seed)

    def _preview_basis(self) -> Basis | None:
        """What previews are made on: put together once an epoch."""
        from ..training.preview import basis_of

        newest, basis = next(reversed(self.records), None), self._basis
        if newest is not None and (basis is None or basis.statistics is not newest.statistics):
            self._basis = basis = basis_of(newest)
        return basis


def _switched_on(changes: Mapping[str, Any] | CurriculumSettings) -> Mapping[str, Any] | CurriculumSettings:
    return changes if isinstance(changes, CurriculumSettings) else {"enabled": True, **changes}


class RunProgress(Steering):
    """A run that tells how it stands."""

    _standing: Standing
    _planned: int | None = None

    @property
    def error(self) -> str | None:
        """What the last epoch raised; None once another one begins."""
        error = self._standing.error
        return None if error is None else error_text(error)

    @property
    def progress(self) -> Progress:
        """How far the running epoch is."""
        return self._driver.progress

    @property
    def planned(self) -> int:
        """The epoch before which `start` will end, or has ended."""
        return self._planned or self.config.finetuning.num_epochs

    @property
    def notice(self) -> str | None:
        """Why it is paused, or what it is about to do."""
        return self._standing.notice

    def log_lines(self, count: int = 20) -> list[str]:
        """The last lines of the run's log."""
        store = self._stored()
        return [] if store is None else [_line(event) for event in store.events(last=count)]

    @property
    def state(self) -> str:
        """See states.State; of a run that is only read here also interrupted (its process ended in the middle of an
        epoch), archived, or what the process that writes it is doing."""
        if not self._closed and self._standing.state in (State.NEW, State.READY):
            told = self._told_on_disk()
            if told is not None:
                return told
        return str(State.CLOSED if self._closed else self._standing.state)

    def _progress_line(self, done: bool) -> ProgressLine:
        progress, epochs = self._driver.progress, self._driver.epochs
        if done and epochs:
            return ProgressLine(epoch_text(epochs[-1]), progress.done, progress.total)
        left_out = f", {progress.failed} failed" if progress.failed else ""
        # Not every builder tells how many rollouts there will be.
        far = f"{progress.done} of {progress.total} rollouts{left_out}" if progress.total else ""
        reached, total = progress.done, progress.total
        if progress.phase == "training" and progress.job:
            far, reached, total = plain(cut(progress.job, 80)), round(progress.trained), 100
        parts = [f"epoch {self.next_index}", progress.phase or "starting", far, duration(progress.seconds), self.notice]
        return ProgressLine("  ".join(filter(None, parts)), reached, total)


def _line(event: Mapping[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event.get("time", 0.0)))
    told = {
        key: value
        for key, value in event.items()
        if key not in ("time", "kind", "traceback", "level", "logger", "text")
    }
    text = event.get("text") or " ".join(f"{key}={value}" for key, value in told.items() if value is not None)
    return f"{clock} {event.get('level', event['kind'])} {text}"


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
        from ..notebook.panel import panel_of

        return panel_of(self)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _end_work(self) -> None:
        """Ends what is running, for good."""
        if self._standing.active:
            self.abort()
            self._standing.wait(ABORT_SECONDS)
        self._standing.move("close")


_open_runs: weakref.WeakSet[Run] = weakref.WeakSet()


class Run(LiveRun):
    """A finetuning run, from plain functions; `Run.from_config` makes one from a YAML file.

        run = ft.Run(solve, correct, dataset="train.json", generations=8)
        epoch = await run.next_epoch()

    workflow: your agent, `async def solve(question, llm)` or a sync function; parameters are filled by name (`question`,
        `llm`, `item`, or a column of the dataset).
    reward: `def correct(item) -> float`, sync or async; `item` carries input_obj, expected_output_obj, output_obj, trajectory.
    dataset: a JSON, JSONL, CSV or Parquet file, a list of dicts, or a DataFrame.
    model: "embedded" (a tiny transformer that learns on a CPU), or the directory or name of a Hugging Face causal LM.
    generations: rollouts of each example, the size of a group.
    examples_per_epoch: examples drawn for an epoch; None = all.
    validation: a second dataset, evaluated before every `validation_interval`-th epoch and after the last one.
    num_epochs: how many are planned; you may run fewer or more.
    evaluators: more functions of the item, by name; their means are shown beside the reward.
    curriculum: fields of CurriculumLearningConfig; giving it switches the curriculum on unless it says `enabled`.
    sampling: temperature, max_tokens, stop. training: fields of the trainer adapter's config (learning_rate, ...).
    max_concurrency: rollouts at once. item_timeout: seconds a rollout may take. retries: after transient failures.
    seed: of draws, sampling and training. deterministic: a repeat is equal to the last digit.
    engine: "local" (this process), "ray" (a Ray cluster of this machine), "ray:auto" or "ray:HOST:PORT" (one that runs).
    ray: fields of RaySettings (workers, worker_gpus, runtime_env, ...).
    name: the run's id and the name of its folder in `output_dir`; a number is added where that exists.
    resume: "auto" goes on with the run of that name where its record ends, if there is one ("never": a new one).
    replay: a journal that `export("journal.yaml")` wrote: its changes are made again, each in the epoch that used it.
    sinks: where each epoch's numbers go beside the run's folder: WandbSink(trackio), JsonlSink(path), or your own.
    builder, adapter, trainer: components of your own in place of ours.
    """

    def __init__(
        self,
        workflow: Callable[..., Any] | None = None,
        reward: Callable[..., Any] | None = None,
        dataset: Any = None,
        *,
        model: str = "embedded",
        generations: int = 8,
        examples_per_epoch: int | None = None,
        validation: Any = None,
        validation_interval: int = 5,
        evaluators: Mapping[str, Callable[..., Any]] | None = None,
        curriculum: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        num_epochs: int = 20,
        max_concurrency: int = 64,
        item_timeout: float | None = None,
        retries: int = 0,
        seed: int = 0,
        deterministic: bool = False,
        engine: str = "local",
        ray: Mapping[str, Any] | None = None,
        name: str | None = None,
        resume: str = "never",
        replay: str | Path | None = None,
        output_dir: str | Path = "runs",
        sinks: Sequence[MetricsSink] = (),
        builder: TrajectoryBuilder | None = None,
        adapter: TrainerAdapter | None = None,
        trainer: Trainer | None = None,
    ) -> None:
        config, components = from_functions(
            workflow,
            reward,
            dataset,
            model=model,
            generations=generations,
            examples_per_epoch=examples_per_epoch,
            validation=validation,
            validation_interval=validation_interval,
            evaluators=evaluators or {},
            curriculum=curriculum,
            sampling=sampling or {},
            training=training or {},
            num_epochs=num_epochs,
            max_concurrency=max_concurrency,
            item_timeout=item_timeout,
            retries=retries,
            seed=seed,
            deterministic=deterministic,
            engine=engine,
            ray=ray or {},
            output_dir=str(output_dir),
            builder=builder,
            adapter=adapter,
            trainer=trainer,
        )
        self._make(config, components, name, resume, replay)
        self.sinks.extend(sinks)

    @property
    def sinks(self) -> list[MetricsSink]:
        """Where each epoch's numbers go beside the run's folder: append to it, also while the run is live. One that fails
        or hangs is a warning. See sinks.py."""
        return self._driver.sinks

    @classmethod
    def from_config(
        cls,
        config: str | Path | Mapping[str, Any] | Config,
        *,
        name: str | None = None,
        resume: str = "never",
        replay: str | Path | None = None,
        **overrides: Any,
    ) -> Run:
        """A run from the YAML of the NeMo Agent Toolkit's finetuning harness.

        name, resume, replay: as in Run.
        overrides: values for single settings by dotted path, dots written as two underscores: `run__seed=1`,
        `finetuning__num_epochs=3`. Raises ConfigError, which lists everything that is wrong with the config.
        """
        config = load_config(config, override=[(key.replace("__", "."), value) for key, value in overrides.items()])
        if config.builder is not None:
            raise ConfigError("this Config belongs to an open run already. Load it again for another one.")
        run = cls.__new__(cls)
        run._make(config, Builder(config), name, resume, replay)
        return run

    @classmethod
    def from_nat(
        cls,
        config: str | Path,
        *,
        dataset: str | Path | None = None,
        override: Iterable[tuple[str, Any]] = (),
        validation: str | Path | None = None,
        validation_interval: int = 5,
        name: str | None = None,
        resume: str = "never",
        output_dir: str | Path | None = None,
        **command_line: Any,
    ) -> Run:
        """A run over the NeMo Agent Toolkit's own components: its workflow, evaluators, trainer, builder and adapter, from
        the config that `nat finetune --config_file` takes, unchanged.

            run = ft.Run.from_nat("config.yml", override=[("finetuning.num_epochs", 5)])

        dataset, validation: files in place of the config's. override: pairs of dotted path and value, as `nat finetune
        -o`. output_dir: where run folders are made, in place of `finetuning.output_dir`. name, resume: as in Run.
        command_line: result_json_path, endpoint, endpoint_timeout, validation_config_file. Raises ConfigError for what
        keeps the installed Toolkit from working, with the pin that heals it; MissingExtra where it is not installed.
        """
        settings = resolve("finetune_nb.backends.nat.run:settings_of")(
            config,
            override,
            output_dir,
            dataset=dataset,
            validation_dataset=validation,
            validation_interval=validation_interval,
            **command_line,
        )
        return cls.from_config(settings, name=name, resume=resume)

    @classmethod
    def open(
        cls,
        path: str | Path,
        workflow: Callable[..., Any] | None = None,
        reward: Callable[..., Any] | None = None,
        *,
        dataset: Any = None,
        validation: Any = None,
        evaluators: Mapping[str, Callable[..., Any]] | None = None,
    ) -> Run:
        """A run from its folder: to look at, and to go on with where its record ends.

        A run that lives in this kernel is returned itself; one that has only been read gives way where functions are
        passed. What no file can hold must be passed again to go on: plain functions, and datasets that were lists or
        DataFrames. Reading needs no backend, and disturbs nobody who writes; `refresh` sees what they have added. Raises
        StoreError for a folder that holds no run, or a damaged one.
        """
        folder, given = Path(path), any(part is not None for part in (workflow, reward, dataset))
        for live in sorted(_open_runs, key=lambda run: run._driver.recorder is None):  # whoever writes it comes first
            if live.folder.resolve() != folder.resolve():
                continue
            if live._driver.recorder is not None or not given:
                live.refresh()  # one that is only read here may have been written on meanwhile
                return live
        scores = {"reward": reward, **(evaluators or {})} if reward is not None else dict(evaluators or {})
        datasets = {"train": dataset, "validation": validation}
        store = RunStore.open(folder)
        run = cls.__new__(cls)
        config, builder, run._unable = config_of(store, workflow, scores, datasets)
        run._take(config, builder, folder.name, store)
        return run

    def _make(self, config: Config, builder: Builder, name: str | None, resume: str, replay: str | Path | None) -> None:
        if resume not in ("never", "auto"):
            raise ConfigError(f"resume is {resume!r}; expected 'never' or 'auto'.")
        if resume == "auto" and name is None:
            raise ConfigError("resume='auto' goes on with the run of that name: give it one, name='...'.")
        changes = read_journal(replay) if replay is not None else []
        self._unable = None
        output_dir = Path(config.finetuning.output_dir)
        run_id = free_id(name, output_dir)  # also checks the name
        if resume == "auto" and name is not None:
            there = RunStore.exists(output_dir / name)
            self._take(config, builder, name, RunStore.open(output_dir / name) if there else None)
        else:
            self._take(config, builder, run_id, None)
        self._controls.repeat(changes)

    def _take(self, config: Config, builder: Builder, run_id: str, store: RunStore | None) -> None:
        run_config = config.finetuning.run_configuration or FinetuneRunConfig()
        config.finetuning.run_configuration = run_config
        run_config.config_file = config
        config.builder = builder
        self.id = run_id
        self.config = config
        self._store = store
        curriculum = CurriculumSettings.from_config(config.finetuning.curriculum_learning)
        self._controls = Controls(curriculum, live_fields(config))
        if store is not None:
            take_up(self._controls, store)
        epochs, first = (store.epochs, store.next_index) if store is not None else ((), 0)
        self._standing = Standing(State.READY if epochs else State.NEW)
        self._driver = Driver(config, builder, self.id, self._controls, self._standing, epochs, first)
        self._turn = threading.RLock()
        self._engine = EngineThread(f"ft-{self.id}")
        self._closed = False
        self.tripwires = []
        _open_runs.add(self)
        # The cell that made the run is run again, say: nobody holds the old one, and its components must end.
        self._left = weakref.finalize(self, self._engine.close_in_background, self._driver.close)
        self._left.atexit = False  # close_all does it then, and waits

    def close(self) -> None:
        """Ends every component, once, and an epoch that is running. The records can still be read. Also done at the
        interpreter's exit, and when nobody holds the run any more."""
        if self._closed:
            return
        self._require_outside("close")
        self._closed = True
        self._end_work()
        _open_runs.discard(self)
        self._left.detach()
        self.config.builder = None
        self._engine.close_after(self._driver.close)

    async def __aenter__(self) -> Run:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)


@before_exit
def close_all() -> None:
    """Closes every run that is open."""
    for run in list(_open_runs):
        try:
            run.close()
        except Exception:  # at exit there is nobody left to tell
            pass
