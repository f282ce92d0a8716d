"""Environments of verifiers 0.4: a taskset, its rewards and metrics, and agents in their harnesses.

    run = ft.Run(env=vf.load_environment(config))

An episode is run by the environment itself, harness, tools and scoring included. Its model is the run's: what a harness asks goes
through verifiers' own interception to the gateway, where it is recorded with the token ids.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ValidationError

from ...errors import ConfigError, MissingExtra, WorkflowError
from ...interfaces import Environment
from ...redaction import error_text
from ...rewards.verdicts import Verdict, no_score
from ...text import text_of
from ...types import EvalInputItem, EvalOutputItem
from ..text import TaskOptions, mistakes_in, options_of, plain_info
from .serving import Serving, asking

__all__ = [
    "PlayEpisode",
    "Rubric",
    "Verifiers",
    "VerifiersOptions",
]


class VerifiersOptions(TaskOptions):
    """The `env_options` of an environment of verifiers."""

    client: Literal["chat", "train"] = "chat"
    """What asks the model. "chat": the harness's own request is passed on, whatever its API is. "train": verifiers' TrainClient,
    which renders prompts by itself and asks for token ids."""
    renderer_model: str | None = None
    """With "train": whose tokenizer renders, a name or a folder. It must be that of the policy."""
    renderer: dict[str, Any] | None = None
    """With "train": the config of the renderer, such as {"name": "qwen3"}. None: verifiers finds it by the tokenizer's name, or
    takes its default one, which has no tools."""
    config: dict[str, Any] = {}
    """With a name: further fields of the environment's config, such as {"agent": {"harness": {"id": "null"}}}."""


class Verifiers(Environment):
    """One environment of verifiers.

    Args:
        given: The name of an installed taskset; or what `load_environment` returns; or a config that it takes.
        options: See VerifiersOptions.

    Raises:
        ConfigError: There is no such environment or option, or its config asks for what a run does by itself.
        MissingExtra: The package is not installed.
    """

    package = "verifiers"

    @classmethod
    def takes(cls, given: Any) -> bool:
        env, config = sys.modules.get("verifiers.v1.env"), sys.modules.get("verifiers.v1.configs.env")
        return env is not None and config is not None and isinstance(given, env.Env | config.EnvConfig)

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        try:
            import verifiers.v1 as vf  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtra("environments of verifiers", "", "verifiers>=0.4") from error

        self.options: VerifiersOptions = options_of(VerifiersOptions, options)
        if not isinstance(given, str) and self.options.config:
            raise ConfigError("env_options has 'config', and env has a config already: set it there.")
        if self.options.client == "train" and self.options.renderer_model is None:
            raise ConfigError(
                'env_options has client="train" without renderer_model; expected name or folder of the policy\'s tokenizer.'
            )
        if isinstance(given, str):
            given = _config_of(given, self.options.config)
        self.env: Any = given if isinstance(given, vf.Env) else _loaded(given)
        self.name: str = self.env.config.env_id
        _check_retries(self.env.config, self.name)
        self._tasks: dict[str, tuple[dict[str, Any], Any]] = {}
        self._serving: dict[Any, Serving] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.env.config, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"], {**state["options"].model_dump(), "config": {}})

    def rows(self, role: str) -> list[dict[str, Any]]:
        """A row a task: `task` has its data whole, and each of its fields is a column, too."""
        options, taskset = self.options, self.env.taskset
        if options.examples is None and not taskset.bounded:
            raise ConfigError(
                f"the taskset of {self.name!r} is infinite: say how many tasks to take, env_options={{'examples': 64}}."
            )
        end = None if options.examples is None else options.examples + options.validation
        try:
            tasks = list(itertools.islice(taskset, end))
        except Exception as error:
            raise ConfigError(f"the taskset of {self.name!r} could not be loaded: {error_text(error)}") from error
        begin = options.begin_of_held_out(len(tasks), f"the taskset of {self.name!r}", "tasks")
        names = [task.data.id or task.data.name or f"task-{task.data.idx}" for task in tasks]
        if len(set(names)) < len(names):
            names = [f"task-{task.data.idx}" for task in tasks]
        rows = [self._row(name, task) for name, task in zip(names, tasks, strict=True)]
        return options.of_role(role, rows, begin)

    def _row(self, name: str, task: Any) -> dict[str, Any]:
        data = task.data.model_dump(mode="json")
        self._tasks[name] = data, task
        row = {"id": name, "question": task.data.prompt_text, "task": data}
        for key, value in task.data.model_dump(mode="json", exclude_defaults=True).items():
            row.setdefault(key, value)
        return row

    def task_of(self, row: Mapping[str, Any]) -> Any:
        """The task of a row.

        Raises:
            WorkflowError: The row has no column `task`, or it is not of this taskset.
        """
        data = row.get("task")
        if not isinstance(data, Mapping):
            raise WorkflowError(
                "the row has no column `task`; expected the data of a task, as the environment's own rows have it."
            )
        known, task = self._tasks.get(text_of(row.get("id")), (None, None))
        if known == data:
            return task
        try:
            kind = type(self.env.taskset).task_type()
            return kind(kind.data_type().model_validate(dict(data)), self.env.taskset.config.task)
        except Exception as error:
            raise WorkflowError(f"the row's column `task` is none of {self.name!r}: {error_text(error)}") from error

    async def serving(self) -> Serving:
        """The environment with its servers up, on the running event loop."""
        return await Serving.on_this_loop(self._serving, self.env, self.options)

    async def aclose(self) -> None:
        await Serving.close_on_this_loop(self._serving)

    @property
    def workflow(self) -> Any:
        return PlayEpisode(self)

    @property
    def reward(self) -> Any:
        return Rubric()

    @property
    def fingerprint(self) -> str:
        version = importlib.metadata.version("verifiers")
        try:
            source = inspect.getsource(type(self.env.taskset))
        except (OSError, TypeError):  # made by exec
            source = ""
        return f"verifiers {version} {self.env.config.model_dump_json()} {self.options!r} {source}"


class PlayEpisode:
    """The agent: the environment runs an episode of a task.

    Args:
        of: The environment.
    """

    def __init__(self, of: Verifiers) -> None:
        self.of = of
        self.__name__ = of.name

    async def __call__(self, item: EvalInputItem, llm: Any) -> dict[str, Any]:
        """Run an episode.

        Returns:
            Plain data of the run of the agent that is trained: `reply`, `rewards` and `weights` by name, `metrics`, `turns`,
            `stop` (what ended it), `truncated` and `info` (its numbers and short texts).

        Raises:
            WorkflowError: Something failed in it, or it is not one agent that is trained.
        """
        row = item.full_dataset_entry if isinstance(item.full_dataset_entry, dict) else {}
        task = self.of.task_of(row)
        serving = await self.of.serving()
        with asking(llm):
            episode = await serving.env.run_episode(task, serving.context(llm.name))
        if not serving.env.complete(episode):
            raise WorkflowError(f"{self.of.name}: {_reason(episode)}")
        trained = [trace for trace in episode.traces if trace.agent.trainable]
        if len(trained) != 1:
            raise WorkflowError(
                f"{self.of.name}: the episode has {len(trained)} agent runs that are trained, each with rewards of its own, and "
                "a rollout has one reward. Expected one; a run's `generations` are attempts at a task already."
            )
        (trace,) = trained
        return {
            "reply": trace.last_reply,
            "rewards": {name: None if reward is None else reward.score for name, reward in trace.rewards.items()},
            "weights": {name: reward.weight for name, reward in trace.rewards.items() if reward is not None},
            "metrics": dict(trace.metrics),
            "turns": trace.num_turns,
            "stop": trace.stop_condition,
            "truncated": trace.is_truncated,
            "info": plain_info(trace.info),
        }


class Rubric:
    """The weighted sum of an episode's rewards. They and its metrics are the parts of the score."""

    def __call__(self, item: EvalInputItem, output: Mapping[str, Any]) -> EvalOutputItem:
        rewards, weights = output["rewards"], output["weights"]
        missing = [name for name, score in rewards.items() if score is None]
        if missing or not rewards:
            what = f"was not scored: {', '.join(missing)}" if missing else "has no reward: its task has none"
            return no_score(item.id, f"the episode (ended by {output['stop']}) {what}.")
        parts = dict(rewards)
        for name, value in output["metrics"].items():
            parts[name if name not in parts else f"metric.{name}"] = value
        score = math.fsum(weights[name] * value for name, value in rewards.items())
        return Verdict(id=item.id, score=score, reasoning={}, parts=parts)


# ── configs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _config_of(name: str, fields: Mapping[str, Any]) -> Any:
    import verifiers.v1 as vf  # type: ignore[import-not-found]

    taskset = fields.get("taskset") or {}
    try:
        return vf.resolve_env_config({**fields, "taskset": {**taskset, "id": name}})
    except ModuleNotFoundError as error:
        raise ConfigError(f"verifiers has no environment {name!r}: {error}") from error
    except Exception as error:
        wrong = mistakes_in(error) if isinstance(error, ValidationError) else error_text(error)
        raise ConfigError(f"verifiers refuses this config of {name!r}: {wrong}") from error


def _loaded(config: Any) -> Any:
    import verifiers.v1 as vf  # type: ignore[import-not-found]

    try:
        return vf.load_environment(vf.resolve_env_config(config))
    except Exception as error:
        raise ConfigError(f"verifiers could not load {config.env_id!r}: {error_text(error)}") from error


def _check_retries(config: Any, name: str) -> None:
    """An attempt that is made again would leave the calls of the first one in the record of the rollout."""
    from verifiers.v1.configs.agent import agent_config_fields  # type: ignore[import-not-found]

    for where, each in {"": config, **agent_config_fields(config)}.items():
        if each.retries.max_retries or any(rule.max_retries for rule in each.retries.rules):
            raise ConfigError(
                f"the config of {name!r} has {where}{'.' if where else ''}retries; a rollout is tried again by the run: leave "
                "them out there, and give retries= to Run."
            )


def _reason(episode: Any) -> str:
    """Why an episode failed."""
    errors: Iterator[Any] = (each.last_error for each in (episode, *episode.traces) if each.last_error is not None)
    error = next(errors, None)
    return "the episode failed, and nothing says why" if error is None else f"{error.type}: {error.message}"
