"""Tasks of Inspect AI: a dataset, a solver and a scorer.

    run = ft.Run(env=task)

A sample is a row. Its solver asks the run's model through the gateway, and the scorer's value is the reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.metadata
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..components.functions import running
from ..errors import ConfigError, MissingExtra, WorkflowError
from ..hooks import resolve
from ..interfaces import Environment
from ..redaction import error_text
from ..rewards.verdicts import Verdict, no_score
from ..text import text_of
from ..types import EvalInputItem, EvalOutputItem, InvocationNode
from .text import TaskOptions, options_of

__all__ = [
    "InspectOptions",
    "InspectTask",
    "Scores",
    "Solve",
]

SCORER = InvocationNode(function_id="scorer", function_name="scorer")
"""What a scorer asks the model is recorded as this function's, and not trained on."""
_WORDS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
"""Inspect's own numbers for the words of a score."""
_MANAGED = {
    "model": "the model is the run's: leave it out",
    "sandbox": "tools in a sandbox are not run here: give the task tools that run in this process",
    "sample_source": "its samples are not known beforehand: give a dataset",
    "checkpoint": "the run has checkpoints of its own: leave it out",
    "early_stopping": "the run's curriculum chooses examples: leave it out",
    "review": "nobody is there to review: leave it out",
    "sentinel": "its monitors are not run here: leave it out",
}
"""Settings of a task that cannot be kept, and what to do."""


class InspectOptions(TaskOptions):
    """The `env_options` of a task of Inspect, whose samples are the tasks."""

    scorer: str | None = None
    """Whose value is the reward: a scorer's name, or "name.key" of one that returns several. None: the first one. Several
    values of one add up."""
    make: dict[str, Any] = {}
    """With a name: keyword arguments with which the task is made."""


class InspectTask(Environment):
    """One task of Inspect.

    Args:
        given: An `inspect_ai.Task`, or "module:function" of what makes one.
        options: See InspectOptions.

    Raises:
        ConfigError: There is no such task or option, or the task has a setting that cannot be kept in a run.
        MissingExtra: The package is not installed.
    """

    package = "inspect-ai"

    @classmethod
    def takes(cls, given: Any) -> bool:
        module = sys.modules.get("inspect_ai._eval.task.task")
        return module is not None and isinstance(given, module.Task)

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        try:
            from inspect_ai import Task  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtra("tasks of Inspect", "", self.package) from error

        self.options: InspectOptions = options_of(InspectOptions, options)
        if isinstance(given, str):
            given = _made(given, self.options.make)
        elif self.options.make:
            raise ConfigError("env_options has 'make', and env is a task that is made already.")
        if not isinstance(given, Task):
            raise ConfigError(f"the environment is of {type(given).__name__}; expected an inspect_ai.Task.")
        _check(given)
        self.task: Any = given
        self.name: str = given.name
        self.scorers = _named(given.scorer or [])
        wanted = self.options.scorer
        if wanted is not None and wanted not in self.scorers and wanted.partition(".")[0] not in self.scorers:
            raise ConfigError(
                f"the task {self.name!r} has no scorer {wanted!r}. Its scorers: {', '.join(self.scorers)}."
            )
        self._samples: dict[str, tuple[dict[str, Any], Any]] = {}
        self._models: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_models": {}}

    def rows(self, role: str) -> list[dict[str, Any]]:
        """A row a sample: `sample` has it whole, and its metadata are columns, too."""
        samples = list(self.task.dataset)
        begin = self.options.begin_of_held_out(len(samples), f"the dataset of {self.name!r}", "samples")
        ids = [str(place + 1 if sample.id is None else sample.id) for place, sample in enumerate(samples)]
        return self.options.of_role(role, [self._row(*each) for each in zip(ids, samples, strict=True)], begin)

    def _row(self, name: str, sample: Any) -> dict[str, Any]:
        if sample.sandbox is not None:
            raise ConfigError(f"sample {name!r} has a sandbox; {_MANAGED['sandbox']}.")
        data = sample.model_dump(mode="json", exclude_none=True)
        self._samples[name] = data, sample
        question = sample.input if isinstance(sample.input, str) else "\n\n".join(each.text for each in sample.input)
        row = {"id": name, "question": question, "answer": sample.target, "sample": data}
        for key, value in (data.get("metadata") or {}).items():
            row.setdefault(str(key), value)
        return row

    def sample_of(self, row: Mapping[str, Any]) -> Any:
        """The sample of a row: the row's own column, or else its question and answer.

        Raises:
            WorkflowError: It is none.
        """
        from inspect_ai.dataset import Sample  # type: ignore[import-not-found]

        data = row.get("sample")
        known, sample = self._samples.get(text_of(row.get("id")), (None, None))
        if data is not None and known == data:
            return copy.deepcopy(sample)
        try:
            return Sample.model_validate(data)
        except Exception as error:
            raise WorkflowError(
                f"the row's column `sample` is no sample of Inspect: {error_text(error)}. Expected a row of the task's dataset."
            ) from error

    def model(self, llm: Any) -> Any:
        """The model of a rollout, as Inspect has models. Its connections are those of all rollouts on the event loop."""
        loop = asyncio.get_running_loop()
        base = self._models.get(loop)
        if base is None:
            base = self._models[loop] = _new_model(llm, self.task.config)
        model, api = copy.copy(base), copy.copy(base.api)
        api.base_url, api.api_key = llm.base_url, str(llm.api_key)
        api.client = base.api.client.copy(base_url=api.base_url, api_key=api.api_key)
        model.api = api
        return model

    async def aclose(self) -> None:
        base = self._models.pop(asyncio.get_running_loop(), None)
        if base is not None:
            await base.api.aclose()

    @property
    def workflow(self) -> Any:
        return Solve(self)

    @property
    def reward(self) -> Any:
        if not self.scorers:
            raise ConfigError(f"the task {self.name!r} has no scorer: give reward=.")
        return Scores(self.options.scorer)

    @property
    def fingerprint(self) -> str:
        version = importlib.metadata.version(self.package)
        return f"inspect-ai {version} {self.name} {self.task.version} {list(self.scorers)} {self.options!r}"


class Solve:
    """The agent: the task's solver, and then its scorers.

    Args:
        of: The task.
    """

    def __init__(self, of: InspectTask) -> None:
        self.of = of
        self.__name__ = of.name

    async def __call__(self, item: EvalInputItem, llm: Any) -> dict[str, Any]:
        """Solve a sample.

        Returns:
            Plain data: `completion`, `scores` (by scorer: `value`, `answer` and `explanation`), and `limit`, which ended it.

        Raises:
            WorkflowError: A solver or a scorer failed.
        """
        row = item.full_dataset_entry if isinstance(item.full_dataset_entry, dict) else {}
        sample = self.of.sample_of(row)
        model = self.of.model(llm)
        with running(SCORER):
            judge = self.of.model(llm)
        # A task of its own: what Inspect keeps in context variables ends with it.
        return await asyncio.create_task(_solve(self.of, sample, text_of(row.get("id")), model, judge))


async def _solve(of: InspectTask, sample: Any, name: str, model: Any, judge: Any) -> dict[str, Any]:
    from inspect_ai._eval.task.run import resolve_plan  # type: ignore[import-not-found]
    from inspect_ai.scorer import Target  # type: ignore[import-not-found]
    from inspect_ai.solver._task_state import sample_state  # type: ignore[import-not-found]
    from inspect_ai.util import LimitExceededError  # type: ignore[import-not-found]

    task, limit = of.task, None
    state = _begin(of, sample, name, model)
    try:
        try:
            async with _active(of, sample, name, state):
                with _limits(task, state):
                    state = await resolve_plan(task, None)(state, _generate(task, model))
        except BaseException as error:
            found: Any = _first(error)
            if not isinstance(found, LimitExceededError):
                raise
            state, limit = sample_state() or state, found.type  # what is there is scored, as in Inspect
        state.completed = True
        _use(judge, task)
        scores = dict(state.scores or {})
        for title, scorer in of.scorers.items():
            score = await scorer(state, Target(sample.target))
            if score is not None:
                scores[title] = score
    except BaseException as error:
        cause = _first(error)
        if not isinstance(cause, Exception):
            raise
        raise WorkflowError(f"{of.name}: {error_text(cause)}") from cause
    finally:
        if task.cleanup is not None:
            await task.cleanup(state)
    return {
        "completion": state.output.completion,
        "scores": {
            title: {
                "value": score.value,
                "answer": score.answer,
                "explanation": (score.explanation or "")[:500] or None,
            }
            for title, score in scores.items()
        },
        "limit": limit,
    }


def _begin(of: InspectTask, sample: Any, name: str, model: Any) -> Any:
    """What Inspect has around a sample, in context variables; and the state that a solver gets."""
    from inspect_ai._eval.task.util import sample_messages  # type: ignore[import-not-found]
    from inspect_ai.approval._apply import init_tool_approval  # type: ignore[import-not-found]
    from inspect_ai.log._transcript import Transcript, init_transcript  # type: ignore[import-not-found]
    from inspect_ai.model import ModelName  # type: ignore[import-not-found]
    from inspect_ai.model._model import init_model_roles, init_sample_model_data  # type: ignore[import-not-found]
    from inspect_ai.scorer import Target  # type: ignore[import-not-found]
    from inspect_ai.scorer._score import init_scoring_context  # type: ignore[import-not-found]
    from inspect_ai.solver import TaskState  # type: ignore[import-not-found]
    from inspect_ai.solver._fork import set_task_generate  # type: ignore[import-not-found]
    from inspect_ai.solver._task_state import set_sample_state  # type: ignore[import-not-found]
    from inspect_ai.util._store import init_subtask_store  # type: ignore[import-not-found]

    task = of.task
    _use(model, task)
    init_model_roles(task.model_roles or {})
    init_tool_approval(task.approval)
    init_sample_model_data()
    state = TaskState(
        model=ModelName(model),
        sample_id=name,
        epoch=1,
        input=sample.input,
        messages=sample_messages(sample),
        target=Target(sample.target),
        choices=sample.choices,
        message_limit=task.message_limit,
        token_limit=task.token_limit,
        token_limit_type=task.token_limit_type or "all",
        cost_limit=task.cost_limit,
        metadata=copy.deepcopy(sample.metadata or {}),
    )
    set_sample_state(state)
    init_transcript(Transcript(log_model_api=False))
    init_subtask_store(state.store)
    init_scoring_context(list(of.scorers.values()), Target(sample.target))
    set_task_generate(_generate(task, model))
    return state


def _active(of: InspectTask, sample: Any, name: str, state: Any) -> Any:
    """What agents of Inspect look for around a sample that is being solved."""
    from inspect_ai.log._samples import active_sample  # type: ignore[import-not-found]
    from inspect_ai.log._transcript import transcript  # type: ignore[import-not-found]

    limits = ("message_limit", "token_limit", "cost_limit", "time_limit", "working_limit")
    return active_sample(
        task=of.name,
        log_location="",
        model=str(state.model),
        sample=sample.model_copy(update={"id": name}),
        epoch=1,
        fails_on_error=True,
        transcript=transcript(),
        eval_id="finetune_nb",
        sample_uuid=state.uuid,
        **{limit: getattr(of.task, limit) for limit in limits},
    )


def _use(model: Any, task: Any) -> None:
    """What `get_model()` is from now on."""
    from inspect_ai.model._model import init_active_model  # type: ignore[import-not-found]

    init_active_model(model, task.config)


def _generate(task: Any, model: Any) -> Any:
    """What a solver gets as `generate`."""
    from inspect_ai._eval.task.generate import task_generate  # type: ignore[import-not-found]
    from inspect_ai.model import GenerateConfig  # type: ignore[import-not-found]

    async def generate(state: Any, tool_calls: Any = "loop", **options: Any) -> Any:
        config = model.config.merge(GenerateConfig(**options))
        return await task_generate(model=model, state=state, tool_calls=tool_calls, cache=False, config=config)

    return generate


def _limits(task: Any, state: Any) -> contextlib.ExitStack:
    """The task's limits, which end a solver by LimitExceededError."""
    from inspect_ai._util.working import init_sample_working_time  # type: ignore[import-not-found]
    from inspect_ai.util import time_limit, turn_limit, working_limit  # type: ignore[import-not-found]
    from inspect_ai.util._limit import reset_sample_limit_data  # type: ignore[import-not-found]

    reset_sample_limit_data()
    init_sample_working_time(time.monotonic())
    stack = contextlib.ExitStack()
    for limit in (
        state._token_limit,
        state._cost_limit,
        state._message_limit,
        turn_limit(task.turn_limit),
        time_limit(task.time_limit),
        working_limit(task.working_limit),
    ):
        stack.enter_context(limit)
    return stack


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Scores:
    """The value of a scorer. All scorers' values are parts of the score.

    Args:
        chosen: As in InspectOptions.
    """

    def __init__(self, chosen: str | None) -> None:
        self.chosen = chosen
        self.fingerprint = f"inspect {chosen}"

    def __call__(self, item: EvalInputItem, output: Mapping[str, Any]) -> EvalOutputItem:
        parts: dict[str, float | None] = {}
        for title, score in output["scores"].items():
            parts |= _parts(title, score["value"])
        chosen = self.chosen or next(iter(output["scores"]), None)
        counted = {name: value for name, value in parts.items() if name == chosen or name.startswith(f"{chosen}.")}
        missing = [name for name, value in counted.items() if value is None]
        reasoning = (output["scores"].get(chosen) or {}).get("explanation") or {}
        if missing or not counted:
            what = (
                f"the scorer gave no number: {', '.join(missing)}"
                if missing
                else f"the scorer {chosen!r} gave no score"
            )
            return no_score(item.id, f"{what}.", reasoning)
        score = math.fsum(value for value in counted.values() if value is not None)
        return Verdict(id=item.id, score=score, reasoning=reasoning, parts=parts)


def _parts(title: str, value: Any) -> dict[str, float | None]:
    """The numbers of a value by name. None: it is no number, or it was not scored."""
    if isinstance(value, Mapping):
        return {f"{title}.{key}": _number(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return {f"{title}.{place}": _number(each) for place, each in enumerate(value)}
    return {title: _number(value)}


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        known = _WORDS.get(value, _WORDS.get(value.lower()))
        if known is not None:
            return known
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _new_model(llm: Any, config: Any) -> Any:
    import openai
    from inspect_ai.model import GenerateConfig, get_model  # type: ignore[import-not-found]

    base = GenerateConfig(
        max_retries=0, max_connections=10_000
    )  # the gateway has tried again; the run says how many at a time
    model = get_model(
        f"openai-api/finetune_nb/{llm.name}",
        config=base.merge(config),
        base_url=llm.base_url,
        api_key="of each rollout",
        memoize=False,
        responses_api=False,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False, timeout=None),
    )
    return model


def _made(path: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return resolve(path)(**arguments)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'the environment "inspect_ai:{path}" cannot be imported: {error_text(error)}. Expected "inspect_ai:module:function".'
        ) from error


def _check(task: Any) -> None:
    for name, hint in _MANAGED.items():
        if getattr(task, name, None):
            raise ConfigError(f"the task has {name}, which a run does not keep: {hint}.")
    if (task.epochs or 1) != 1:
        raise ConfigError(
            f"the task has epochs={task.epochs}; a run makes `generations` attempts at each example: leave it out, and give "
            f"generations={task.epochs} to Run."
        )


def _named(scorers: Sequence[Any]) -> dict[str, Any]:
    from inspect_ai.scorer._scorer import unique_scorer_name  # type: ignore[import-not-found]

    found: dict[str, Any] = {}
    for scorer in scorers:
        found[unique_scorer_name(scorer, list(found))] = scorer
    return found
