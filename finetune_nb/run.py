"""Run: the notebook's handle on a finetuning run; here, how one is made: from functions, from YAML, from disk.

Running and steering it is live_run.py's, its folder run_on_disk.py's, tables and plots are run_views.py's.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import Config, CurriculumSettings, FinetuneRunConfig
from .controls import Controls
from .driver import Driver
from .engine import EngineThread
from .errors import ConfigError
from .from_folder import config_of
from .from_functions import from_functions
from .interfaces import Trainer, TrainerAdapter, TrajectoryBuilder
from .journal_file import read_journal
from .live_fields import live_fields
from .live_run import LiveRun
from .loading import load_config
from .observe import resolve
from .recorder import take_up
from .registry import Builder
from .run_on_disk import free_id
from .sinks import MetricsSink
from .states import Standing, State
from .store import RunStore

__all__ = ["Run"]

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


@atexit.register
def close_all() -> None:
    """Closes every run that is open."""
    for run in list(_open_runs):
        try:
            run.close()
        except Exception:  # at exit there is nobody left to tell
            pass
