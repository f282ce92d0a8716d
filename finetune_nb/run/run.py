"""Run: the notebook's handle on a finetuning run, from plain functions, from YAML, or from its folder."""

from __future__ import annotations

import functools
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..components.builder import Builder
from ..components.environments import environment_from
from ..components.environments import section_of as describe_environment
from ..components.loading import load_config
from ..config.base import changed
from ..config.sections import Config, FinetuneRunConfig
from ..engine.continuation import fingerprints, given_components, recorded_components, reward_digest
from ..engine.driver import Driver
from ..engine.epoch_record import partial_record, require_rewards
from ..engine.examples_seen import SeenExamples
from ..engine.live_settings import LiveField, LiveSettings, LiveValues, live_fields, read_journal
from ..engine.run_writer import restore_settings
from ..engine.sinks import MetricsSink
from ..engine.state import ACTIVE, RunState, RunStatus, State
from ..errors import ConfigError, FinetuneError, RunError, StoreError
from ..interfaces import Trainer, TrainerAdapter, TrajectoryBuilder
from ..notebook.display import CellRecord, ProgressLine
from ..notebook.kernel import in_notebook
from ..redaction import error_text, redacting_logger
from ..rewards.functions import Rewards, evaluators_from
from ..rollouts.demonstrations import read_demonstrations
from ..rollouts.difficulty import DifficultySettings, Visits
from ..rollouts.trajectory_builder import EvalTrajectoryBuilderConfig, draw_of
from ..store.batches import DecodedBatches
from ..store.checkpoints import weights_of_epochs
from ..store.durable import size_of
from ..store.folder import checkpoints
from ..store.labels import read_labels
from ..store.reader import RunReader
from ..store.runs import archive_run, delete_run, free_id
from ..store.store import RunStore
from ..text import count, cut, duration, plain
from ..threads import before_exit, in_daemon_thread, run_sync
from ..tripwires import Tripwire, tripped
from ..types import (
    Change,
    CurriculumSettings,
    Demonstrations,
    Epoch,
    EvalInputItem,
    RolloutFailure,
    SamplingParams,
    Trajectory,
    Validation,
    WarmUpSettings,
)
from ..views.summary import epoch_text
from .epoch_weights import EpochWeights, changes_of
from .history import RunHistory
from .labelling import names_in
from .opening import Obstacle, branch_of, components_from, config_of, copy_for_fork, make_fork
from .service_checkpoints import forget_checkpoints
from .session import ScriptLines, Session

if TYPE_CHECKING:
    import pandas as pd

    from ..analysis.agreement import Agreement
    from ..analysis.diagnosis import Diagnosis
    from ..analysis.rescoring import RescoredEpoch, Rescoring
    from ..llms.client import ChatReply
    from ..rewards.labels import Tags
    from ..rollouts.evaluation import Progress
    from ..saving.saved_model import SavedModel
    from ..training.preview import Preview
    from .rescoring import NewestEpoch

__all__ = [
    "Run",
]

logger = redacting_logger(__name__)
_open_runs: weakref.WeakSet[Run] = weakref.WeakSet()
_FOREIGN_STATES = ("running", "paused", "interrupted", "failed", "archived")
"""What a folder may say of a run that this process only reads."""


class Run(RunHistory):
    """A finetuning run, from plain functions; `Run.from_config` makes one from a YAML file.

        run = ft.Run(solve, correct, dataset="train.json", generations=8)
        epoch = await run.next_epoch()

    Args:
        workflow: Your agent, `async def solve(question, llm)` or a sync function; parameters are filled by name
            (`question`, `llm`, `item`, or a column of the dataset).
        reward: `def correct(output, answer) -> float`, sync or async; parameters are filled by name (`question`, `output`,
            `item`, `trajectory`, `group`, or a column of the dataset). It returns a number, None where there is no reward, a
            dict of scores that are added up, or a list with one number a sampled turn. Several rewards are a list, or a dict
            of functions or (function, weight): the weighted sum is the reward. See also `group_reward` and `from_trl`.
        dataset: A JSON, JSONL, CSV or Parquet file, a list of dicts, a DataFrame, or a Dataset of Hugging Face.
        env: Somebody else's environment, of which agent, reward and dataset are taken where they are not given here: a name
            such as "reasoning_gym:basic_arithmetic", or an object or a class of the environment's own.
        env_options: How it is used, such as {"size": 200}: see the reference of environments.
        question: The column that is the agent's `question`. Default: "question" or, as in TRL, "prompt", if there is one.
        answer: The column that is the item's expected output. Default: "answer" or, as in TRL, "solution", if
            there is one.
        model: "embedded" (a tiny transformer that learns on a CPU), or the directory or name of a Hugging Face causal LM.
        generations: Rollouts of each example, the size of a group.
        examples_per_epoch: Examples drawn for an epoch; None: all.
        draw: Which they are: "uniform", or "difficulty": those whose pass rate is near 0.5, while solved ones rest. A mapping
            draws by difficulty, too: target_rate, rate_width, rest_epochs.
        validation: A second dataset, evaluated before every `validation_interval`-th epoch and after the last one.
        validation_interval: Epochs between two validations.
        evaluators: More functions of the item, by name; their means are shown beside the reward.
        curriculum: Fields of CurriculumLearningConfig; giving it switches the curriculum on unless it says `enabled`.
        sampling: Sampling parameters: temperature, max_tokens, stop.
        tool_parser: The format in which the model calls tools, by the name that vLLM gives it ("hermes", "llama3_json",
            "mistral", ...). Default: the one that its tokenizer or its chat template shows.
        chat_template_kwargs: Variables of the model's chat template, such as {"enable_thinking": False}.
        training: Fields of the trainer adapter's config (learning_rate, ...).
        sampler: "vllm": a vLLM server of the run's own samples; "http://host:8000/v1": one that runs; a mapping: its settings.
            With training={"lora": {...}} it gets new weights in a moment. Default: this process samples by itself.
        num_epochs: How many epochs are planned; you may run fewer or more.
        max_concurrency: Rollouts at once.
        item_timeout: Seconds a rollout may take; None: no limit.
        retries: How often a rollout is tried again after a transient failure.
        seed: Seed of draws, sampling and training.
        deterministic: Whether a repeat is equal to the last digit.
        engine: "local" (this process), "ray" (a Ray cluster of this machine), "ray:auto" or "ray:HOST:PORT" (one that runs).
        ray: Fields of RaySettings (workers, worker_gpus, runtime_env, ...).
        gateway: Fields of GatewaySettings: ignore=["verbosity"] takes requests with options that sampling cannot honour.
        name: The run's id and the name of its folder in `output_dir`; a number is added where that exists. None: the time.
        resume: "auto" continues the run of that name where its record ends, if there is one; "never": a new one.
        replay: A journal that `export("journal.yaml")` wrote: its changes are made again, each in the epoch that used it.
        output_dir: The directory of run folders.
        sinks: Where each epoch's numbers go beside the run's folder: WandbSink(trackio), JsonlSink(path), or your own.
        builder: A trajectory builder of your own in place of ours.
        adapter: A trainer adapter of your own in place of ours.
        trainer: A trainer of your own in place of ours.

    Raises:
        ConfigError: Arguments do not go together, or one does not fit; the message lists everything that is wrong.
    """

    config: Config
    tripwires: list[Tripwire]
    """Asked after every epoch of `start`: one that answers pauses the run. See `finetune_nb.tripwires`."""

    # ── made from functions, YAML or a folder ────────────────────────────────────────────────────────────────────────

    def __init__(
        self,
        workflow: Callable[..., Any] | None = None,
        reward: Rewards | None = None,
        dataset: Any = None,
        *,
        env: Any = None,
        env_options: Mapping[str, Any] | None = None,
        question: str | None = None,
        answer: str | None = None,
        model: str = "embedded",
        generations: int = 8,
        examples_per_epoch: int | None = None,
        draw: str | Mapping[str, Any] = "uniform",
        validation: Any = None,
        validation_interval: int = 5,
        evaluators: Mapping[str, Callable[..., Any]] | None = None,
        curriculum: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        tool_parser: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        sampler: str | Mapping[str, Any] | None = None,
        num_epochs: int = 20,
        max_concurrency: int = 64,
        item_timeout: float | None = None,
        retries: int = 0,
        seed: int = 0,
        deterministic: bool = False,
        engine: str = "local",
        ray: Mapping[str, Any] | None = None,
        gateway: Mapping[str, Any] | None = None,
        name: str | None = None,
        resume: str = "never",
        replay: str | Path | None = None,
        output_dir: str | Path = "runs",
        sinks: Sequence[MetricsSink] = (),
        builder: TrajectoryBuilder | None = None,
        adapter: TrainerAdapter | None = None,
        trainer: Trainer | None = None,
    ) -> None:
        environment = None
        if env is not None:
            environment = environment_from(env, env_options)
            reward = None if reward is None else environment.adapt_reward(reward)
        elif env_options:
            raise ConfigError("env_options are options of an environment, and there is none: give env=, too.")
        elif builder is None and (workflow is None or reward is None or dataset is None):
            raise ConfigError(
                "Run needs workflow, reward and dataset, or an env= that has them, or a builder= of your own. See "
                "help(finetune_nb.Run)."
            )
        if adapter is not None and (training or sampler or model != "embedded"):
            raise ConfigError("adapter= brings its own model and settings: leave model=, sampler= and training= out.")
        scores, sections = evaluators_from(reward, evaluators)
        training = dict(training or {})
        if sampler is not None:
            training["sampler"] = sampler if isinstance(sampler, str) else dict(sampler)
        asking: dict[str, Any] = dict(sampling or {})
        if tool_parser is not None:
            asking["tool_parser"] = tool_parser
        if chat_template_kwargs is not None:
            asking["chat_template_kwargs"] = dict(chat_template_kwargs)
        settings: dict[str, Any] = {
            "llms": {"policy": {"_type": "policy", "adapter": "adapter", **asking}},
            "eval": {
                "general": {"max_concurrency": max_concurrency, "item_timeout": item_timeout, "retries": retries},
                "evaluators": sections,
            },
            "trajectory_builders": {
                "builder": {
                    "_type": "eval_traj_builder",
                    "num_generations": generations,
                    "examples_per_epoch": examples_per_epoch,
                    **({"draw": draw} if isinstance(draw, str) else {"draw": "difficulty", **draw}),
                }
            },
            "trainer_adapters": {"adapter": {"_type": "local_grpo", "model": model, **training}},
            "trainers": {"trainer": {"_type": "epoch_trainer"}},
            "finetuning": {
                "enabled": True,
                "trainer": "trainer",
                "trajectory_builder": "builder",
                "trainer_adapter": "adapter",
                "num_epochs": num_epochs,
                "output_dir": str(output_dir),
                "curriculum_learning": {"enabled": True, **curriculum} if curriculum is not None else {},
                "run_configuration": {"validation_interval": validation_interval},
            },
            "run": {
                "seed": seed,
                "deterministic": deterministic,
                "engine": engine,
                "ray": dict(ray or {}),
                "gateway": dict(gateway or {}),
            },
        }
        if workflow is not None:
            settings["workflow"] = {"_type": "python_function"}
        if environment is not None:
            settings["run"]["environment"] = describe_environment(env, env_options)
            settings.setdefault("workflow", {"_type": "environment"})
            sections.setdefault("reward", {"_type": "environment"})
        columns = {"question_key": question, "answer_key": answer}
        columns = {key: column for key, column in columns.items() if column is not None}
        if columns:
            settings["eval"]["general"]["dataset"] = {"_type": "json", "structure": columns}
        if "reward" in sections:
            settings["finetuning"]["reward_function"] = {"name": "reward"}
        config, components = components_from(
            settings,
            functions={"function": {} if workflow is None else {"workflow": workflow}, "evaluator": scores},
            rows={"train": dataset, "validation": validation},
            ready={"trajectory_builder": builder, "trainer_adapter": adapter, "trainer": trainer},
            environment=environment,
        )
        self._begin_or_continue(config, components, name, resume, replay)
        self.sinks.extend(sinks)

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
        """Make a run from the YAML of the NeMo Agent Toolkit's finetuning harness.

        Args:
            config: A YAML file, a mapping, or a Config.
            name: As in Run.
            resume: As in Run.
            replay: As in Run.
            **overrides: Values of single settings by dotted path, dots written as two underscores: `run__seed=1`,
                `finetuning__num_epochs=3`.

        Returns:
            The run.

        Raises:
            ConfigError: The message lists everything that is wrong with the config.
        """
        config = load_config(config, override=[(key.replace("__", "."), value) for key, value in overrides.items()])
        if config.builder is not None:
            raise ConfigError("this Config belongs to an open run already. Load it again for another one.")
        run = cls.__new__(cls)
        run._begin_or_continue(config, Builder(config), name, resume, replay)
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
        """Make a run over the NeMo Agent Toolkit's own components: its workflow, evaluators, trainer, builder and adapter.

            run = ft.Run.from_nat("config.yml", override=[("finetuning.num_epochs", 5)])

        Args:
            config: The file that `nat finetune --config_file` takes, unchanged.
            dataset: A file in place of the config's dataset.
            override: Pairs of dotted path and value, as in `nat finetune -o`.
            validation: A validation dataset in place of the config's.
            validation_interval: As in Run.
            name: As in Run.
            resume: As in Run.
            output_dir: The directory of run folders, in place of `finetuning.output_dir`.
            **command_line: result_json_path, endpoint, endpoint_timeout, validation_config_file.

        Returns:
            The run.

        Raises:
            ConfigError: Something keeps the installed Toolkit from working; the message names the pin that mends it.
            MissingExtra: The Toolkit is not installed.
        """
        from ..backends.nat.run import settings_of

        settings = settings_of(
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
        reward: Rewards | None = None,
        *,
        env: Any = None,
        dataset: Any = None,
        validation: Any = None,
        evaluators: Mapping[str, Callable[..., Any]] | None = None,
        builder: TrajectoryBuilder | None = None,
        adapter: TrainerAdapter | None = None,
        trainer: Trainer | None = None,
        trust: bool = False,
        override: Iterable[tuple[str, Any]] = (),
    ) -> Run:
        """Open a run from its folder: to look at it, and to continue it where its record ends.

        A run that is open in this kernel is returned itself; one that was only read is replaced where functions are passed.
        What no file can hold must be passed again to continue: plain functions, and datasets that were lists or DataFrames.
        Reading needs no backend and does not disturb whoever writes the run; `refresh` shows what they have added.

        A folder whose config.yml this user did not write (it came from elsewhere, or was edited) opens to be read: nothing in
        it is filled from the environment, contacted, loaded or deleted until it is trusted.

        Args:
            path: The run's folder.
            workflow: As in Run.
            reward: As in Run.
            env: As in Run; needed if it was given as an object or a class. Its options are those of the record.
            dataset: As in Run.
            validation: As in Run.
            evaluators: As in Run.
            builder: As in Run; needed if the run was made with one.
            adapter: As in Run; needed if the run was made with one.
            trainer: As in Run; needed if the run was made with one.
            trust: True: you have read config.yml, and let it name hosts, files, models and environment variables. The folder
                is then signed with a key of your own and needs no `trust` again, until somebody else changes config.yml.
            override: Of a run made by `from_nat`, as there: a credential that was overridden is not stored and is given again.

        Returns:
            The run.

        Raises:
            StoreError: The folder holds no run, or a damaged one.
            ConfigError: `override` was given for a run that is running here, or that was not made by `from_nat`.
        """
        folder = Path(path)
        given = (workflow, reward, dataset, env, builder, adapter, trainer)
        override = list(override)
        functions_given = bool(override) or any(part is not None for part in given)
        # A run that is written here comes before one that is only read.
        for run in sorted(_open_runs, key=lambda run: run._driver.writer is None):
            if run.folder.resolve() != folder.resolve():
                continue
            trusted_now = trust and run._unable is not None and run._unable.untrusted
            if run._driver.writer is not None and override:
                raise ConfigError(
                    f"override: run {run.id!r} is open here with its settings. Close it first: run.close()."
                )
            if run._driver.writer is not None or not (functions_given or trusted_now):
                run.refresh()
                return run
        store = RunStore.open(folder)
        datasets = {"train": dataset, "validation": validation}
        ready = {"trajectory_builder": builder, "trainer_adapter": adapter, "trainer": trainer}
        config, components, unable = config_of(
            store, workflow, reward, evaluators, datasets, trust, ready, override, env
        )
        run = cls.__new__(cls)
        run._setup(config, components, folder.name, store, unable)
        return run

    def _begin_or_continue(
        self, config: Config, components: Builder, name: str | None, resume: str, replay: str | Path | None
    ) -> None:
        """A new run, or with resume="auto" the one of that name where its record ends."""
        if resume not in ("never", "auto"):
            raise ConfigError(f"resume is {resume!r}; expected 'never' or 'auto'.")
        if resume == "auto" and name is None:
            raise ConfigError("resume='auto' continues the run of that name: give it one, name='...'.")
        changes = read_journal(replay) if replay is not None else []
        output_dir = Path(config.finetuning.output_dir)
        run_id = free_id(name, output_dir)  # also checks the name
        store = None
        if resume == "auto" and name is not None:
            run_id = name
            self._take_over(output_dir / name)
            if RunStore.exists(output_dir / name):
                store = RunStore.open(output_dir / name)
        self._setup(config, components, run_id, store)
        self._settings.replay(changes)

    def _take_over(self, folder: Path) -> None:
        """Ends the run of that folder that is open in this kernel, as when its cell is run again. An epoch that is running is
        finished and recorded first; an interrupt leaves that run as it was."""
        for run in list(_open_runs):
            only_read = run._driver.writer is None and not run._session.state.active
            if only_read or run.folder.resolve() != folder.resolve():
                continue
            if run._session.state.active:
                run._session.ask_quietly("stop", "ends after this epoch: a new Run object continues it")
                try:
                    run.wait()
                except Exception as error:
                    logger.warning("the epoch that was running in the background ended with: %s", error_text(error))
            run.close()

    def _setup(
        self, config: Config, components: Builder, run_id: str, store: RunStore | None, unable: Obstacle | None = None
    ) -> None:
        """The only place where a run's attributes are set.

        Args:
            config: The run's config, which points back at its components.
            components: What makes them.
            run_id: The run's id.
            store: Its folder as it was opened; None: a new run.
            unable: Why the run can be read but not continued.
        """
        run_config = config.finetuning.run_configuration or FinetuneRunConfig()
        config.finetuning.run_configuration = run_config
        run_config.config_file = config
        config.builder = components
        self.id = run_id
        self.config = config
        self.tripwires = []
        self._store = store
        self._unable = unable
        self._closed = False
        self._planned: int | None = None  # the epoch before which `start` will end
        self._panel: Any = None
        self._newest: NewestEpoch | None = None
        self._seen = SeenExamples()
        self._epoch_weights = EpochWeights(config, components.added())

        self._settings = LiveSettings(
            CurriculumSettings.from_config(config.finetuning.curriculum_learning), live_fields(config)
        )
        epochs: Sequence[Epoch] = ()
        first = 0
        if store is not None:
            restore_settings(self._settings, store)
            epochs, first = store.epochs, store.next_index
        state = RunState(State.READY if epochs else State.NEW)
        self._driver = Driver(config, components, run_id, self._settings, state, epochs, first)
        self._settings.when_asked = self._driver.write_journal
        self._session = Session(run_id, self._driver, state)
        _open_runs.add(self)
        # When nobody holds the run any more (its cell was run again, say), its components must end all the same. At exit
        # `close_all` does that, and waits.
        self._left = weakref.finalize(self, self._session.engine.close_in_background, self._driver.close)
        self._left.atexit = False

    # ── what it is doing ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def status(self) -> RunStatus:
        """What the run is doing at this moment, as one value."""
        state, progress = self._state_name(), self._driver.progress
        error = self._session.state.error
        status = RunStatus(
            name=self.id,
            state=state,
            epochs=self.records,
            next_index=self.next_index,
            planned=self.planned,
            notice=self.notice,
            error=None if error is None else error_text(error),
            read_only=self._why_read_only(),
            writer=self.writer,
        )
        ahead = self._driver.ahead
        if state in ACTIVE and self._driver.at_work:
            return status.during(progress, ahead)
        # Between two epochs, in a pause say, the one that is sampled already is the one that runs.
        return status if state not in ACTIVE or ahead is None else status.during(ahead)

    def _state_name(self) -> str:
        state = self._session.state.state
        if self._closed:
            return str(State.CLOSED)
        # The folder may know more of a run that is only read here.
        if state in (State.NEW, State.READY) and self._store is not None and self._driver.writer is None:
            on_disk = self._store.run_state
            if on_disk in _FOREIGN_STATES:
                return on_disk
        return str(state)

    def _why_read_only(self) -> str | None:
        """Why the run cannot be steered here; None where it can."""
        if self._closed:
            return "This run is closed: it can only be looked at. Run.open continues it."
        if self._unable:
            return self._unable.text
        if self.writer:
            return f"Another process writes this run ({self.writer}): it can be looked at here, and steered there."
        try:
            self._driver.require_single_epochs()
        except RunError as error:
            return str(error)
        return None

    @property
    def state(self) -> str:
        """What the run is doing, in a word: see engine.state.State. A run that is only read here may also be interrupted (its
        process ended in the middle of an epoch) or archived, or shows what the process that writes it is doing."""
        return self._state_name()

    @property
    def error(self) -> str | None:
        """What the last epoch raised; None once another one begins."""
        return self.status.error

    @property
    def notice(self) -> str | None:
        """Why it is paused, or what it is about to do."""
        return self._session.state.notice or self._driver.components.doing

    @property
    def progress(self) -> Progress:
        """How far the running epoch is."""
        return self._driver.progress

    @property
    def planned(self) -> int:
        """The epoch before which `start` will end, or has ended."""
        return self._planned or self.config.finetuning.num_epochs

    @property
    def next_index(self) -> int:
        """The epoch that comes next, or is running."""
        return self._driver.next_index

    @property
    def writer(self) -> str | None:
        """Which other process writes this run at the moment; None where none does."""
        if self._closed or self._store is None or self._driver.writer is not None:
            return None
        return self._store.writer

    @property
    def model(self) -> str | None:
        """What is trained: in the policy's own words once it is loaded, before that as the adapter's config says it."""
        if self._driver.policy_told is not None:
            return self._driver.policy_told
        adapter = self.config.trainer_adapters.get(self.config.finetuning.trainer_adapter or "")
        return getattr(adapter, "model", None)

    def log_lines(self, count: int = 20) -> list[str]:
        """The last lines of the run's log.

        Args:
            count: How many, at most.

        Returns:
            The lines, oldest first.
        """
        store = self._stored()
        return [] if store is None else [_log_line(event) for event in store.events(last=count)]

    def _progress_line(self, done: bool) -> ProgressLine:
        """How far the run is, for a waiting cell. done: whether it has ended well."""
        progress, epochs = self._driver.progress, self._driver.epochs
        if done and epochs:
            return ProgressLine(epoch_text(epochs[-1]), progress.done, progress.total)
        text, reached, total = "", progress.done, progress.total
        if progress.phase == "training" and progress.job:
            text, reached, total = plain(cut(progress.job, 80)), round(progress.trained), 100
        elif progress.total:  # not every builder says how many rollouts there will be
            text = f"{progress.done} of {progress.total} rollouts"
            if progress.failed:
                text += f", {progress.failed} failed"
        ahead = self._driver.ahead
        parts = [
            f"epoch {self.next_index}",
            progress.phase or "starting",
            text,
            ahead and f"epoch {self.next_index + 1} rollouts {ahead.done} of {ahead.total}",
            duration(progress.seconds),
            self.notice,
        ]
        return ProgressLine("  ".join(filter(None, parts)), reached, total)

    # ── its records ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def records(self) -> Sequence[Epoch]:
        """One Epoch for each epoch that has ended, as of now: the list does not grow while it is looked at."""
        return list(self._driver.epochs)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.finetuning.output_dir) / self.id

    @property
    def parent(self) -> tuple[str, int] | None:
        """Of a fork: the name of the run it was made of, and the epoch of that run after which it begins."""
        store = self._stored()
        return None if store is None else store.parent

    @property
    def changes(self) -> Sequence[Change]:
        """The journal: every change of the live settings, in order."""
        store = self._stored()
        return self._settings.journal if store is None else store.journal()

    @property
    def partial(self) -> Epoch | None:
        """The epoch that has begun and is not complete, as far as the folder has it: aborted, failed, interrupted by a
        kernel that died, or still running. Its rollouts may be unscored. Running the epoch again replaces it."""
        return self.read_partial()

    def read_partial(self, decoded: DecodedBatches | None = None) -> Epoch | None:
        """Read `partial` again and again while it grows.

        Args:
            decoded: A dict that is kept from call to call, empty at first: what it holds is not decoded again.

        Returns:
            The record, in which nothing may be changed; None where there is no unfinished epoch.
        """
        store = self._stored()
        found = store.partial(decoded) if store is not None else None
        return found and partial_record(found, self.id, self._settings.applied)

    def partial_stamp(self) -> Any:
        """Ask whether `partial` has other rollouts, at little cost.

        Returns:
            A value that changes when they do; None where there is no unfinished epoch.
        """
        store = self._stored()
        return None if store is None else store.partial_stamp()

    def _stored(self) -> RunReader | None:
        """The folder to read from; None before the first epoch of a new run."""
        return self._driver.writer.store if self._driver.writer is not None else self._store

    def _place(self) -> str:
        if not self.folder.is_dir():
            return str(self.folder)
        try:
            sizes = [size_of(path) for path in checkpoints(self.folder).values()]
        except StoreError:  # a link in their place
            sizes = []
        kept = ""
        if sizes:
            kept = f", of which {len(sizes)} checkpoint{'s' * (len(sizes) != 1)} {sum(sizes) / 1e6:.1f} MB"
        return f"{self.folder} ({size_of(self.folder) / 1e6:.1f} MB{kept})"

    def refresh(self) -> None:
        """See what another process has added to a run that it writes and this one reads. `writer` says who that is."""
        if self._store is not None and self._driver.writer is None:
            self._store.refresh()
            self._driver.epochs = list(self._store.epochs)
            restore_settings(self._settings, self._store)

    # ── in a cell ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def next_epoch(self, *, progress: bool = True) -> Epoch:
        """Run one epoch: collect, select, train, record.

        In a script it is one line on standard error, and in a terminal a bar moves meanwhile.
        The first interrupt lets the epoch finish, and ends a loop around it; the second aborts it.

        Args:
            progress: False shows nothing in a script. A notebook is not affected.

        Returns:
            The epoch's record.

        Raises:
            RunError: Something of this run is running.
            JobFailed: The training job failed or was canceled; the record is in `.epoch`.
            BackendError: The training backend is not healthy.
            ConfigError: Something is wrong with the config.
            DatasetError: Something is wrong with the dataset.
            EpochAborted: `abort()` was called; what was collected until then is in `partial`.
        """
        self._require_open()
        return await self._session.run_in_cell(self._driver.next_epoch, self._progress_line, progress)

    async def train_on(self, rollouts: Any, *, tags: Tags | None = None) -> Epoch:
        """Train on recorded rollouts that you chose, by one training job of the run's adapter, recorded as an epoch.

            labels = run.labels()
            await run.train_on(labels[labels.tag == "good"])

        `local_grpo` and `trl_sft` learn them as they are: what the policy sampled in them becomes more likely, whatever their
        rewards. `trl_dpo` learns preferences, as `preferences` makes them of what the rollouts are worth, of each pair that
        differs. Learning rate, steps and passes are those of the adapter. The epoch's rollouts are copies of the chosen ones,
        each with the name that it was chosen by in its metadata; no others are made. The journal and the reward plot mark it.

        Args:
            rollouts: Names such as "e3/q17/2", or a frame with the column `trajectory` or `name`, of which each rollout counts
                once. For `trl_dpo`: as `labels` of `preferences`.
            tags: For `trl_dpo`: as in `preferences`.

        Returns:
            The epoch's record.

        Raises:
            ConfigError: The adapter cannot do this, and nothing was loaded; or the frame has no such column, or is empty.
            RunError: A name is of no rollout that finished, or something of this run is running.
            BackendError: The rollouts lack what training needs.
            JobFailed: The training job failed or was canceled; the record is in `.epoch`.
        """
        from .chosen import chosen_rollouts, preferences, values_in

        self._require_open()
        self._session.require_outside("train_on")
        await self._session.ask(self._driver.require_trains_on_chosen)
        await self._session.ask(self._driver.open)
        self._driver.require_single_epochs()
        if self._driver.adapter.takes_preferences:
            chosen = preferences(values_in(rollouts, tags), self._epoch, self.id, "all_pairs", max_pairs=10_000)
            told = count(sum(map(len, chosen.trajectories)), "preference")
        elif tags is not None:
            raise ConfigError(
                "tags= says what rollouts are worth, which matters for preferences alone: choose rows instead."
            )
        else:
            chosen = chosen_rollouts(names_in(rollouts), self._epoch, self.id)
            told = count(sum(map(len, chosen.trajectories)), "chosen rollout")
        if not chosen.trajectories:
            raise ConfigError("no rollout was chosen: there is no name.")
        return await self._session.run_in_cell(lambda: self._driver.train_on(chosen, told), self._progress_line)

    async def warm_up(
        self,
        demonstrations: Any,
        *,
        epochs: int = 1,
        learning_rate: float | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        held_out: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> Epoch:
        """Learn conversations that somebody wrote, before GRPO or between two epochs of it: supervised finetuning of the run's
        own weights, recorded as an epoch of the kind "warm_up".

            if not len(run):
                await run.warm_up([{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "=4"}]}])

        Learned is what the assistant would have sampled: its texts and tool calls, each with the token that ends its turn, in the
        prompts that a rollout would have. The loss is the mean cross entropy of these tokens in a step. The order of the rows is
        drawn by the run's seed. The steps are those of an AdamW of its own, which ends with the warm-up. The epoch takes a number
        of the run, has no rollouts and trains once; `epoch.warm_up` has its losses. If it is aborted or fails, the weights are as
        before it. `kl_coef` measures from the weights before it, as ever from those that the run began with.

        Args:
            demonstrations: Rows with `messages`, a list of OpenAI messages, and `tools` where there are any: a list of such rows
                or of lists of messages, a DataFrame, a Dataset of Hugging Face, or a JSON, JSONL or Parquet file. A message
                with "weight": 0 is not learned. A row that cannot be read or rendered is left out; its error is in
                `epoch.warm_up.errors`.
            epochs: Passes over all rows.
            learning_rate: Constant. Default: that of the trainer adapter.
            batch_size: Rows of one optimizer step.
            max_length: Tokens of a row that count; what comes after them is cut off. Default: as many as the model holds.
            held_out: More rows, of which only the loss is measured, before the first pass and after each.
            chat_template_kwargs: Variables of the chat template. Default: those of the run's llm.
            progress: As in `next_epoch`.

        Returns:
            The epoch's record.

        Raises:
            ConfigError: The adapter cannot do this, and nothing was loaded; or a setting does not fit.
            DatasetError: There are no such rows, or none that can be learned.
            RunError: Something of this run is running.
            JobFailed: The training job failed or was canceled; the record is in `.epoch`.
            EpochAborted: `abort()` was called.
        """
        self._require_open()
        self._session.require_outside("warm_up")
        if chat_template_kwargs is None:
            chat_template_kwargs = self._chat_template_kwargs()
        settings = WarmUpSettings(learning_rate, batch_size, epochs, max_length, dict(chat_template_kwargs))
        await self._session.ask(self._driver.require_warms_up)
        learned = await in_daemon_thread(read_demonstrations, demonstrations)
        other = Demonstrations() if held_out is None else await in_daemon_thread(read_demonstrations, held_out, True)

        def work() -> Coroutine[Any, Any, Epoch]:
            return self._driver.warm_up(learned, other, settings)

        return await self._session.run_in_cell(work, self._progress_line, progress)

    def _chat_template_kwargs(self) -> Mapping[str, Any]:
        """Those of the llm that samples what is trained."""
        adapter = self.config.finetuning.trainer_adapter
        for llm in self.config.llms.values():
            if getattr(llm, "adapter", None) == adapter:
                return getattr(llm, "chat_template_kwargs", {})
        return {}

    async def validate(self) -> Validation:
        """Evaluate the policy, as it is now, on the validation dataset.

        Returns:
            The evaluation. If it failed, its mean_reward is NaN and its `error` says why.

        Raises:
            RunError: There is no validation dataset, or something of this run is running.
            EpochAborted: `abort()` was called.
        """
        self._require_open()
        return await self._session.join(self._session.begin(self._driver.validate, fails=False))

    async def rollout(self, example: Any = 0, *, epoch: int | None = None) -> Trajectory | RolloutFailure:
        """Try one example: one rollout, scored and shown as a conversation, and recorded nowhere.

        Args:
            example: Its id, or its position in the dataset.
            epoch: With the weights as they were after this epoch, if a checkpoint of them is kept; negative counts from the
                newest. They are loaded beside those of the run, for this rollout alone. Default: the weights as they are now.

        Returns:
            The trajectory, or the failure.

        Raises:
            RunError: There is no such example, the weights are not kept, or the run's own trajectory builder runs a workflow that
                is not known here.
            IndexError: There is no such epoch.
            ConfigError: The run was given a component as an object, which cannot be loaded a second time.
        """
        if epoch is not None:
            return await self._rollout_after(self[epoch].index, example)
        self._require_open()
        return await self._session.ask(lambda: self._driver.rollout(example))

    async def _rollout_after(self, epoch: int, example: Any) -> Trajectory | RolloutFailure:
        """One rollout of a fork that is gone afterwards, and leaves nothing in the run's folder."""
        if self._unable:
            raise RunError(self._unable.text)
        store = self._stored()
        assert store is not None  # it has that epoch
        branch = branch_of(store, epoch, None, None)
        if branch.checkpoint is None and self[epoch].policy_versions[1] != 0:
            raise RunError(
                f"the weights after epoch {epoch} of run {self.id!r} are not kept: there is no checkpoint of them. "
                "run.rollout(example) uses the weights as they are now."
            )
        config, components = copy_for_fork(self.config, self._driver.components, None, {})
        with tempfile.TemporaryDirectory(prefix="finetune_nb-") as place:
            config.finetuning.output_dir = Path(place)
            folder = Path(place) / self.id
            await in_daemon_thread(lambda: make_fork(store.folder, branch, folder, self.id, config.stored()))
            run = type(self).__new__(type(self))
            run._setup(config, components, self.id, RunStore.open(folder))
            async with run:
                return await run.rollout(example)

    def kept_weights(self) -> list[int]:
        """List the epochs whose weights are available; see `logprob_change`.

        Returns:
            Their numbers, oldest first.
        """
        store = self._stored()
        return [] if store is None else list(weights_of_epochs(store))

    def token_changes(self, trajectory: Trajectory, epoch: int | None = None) -> list[list[float]]:
        """As `logprob_change`, of a trajectory at hand.

        Args:
            trajectory: A record, such as `run.show(name).trajectory`.
            epoch: As in `logprob_change`.

        Returns:
            For each sampled turn a list with one number a token, in nats.

        Raises:
            As `logprob_change`.
        """
        self._session.require_outside("logprob_change")
        if self._unable:
            raise RunError(self._unable.text)
        kept, store = self.kept_weights(), self._stored()
        if epoch is not None:
            epoch = self[epoch].index
        elif kept:
            epoch = kept[-1]
        if store is None or epoch is None:
            raise RunError(
                f"run {self.id!r} has no weights of an epoch yet. Run one, with run.checkpoint_every above 0, then ask again."
            )
        return changes_of(trajectory, self._epoch_weights.logprobs(store, epoch, trajectory))

    # ── examples ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def examples(self, columns: Sequence[str] | str | None = None) -> pd.DataFrame:
        """One row = one example of the dataset: how often it was drawn, its pass rate, and what it is to the next epoch.

        It is worked out from the rewards in the record. A fork counts its parent's epochs up to where it begins, unless it has
        another reward. Epochs of `train_on` and `warm_up` do not count. A missing reward is no reward of 0.

        Args:
            columns: Only these columns, in this order. Default: all.

        Returns:
            The frame; its columns are those of `frames.examples`. Where the dataset is not at hand, as in a run that is only
            read, it has the examples that were drawn.

        Raises:
            ConfigError: There is no such column.
        """
        from ..frames import examples

        settings = self._drawing({}).difficulty or DifficultySettings()
        return examples(self._visits(self.records), self.next_index, settings, self._example_ids(), columns)

    def preview_draw(self, **changes: Any) -> pd.DataFrame:
        """Which examples the next epoch draws, and which it would draw with other settings. Nothing is changed.

            run.preview_draw(target_rate=0.3, rest_epochs=10)

        Args:
            **changes: Settings of the trajectory builder: draw, target_rate, rate_width, rest_epochs, examples_per_epoch.
                Default: those in force, or asked for in `run.live`.

        Returns:
            The rows of `examples` that are drawn, in that order, with a column `change`: "enters" for one that is drawn only with
            the changes. Those that are drawn only without them come last, and have "leaves".

        Raises:
            ConfigError: There is no such setting, a value does not fit, or the run's builder does not draw examples.
            DatasetError: The dataset cannot be read.
        """
        if self._unable:
            raise RunError(self._unable.text)
        ids = self._driver.example_ids()
        then, unchanged = (self._draw(self._drawing(values), ids) for values in (changes, {}))
        frame = self.examples().iloc[[*then, *(place for place in unchanged if place not in set(then))]]
        enters, leaves = set(then) - set(unchanged), set(unchanged) - set(then)
        words = ["enters" if place in enters else "leaves" if place in leaves else "" for place in frame.index]
        return frame.assign(change=words).reset_index(drop=True)

    def _drawing(self, changes: Mapping[str, Any]) -> EvalTrajectoryBuilderConfig:
        """The trajectory builder's settings as the next epoch reads them, with changes."""
        name = self.config.finetuning.trajectory_builder
        section = self.config.trajectory_builders.get(name or "")
        if not isinstance(section, EvalTrajectoryBuilderConfig):
            if not changes:
                return EvalTrajectoryBuilderConfig()
            raise ConfigError("this run has a trajectory builder of its own, which draws the examples by itself.")
        asked = {
            field.name.partition(".")[2]: field.value
            for field in self._settings.live_fields
            if field.name.startswith("builder.")
        }
        return changed(section, {**asked, **changes}, "preview_draw")

    def _draw(self, drawing: EvalTrajectoryBuilderConfig, ids: Sequence[Any]) -> list[int]:
        """Positions of the examples that the next epoch draws by these settings."""
        if drawing.examples_per_epoch is None:
            return [*range(len(ids))]
        items = [EvalInputItem(id=each, input_obj="", expected_output_obj="", full_dataset_entry=None) for each in ids]
        adapter = self.config.trainer_adapters.get(self.config.finetuning.trainer_adapter or "")
        lag = min(getattr(adapter, "max_staleness", 0), 1)  # an epoch that is sampled ahead is drawn before that

        def visits_before(epoch: int) -> Visits:
            return self._visits([each for each in self.records if each.index < epoch - lag])

        draw = draw_of(drawing, drawing.examples_per_epoch, self.next_index, self.config.run.seed, visits_before)
        return [*draw(items)]

    def _visits(self, epochs: Sequence[Epoch]) -> Visits:
        store = self._stored()
        return self._seen.visits(epochs, self.changes, None if store is None else store.start())

    def _example_ids(self) -> Sequence[Any]:
        """Ids of the dataset, in its order; none where it is not at hand."""
        if self._unable or self._closed:
            return ()
        try:
            return self._driver.example_ids()
        except (FinetuneError, OSError):
            return ()

    async def chat(self, messages: Any, **options: Any) -> ChatReply:
        """Get the policy's reply.

        Args:
            messages: A text, or OpenAI messages.
            **options: tools, temperature, max_tokens, stop.

        Returns:
            The assistant's turn: its content, its tool calls, and why it ended.

        Raises:
            RunError: The workflow uses no llm, or is not known here.
        """
        self._require_open()
        return await self._session.ask(lambda: self._driver.chat(messages, **options))

    def save_model(
        self,
        directory: str | Path,
        *,
        push_to_hub: str | None = None,
        private: bool | None = None,
        gguf: str | None = None,
        llama_cpp: str | Path | None = None,
        **options: Any,
    ) -> SavedModel:
        """Write the trained model and its tokenizer, loadable by `from_pretrained`; as GGUF, and to the hub, where asked for.

        Args:
            directory: Where to.
            push_to_hub: "me/name": upload what was saved, with a model card, to that repository of the Hugging Face hub, by the
                token of its login or of HF_TOKEN. A README.md that you wrote, here or there, is kept.
            private: Whether a new repository is private. Default: public, unless your organization says otherwise.
            gguf: "f32", "f16", "bf16" or "q8_0": write model-q8_0.gguf beside the model, and a Modelfile for Ollama. Takes a
                checkout of llama.cpp, and the extra `gguf`.
            llama_cpp: The checkout. Default: the environment variable FINETUNE_NB_LLAMA_CPP.
            **options: Of the adapter's `save`; `merge=True` adds a LoRA adapter to the model's weights, which otherwise is
                written alone. `dtype="float32"` writes another dtype than the one that the model was stored in.

        Returns:
            What was saved. It is the path of the directory, and shows how large the model is and the lines that load it with
            transformers, vLLM and Ollama.

        Raises:
            BackendError: It cannot be written, because the disk is full for example; an older model there is then as it was. Or
                it cannot be converted or pushed; the model is then saved, and the same call can be made again.
            ConfigError: No GGUF can be made of this model, or nothing is there to make it. Nothing was saved then.
            RunError: The adapter cannot save its model, or the run itself called this.
        """
        from ..saving.card import training_of
        from ..saving.save import Extras, save

        self._require_open()
        self._session.require_outside("save_model")

        def write() -> Path:
            return Path(self._session.engine.submit(self._driver.save_model(str(directory), **options)).result())

        def describe(folder: Path) -> bool:
            return self._session.engine.submit(self._driver.save_description(str(folder), **options)).result()

        return save(
            write,
            describe,
            Path(directory),
            Extras(push_to_hub, private, gguf, llama_cpp),
            training=lambda: training_of(self.config, self.records),
            sampling=self._sampling(),
        )

    def _sampling(self) -> SamplingParams | None:
        """How the workflow's llm is sampled, if it says so."""
        from ..llms.client import PolicyLLMConfig

        llm = self.config.llms.get(self.config.llm_of_workflow or "")
        return llm.sampling() if isinstance(llm, PolicyLLMConfig) else None

    def _require_open(self) -> None:
        if self._closed:
            raise RunError(f"run {self.id!r} is closed: its records can be read, but nothing more can be run.")
        if self._unable:
            raise RunError(self._unable.text)

    # ── in the background ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, epochs: int | None = None) -> None:
        """Run epochs in the background, and return at once.

        In a notebook the cell keeps a display of the run, current at each epoch's end, which a saved notebook shows.
        `pause`, `resume`, `stop`, `abort` steer the run; `wait` waits for it and raises what it raised.

        Args:
            epochs: How many; None: those that are left of `num_epochs`.

        Raises:
            RunError: Something is running already, or no epoch is left.
        """
        self._require_open()
        first, planned = self._driver.next_index, self.config.finetuning.num_epochs
        count = planned - first if epochs is None else epochs
        if count < 1:
            raise RunError(
                f"found {count} epochs to run: the {planned} that were planned are done. Say how many more: "
                "run.start(epochs=5)."
            )

        async def run_epochs() -> None:
            session, state = self._session, self._session.state
            if await self._driver.trains_in_run():
                require_rewards(await self._driver.whole_run(count))
                return

            def goes_on(left: int) -> bool:
                return left > 0 and state.state is not State.STOPPING

            try:
                for left in reversed(range(count)):
                    epoch = await self._driver.next_epoch(functools.partial(goes_on, left))
                    session.show_record()
                    require_rewards(epoch)
                    reason = tripped(self.tripwires, self.records)
                    if reason is not None:
                        session.ask_quietly("pause", f"paused after epoch {epoch.index}: {reason}")
                        session.show_record()
                    await state.wait_while_paused()
                    # An epoch that is half sampled is finished: nothing of it is to be sampled again.
                    if state.state is not State.RUNNING and self._driver.ahead is None:
                        return
            finally:
                await self._driver.end_ahead()

        lines = ScriptLines(self._driver)
        if self._session.record is not None:
            self._session.record.settle()
        self._session.begin(run_epochs, in_background=True)
        self._session.lines = lines
        self._planned = first + count
        if in_notebook():
            self._session.record = CellRecord(self._record, {"text/plain": repr(self), "text/html": self._repr_html_()})

    def pause(self) -> None:
        """Hold the run at the next safe point: rollouts in progress finish, no others start."""
        self._session.state.transition("pause", "paused by hand")

    def resume(self) -> None:
        """Continue after a pause."""
        self._session.state.transition("resume")

    def stop(self) -> None:
        """End the run after the current epoch. If the next one is sampled already (`max_staleness: 1`), after that one."""
        half_done = self._driver.ahead is not None and self._driver.at_work
        notice = (
            f"ends after epoch {self.next_index + 1}, whose rollouts have begun"
            if half_done
            else "ends after this epoch"
        )
        self._session.state.transition("stop", notice)

    def abort(self) -> None:
        """End the running epoch at once; what was collected is kept, and shown by `partial`.

        Returns at once; a workflow that hangs in code of its own is abandoned in its thread.
        """
        self._session.abort()

    def wait(self, timeout: float | None = None, *, progress: bool = True) -> Self:
        """Wait until nothing is running.

        In a notebook the cell shows how far the run is. In a script each epoch is one line on standard error, and in a terminal
        a bar moves meanwhile.
        The first interrupt ends the run after the current epoch, the second aborts that.

        Args:
            timeout: Seconds to wait at most. Default: no limit.
            progress: False prints no lines in a script. A notebook is not affected.

        Returns:
            The run.

        Raises:
            RunError: The run itself called this, in a workflow, a reward or a tripwire.
            KeyboardInterrupt: A second interrupt aborted the epoch.
            Exception: What ended the run, such as JobFailed. An epoch that was aborted raises nothing.
        """
        self._session.wait(timeout, self._progress_line, progress)
        return self

    async def wait_async(self, timeout: float | None = None, *, progress: bool = True) -> Self:
        """Wait like `wait`, in a cell that awaits; it shows how far the run is.

        Args:
            timeout: Seconds to wait at most. Default: no limit.
            progress: False prints no lines in a script. A notebook is not affected.

        Returns:
            The run.

        Raises:
            RunError: The run itself called this, in a workflow, a reward or a tripwire.
            KeyboardInterrupt: A second interrupt aborted the epoch.
            Exception: What ended the run, such as JobFailed. An epoch that was aborted raises nothing.
        """
        await self._session.wait_async(timeout, self._progress_line, progress)
        return self

    # ── steering ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def curriculum(self) -> CurriculumSettings:
        """The settings that the next selection uses. Set it to a dict of changes, or to whole CurriculumSettings: they
        count from the next selection, also that of an epoch whose rollouts are running. A dict switches the curriculum on
        unless it says `enabled`. A percentile that is set stays ("manual") until `schedule="automatic"`."""
        self._driver.require_single_epochs()
        return self._settings.curriculum

    @curriculum.setter
    def curriculum(self, changes: Mapping[str, Any] | CurriculumSettings) -> None:
        self._driver.require_single_epochs()
        self._require_steerable()
        self._settings.change(changes)

    @property
    def live(self) -> LiveValues:
        """The settings of components that may be changed while the run continues, by name: `adapter.learning_rate`, ...

            run.live["adapter.learning_rate"] = 1e-5
            run.live = {"adapter.learning_rate": 1e-5, "llm.temperature": 0.8}

        Each counts from the next rollouts or the next training job, as `live_fields` says. A value that does not fit is
        refused, and so is an unknown name."""
        return LiveValues(lambda: self._settings.live_fields, self._change_live)

    @live.setter
    def live(self, changes: Mapping[str, Any]) -> None:
        if isinstance(changes, LiveValues) and changes == self.live:
            return  # the second half of `run.live |= changes`
        self.live.update(changes)

    def _change_live(self, changes: Mapping[str, Any]) -> None:
        self._require_steerable()
        self._settings.change(changes)

    def _require_steerable(self) -> None:
        """Raises RunError where a change would have no effect: the run is closed, or written by another process."""
        self._require_open()
        if self.writer:
            raise RunError(f"another process writes run {self.id!r} ({self.writer}): change its settings there.")

    @property
    def live_fields(self) -> tuple[LiveField, ...]:
        """The same with limits and descriptions."""
        return self._settings.live_fields

    def preview(
        self,
        changes: Mapping[str, Any] | CurriculumSettings | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        **more: Any,
    ) -> Preview:
        """What other curriculum settings would do: `run.preview(percentile=0.5)`. Nothing is changed.

        The next selection is made on the newest epoch's rewards, with these settings and with those that are in force.

        Args:
            changes: Changes of the settings, or whole CurriculumSettings.
            weights: Other weights of the reward's parts: `run.preview(weights={"format": 0.5})` adds up the recorded scores
                anew.
            **more: More changes, by name.

        Returns:
            Which groups enter and leave, and why; trajectories, tokens and seconds of training. It displays itself as a card.

        Raises:
            RunError: No epoch has ended yet.
            ConfigError: The settings do not fit, or the reward has no such parts.
        """
        from ..training.preview import preview
        from .rescoring import NewestEpoch, all_weights

        self._driver.require_single_epochs()
        if not isinstance(changes, CurriculumSettings):
            changes = {**(changes or {}), **more}
        asked = self._settings.curriculum
        settings = asked.steered(changes)
        records = self.records
        if not records:
            raise RunError("there is nothing to preview on: no epoch has ended yet. Run one, then ask again.")
        newest = self._newest
        if newest is None or newest.basis.statistics is not records[-1].statistics:
            self._newest = newest = NewestEpoch(records[-1])
        basis = unchanged = newest.basis
        asked_weights = self._settings.waiting_weights
        if asked_weights:
            basis = unchanged = newest.with_weights(all_weights(self.config, asked_weights))
        if weights:
            weights = all_weights(self.config, {**asked_weights, **weights})
            basis = newest.with_weights(weights)
        return preview(basis, self._settings.applied, asked, settings, self.config.run.seed, unchanged, weights)

    def rescore(
        self,
        reward: Rewards | None = None,
        epochs: Any = None,
        *,
        weights: Mapping[str, float] | None = None,
        only: str | Collection[str] | None = None,
        dataset: Any = None,
        max_concurrency: int = 64,
    ) -> Rescoring:
        """Score recorded rollouts with another reward, and see what it changes. No rollout is run, nothing is changed.

        Args:
            reward: As in Run. Default: the run's own reward.
            epochs: A number, several, or a slice of them; negative counts from the newest. Default: all.
            weights: Other weights of the reward's parts: the recorded scores are added up anew, and no function is called.
            only: "failed": only rollouts without a reward, such as those whose judge was not reachable; or the names of some, as
                in the column `trajectory` of `trajectories()`.
            dataset: The rows, if the run was opened without them.
            max_concurrency: How many calls of an async reward run at once.

        Returns:
            Old and new rewards side by side. It displays itself; it has frames, and a preview of the curriculum.

        Raises:
            RunError: No epoch has ended yet, or the run itself called this.
            ConfigError: The reward cannot be called with the dataset's rows, or `weights` and `reward` do not go together.
        """
        from .rescoring import rescore, rescoring, reweight

        records = self.chosen(epochs)
        if not records:
            raise RunError("there is nothing to score anew: no epoch has ended yet. Run one, then ask again.")
        if weights is not None:
            if reward is not None or only is not None:
                raise ConfigError("weights= adds up recorded scores: leave reward= and only= out.")
            found = reweight(self.config, records, weights)
            return rescoring(self.config, self.id, found, self.records, self._put_in_place)
        self._session.require_outside("rescore")
        labels = read_labels(self.folder, [record.index for record in records])
        work = rescore(self.config, self.config.builder, records, reward, only, dataset, max_concurrency, labels)
        found = run_sync(work if self._closed else self._session.engine.run(work))
        return rescoring(self.config, self.id, found, self.records, self._put_in_place)

    def _reward_digest(self) -> str | None:
        """A digest of what the reward is made of, by what the run was given or else by its record; None if neither knows."""
        digest = reward_digest(self.config, fingerprints(self._driver.components))
        if digest is None and self._store is not None:
            digest = (self._store.state() or {}).get("reward")
        return digest

    def _scored_by(self, judge: Run, epochs: Sequence[int]) -> list[RescoredEpoch]:
        """These epochs with the reward of another run, or of this one."""
        from .rescoring import score_by

        self._session.require_outside("compare")
        of_judge, own = judge.config.builder, self.config.builder
        labels = read_labels(self.folder, epochs)
        work = score_by(judge.config, of_judge, self.config, own, self.chosen(epochs), labels)
        return run_sync(work if judge._closed else judge._session.engine.run(work))

    def _put_in_place(self, rescored: RescoredEpoch) -> None:
        """Gives an epoch that was not trained on its new rewards."""
        self._require_steerable()
        self._session.require_outside("apply")
        collection = rescored.collection()
        work = self._session.begin(lambda: self._driver.put_in_place(rescored.index, collection), fails=False)
        run_sync(self._session.join(work))

    def agreement(
        self,
        reward: Rewards,
        labels: Any,
        *,
        tags: Tags | None = None,
        scale: tuple[float, float] = (0.0, 1.0),
        dataset: Any = None,
        max_concurrency: int = 64,
    ) -> Agreement:
        """Score labelled rollouts, and say how far the scores agree with the labels.

        Args:
            reward: A judge, or any other reward.
            labels: What a person says: `run.labels()`, or some of its rows; a mapping from names of trajectories ("e3/q17/2",
                the column `trajectory` of `trajectories()`) to numbers; or a frame with the columns `trajectory` and `label`.
            tags: Which of `run.labels()` count, as in `ft.label_reward`: {"good": 1, "hacked": 0} says what tags are worth.
                Default: the labels that have a score, if they all have one tag.
            scale: Lowest and highest value of both; its middle separates good from bad for Cohen's kappa.
            dataset: The rows, if the run was opened without them.
            max_concurrency: How many calls of an async reward run at once.

        Returns:
            Cohen's kappa, correlations, bias, and the rollouts that differ most. It displays itself.

        Raises:
            RunError: No epoch has ended yet, or the run itself called this.
            ConfigError: A label is of no recorded rollout, or the reward cannot be called with the dataset's rows.
        """
        from ..analysis.agreement import labels_of
        from .rescoring import agreement_with, labelled_epochs

        known = labels_of(labels, tags)
        epochs = labelled_epochs(known, self.records)
        if not epochs:
            raise ConfigError(
                f"no label is of a recorded epoch. Expected names such as 'e0/q17/2'; found {next(iter(known))!r}."
            )
        rescored = self.rescore(reward, epochs, only=list(known), dataset=dataset, max_concurrency=max_concurrency)
        return agreement_with(known, rescored, scale)

    def diagnose(self, epochs: Any = None) -> Diagnosis:
        """Say why the run does not learn. Nothing is run or changed; it works on a run that was opened from disk.

        Args:
            epochs: A number, several, or a slice of them; negative counts from the newest. Default: all. The newest three of them
                count as the state of now.

        Returns:
            The findings, the worst first: each has its kind, its number, the rollouts that show it, and the next step. It
            displays itself and is true where there are findings; `.findings` and `.frame()` give them as values.

        Raises:
            IndexError: There is no such epoch.
        """
        from ..analysis.diagnosis import diagnosis
        from ..rewards.evaluators import weighted_reward

        section = weighted_reward(self.config)
        return diagnosis(self.id, self.chosen(epochs), section and section.weights, self.records)

    @property
    def _recorded_in(self) -> object | None:
        """The cell that has the record of the last `start`; None without one."""
        return None if self._session.record is None else self._session.record.cell

    def panel(self) -> Any:
        """The control panel: state and progress, buttons, the live settings with what they would do, the reward curve, the
        newest epochs, the log.

        Shown again, in any cell, it is another view of the same panel; `close()` takes it away.

        Returns:
            The panel, which displays itself; the same without widgets, where nobody would see them (nbclient, a script).
        """
        from ..notebook.panel import Panel, panel_of

        panel = panel_of(self, self._settings, self._panel)
        if isinstance(panel, Panel):
            self._panel = panel
        return panel

    @property
    def sinks(self) -> list[MetricsSink]:
        """Where each epoch's numbers go beside the run's folder: append to it, also while the run is live. One that fails
        or hangs is a warning."""
        return self._driver.sinks

    # ── other runs ───────────────────────────────────────────────────────────────────────────────────────────────────

    def fork(
        self,
        epoch: int | None = None,
        *,
        curriculum: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        reward: Rewards | None = None,
        name: str | None = None,
        builder: TrajectoryBuilder | None = None,
        adapter: TrainerAdapter | None = None,
        trainer: Trainer | None = None,
        trust: bool = False,
    ) -> Self:
        """Make a new run that continues after an epoch of this one, from a copy of its weights and its curriculum's state.

            better = run.fork(epoch=5, curriculum=dict(percentile=0.8))

        Its first epoch has the next number and draws the same examples, so `ft.compare([run, better])` pairs them.

        Args:
            epoch: After which epoch; None: the last one that is complete.
            curriculum: Changes of the settings that were in force then; giving some switches the curriculum on unless they
                say `enabled`.
            training: Other fields of the adapter's config.
            reward: Another reward, as in Run; the epochs before the fork keep theirs.
            name: As in Run; None: this run's, with "-fork".
            builder: A new trajectory builder, where this run was given one as an object.
            adapter: A new trainer adapter, where this run was given one as an object.
            trainer: A new trainer, where this run was given one as an object.
            trust: As in `open`, where this run is of somebody else's folder and was opened without it.

        Returns:
            The new run.

        Raises:
            RunError: That epoch, or its weights, are not there.
        """
        if self._unable and trust and self._unable.untrusted:
            return self._trusted().fork(
                epoch,
                curriculum=curriculum,
                training=training,
                reward=reward,
                name=name,
                builder=builder,
                adapter=adapter,
                trainer=trainer,
            )
        if self._unable:
            raise RunError(self._unable.text)
        store, writer = self._stored(), self._driver.writer
        if store is None:
            raise RunError(f"run {self.id!r} has no epoch to continue from. Run one first, or make a new Run.")
        ready = {"trajectory_builder": builder, "trainer_adapter": adapter, "trainer": trainer}
        config, components = copy_for_fork(self.config, self._driver.components, training, ready, reward)
        digests = None
        if reward is not None:
            digests = self._reward_digest(), reward_digest(config, fingerprints(components))
        branch = branch_of(store, epoch, curriculum, training, digests)
        # The fork may be given components of other classes; for the rest it needs what this run has.
        branch.state["components"] = {**recorded_components(branch.state), **given_components(components)}
        run_id = free_id(name or f"{self.id[:90]}-fork", self.folder.parent)
        if writer is not None and not self._closed:
            writer.on_fork(branch.epoch, run_id, branch.checkpoint)
        folder = self.folder.parent / run_id
        make_fork(store.folder, branch, folder, run_id, config.stored())
        run = type(self).__new__(type(self))
        run._setup(config, components, run_id, RunStore.open(folder))
        return run

    def _trusted(self) -> Self:
        """The same run of somebody else's folder, with its config as it is once it is trusted."""
        assert self._store is not None  # it was opened from that folder
        config, components, unable = config_of(self._store, None, None, None, {}, trust=True)
        components.environment = self._driver.components.environment
        for kind, name, component in self._driver.components.added():
            components.add(kind, name, component)
        run = type(self).__new__(type(self))
        run._setup(config, components, self.id, self._store, unable)
        return run

    def archive(self, checkpoints: bool = True) -> Path:
        """Close the run and move its folder into `archive` beside it. `ft.runs` does not list it there unless asked, and
        `Run.open` opens it as ever.

        Args:
            checkpoints: False deletes them, which saves most of the room; the run can then be looked at, not continued.

        Returns:
            Where the folder is now.

        Raises:
            StoreError: Another process writes the run.
        """
        self.close()
        folder = archive_run(self.folder, checkpoints, self._forget_checkpoints)
        self.config.finetuning.output_dir, self.id = folder.parent, folder.name
        self._store = RunStore.open(folder)
        self._driver.writer, self._driver.epochs = None, list(self._store.epochs)  # type: ignore[assignment]
        return folder

    def delete(self) -> None:
        """Close the run and delete its folder with all that is in it, and what its checkpoints name on a training service.

        Raises:
            StoreError: Another process writes the run.
        """
        self.close()
        delete_run(self.folder, self._forget_checkpoints)

    def _forget_checkpoints(self) -> None:
        forget_checkpoints(self.folder, self.config, self._driver.components, self._driver.adapter)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """End every component, once, and an epoch that is running. The records can still be read. Also done at the
        interpreter's exit, and when nobody holds the run any more."""
        if self._closed:
            return
        self._session.require_outside("close")
        self._closed = True
        self._session.end()
        self._epoch_weights.close()
        _open_runs.discard(self)
        self._left.detach()
        self.config.builder = None
        self._session.engine.close_after(self._driver.close)

    async def __aenter__(self) -> Run:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await in_daemon_thread(self.close)


def _log_line(event: Mapping[str, Any]) -> str:
    """One event of the log, as a line with its time of day."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.get("time", 0.0)))
    text = event.get("text")
    if not text:
        shown_elsewhere = ("time", "kind", "traceback", "level", "logger", "text")
        pairs = [(key, value) for key, value in event.items() if key not in shown_elsewhere and value is not None]
        text = " ".join(f"{key}={value}" for key, value in pairs)
    return f"{clock} {event.get('level', event['kind'])} {text}"


@before_exit
def close_all() -> None:
    """Closes every run that is open."""
    for run in list(_open_runs):
        try:
            run.close()
        except Exception:  # at exit there is nobody left to tell
            pass
