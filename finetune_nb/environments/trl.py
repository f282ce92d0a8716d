"""Environment classes as TRL's GRPOTrainer takes them in `environment_factory`, among them clients of OpenEnv servers.

    run = ft.Run(env=WordleEnv, reward=reward_func, dataset=rows)

`reset(**row)` begins an episode and may return a text, which is added to the last message of the prompt. Every other public
method is a tool. The model is asked until it calls none. The reward is what `get_reward()` returns, and what reward functions say
that take `environments`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ConfigError, MissingExtra, WorkflowError
from ..interfaces import Environment
from ..llms.call_recorder import current_episode
from ..redaction import error_text
from ..rewards.from_trl import from_trl
from ..rewards.functions import GroupReward
from ..text import text_of
from ..types import EvalInputItem
from ..user_code import Parameters, contained
from .text import options_of
from .thread import CallThread, OwnRandom

__all__ = [
    "ToolEnvironment",
    "ToolOptions",
]

NOT_TOOLS = ("reset", "get_reward")


class ToolOptions(BaseModel):
    """The `env_options` of an environment whose methods are tools."""

    model_config = ConfigDict(extra="forbid")

    max_turns: int = Field(default=16, ge=1)
    """Replies of the model in an episode."""
    examples: int = Field(default=64, ge=1)
    """Episodes of a run without a dataset, whose environment has its own tasks."""
    seed: int = Field(default=0, ge=0)
    """The first seed of these: reset() gets it as `seed`, if it takes it."""
    prompt: str = ""
    """What such an episode begins with, before what reset() returns."""
    own_random: bool = False
    """Whether each environment has a state of its own of Python's and NumPy's global generators, seeded by its row."""


class ToolEnvironment(Environment):
    """A class with reset() and tools; or a mapping of names to such classes, of which each row names one in its column
    `environment`.

    Args:
        given: The class, a function that makes one, or the mapping.
        options: See ToolOptions.
    """

    package = '"finetune_nb[local]"'

    @classmethod
    def takes(cls, given: Any) -> bool:
        if isinstance(given, Mapping):
            return bool(given) and all(map(callable, given.values()))
        kind = given if isinstance(given, type) else type(given)
        return callable(getattr(kind, "reset", None)) and (bool(tools_of(kind)) or hasattr(kind, "get_reward"))

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        self.options: ToolOptions = options_of(ToolOptions, options)
        self.factories: dict[str | None, Callable[[], Any]] = (
            dict(given) if isinstance(given, Mapping) else {None: given}
        )
        self._is_mapping = isinstance(given, Mapping)
        self.pools: dict[str | None, list[Any]] = {}
        self.schemas: dict[str | None, list[dict[str, Any]]] = {}
        self.own_rewards: list[str] = []
        self.functions: dict[str, Callable[..., Any]] = {}
        for name, factory in self.factories.items():
            if not callable(factory):
                raise ConfigError(
                    f"env is an object of {type(factory).__name__}; expected its class: each rollout has one of its own."
                )
            sample = factory()
            kind = type(sample)
            if not callable(getattr(kind, "reset", None)):
                raise ConfigError(
                    f"the environment {kind.__name__} has no method reset(); expected one, and methods that are tools."
                )
            self.schemas[name] = [_schema_of(getattr(sample, tool)) for tool in tools_of(kind)]
            self.pools[name] = [sample]
            if hasattr(kind, "get_reward") and kind.__name__ not in self.own_rewards:
                self.own_rewards.append(kind.__name__)

    def rows(self, role: str) -> list[dict[str, Any]]:
        if role != "train":
            return []
        if self._is_mapping:
            raise ConfigError(
                f"env is a mapping of environments: give dataset=, rows with a column `environment` that is one of "
                f"{', '.join(map(repr, self.factories))}."
            )
        first = self.options.seed
        return [
            {"id": f"seed-{seed}", "prompt": self.options.prompt, "seed": seed}
            for seed in range(first, first + self.options.examples)
        ]

    @property
    def workflow(self) -> Any:
        return UseTools(self)

    @property
    def reward(self) -> Any:
        if not self.own_rewards:
            raise ConfigError(
                "the environment has no reward: none of its classes has get_reward(). Give reward=, such as a function of "
                "`environments`."
            )
        return SumOfRewards(tuple(self.own_rewards))

    @property
    def fingerprint(self) -> str:
        sources = []
        for factory in self.factories.values():
            try:
                sources.append(inspect.getsource(factory))
            except (OSError, TypeError):  # made by exec, or by C
                sources.append(text_of(factory))
        return f"{sources} {self.options!r}"

    def adapt_reward(self, reward: Any) -> Any:
        """Functions of `environments` are called when an episode ends; other functions of TRL as `from_trl` takes them. Several
        in a list add up as in TRL, without those that are None."""
        if isinstance(reward, Mapping):
            taken: dict[str, Any] = {}
            for name, entry in reward.items():
                function, *weight = entry if isinstance(entry, tuple) else (entry,)
                adapted = self._adapted(function)
                taken[name] = (adapted, *weight) if weight else adapted
            for name in self.own_rewards:
                taken.setdefault(name, SumOfRewards((name,)))
            return taken
        functions = list(reward) if isinstance(reward, list | tuple) else [reward]
        if not any(map(_of_environments, functions)):
            adapted = [self._adapted(function) for function in functions]
            if self.own_rewards:
                return [*adapted, SumOfRewards(tuple(self.own_rewards))]
            return adapted if isinstance(reward, list | tuple) else adapted[0]
        names = [self._known_as(function) for function in functions if _of_environments(function)]
        total = SumOfRewards((*names, *self.own_rewards))
        others = [self._adapted(function) for function in functions if not _of_environments(function)]
        return [*others, total] if others else total

    def _adapted(self, function: Any) -> Any:
        if _of_environments(function):
            return SumOfRewards((self._known_as(function),))
        if callable(function) and not isinstance(function, GroupReward):
            if {"completions", "prompts"} & set(Parameters(function).names):
                return from_trl(function)
        return function

    def _known_as(self, function: Callable[..., Any]) -> str:
        """The name under which a function of `environments` is called at the end of each episode."""
        wanted = name = getattr(function, "__name__", type(function).__name__)
        number = 1
        while self.functions.get(name, function) is not function or name in self.own_rewards:
            number += 1
            name = f"{wanted}_{number}"
        self.functions[name] = function
        return name


class SumOfRewards:
    """The recorded rewards of an episode by name, which add up; those that are None are left out.

    Args:
        names: Whose they are.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.__name__ = "_".join(names)
        self.fingerprint = f"environment {names}"

    def __call__(self, output: Mapping[str, Any]) -> Any:
        found = {name: output["rewards"].get(name) for name in self.names}
        known = {name: value for name, value in found.items() if value is not None}
        if not known:
            return None
        return next(iter(known.values())) if len(self.names) == 1 else known


class UseTools:
    """The agent: it asks the model until it calls no tool.

    Args:
        environment: What it plays in.
    """

    def __init__(self, environment: ToolEnvironment) -> None:
        self.environment = environment

    def __getstate__(self) -> dict[str, Any]:
        twin = ToolEnvironment.__new__(ToolEnvironment)
        vars(twin).update({**vars(self.environment), "pools": {}})  # live instances stay where they are
        return {"environment": twin}

    async def __call__(self, item: EvalInputItem, llm: Any) -> dict[str, Any]:
        """Play.

        Returns:
            Plain data: `reply` (the last one's text), `rewards` by name, `turns`, `tool_calls` and `failed_calls`.
        """
        of = self.environment
        row = dict(item.full_dataset_entry) if isinstance(item.full_dataset_entry, dict) else {}
        name = row.pop("environment", None) if of._is_mapping else None
        if name not in of.factories:
            raise WorkflowError(
                f"the row's column `environment` is {name!r}; expected one of {', '.join(map(repr, of.factories))}."
            )
        pool, kept = of.pools.setdefault(name, []), False

        def close(held: Any) -> None:
            if kept:
                pool.append(held)  # TRL's classes are made once and reset often: nothing else ends a connection

        def make() -> Any:
            try:
                return pool.pop()
            except IndexError:
                return of.factories[name]()

        seed = row.get("seed")
        own = OwnRandom(seed if isinstance(seed, int) else 0) if of.options.own_random else None
        title = getattr(of.factories[name], "__name__", "the environment")
        async with CallThread(title, make, close, own) as thread:
            output = await self._episode(thread, name, row, item, llm)
            kept = True
            return output

    async def _episode(
        self, thread: CallThread, name: str | None, row: dict[str, Any], item: EvalInputItem, llm: Any
    ) -> dict[str, Any]:
        of = self.environment
        held = await thread.call("making it", lambda: thread.held)
        columns = row if "prompt" in row or item.input_obj is None else {**row, "prompt": item.input_obj}
        passed = columns if _is_given(row) else _taken_by(held.reset, columns)
        shown = await thread.call("reset()", lambda: held.reset(**passed))
        prompt = _with_observation(_messages_of(columns.get("prompt", "")), shown)
        messages: list[Any] = list(prompt)
        completion: list[dict[str, Any]] = []
        counts = {"turns": 0, "tool_calls": 0, "failed_calls": 0}
        reply = None
        for _ in range(of.options.max_turns):
            reply = await llm.chat(messages, tools=of.schemas[name] or None)
            counts["turns"] += 1
            messages.append(reply)
            completion.append(reply.message)
            if not reply.tool_calls:
                break
            for call in reply.tool_calls:
                result, failed = await self._call(thread, call)
                counts["tool_calls"] += 1
                counts["failed_calls"] += failed
                answer = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result}
                messages.append(answer)
                completion.append(answer)
        rewards = await self._rewards(thread, columns, prompt, completion)
        return {"reply": reply.content if reply is not None else "", "rewards": rewards, **counts}

    async def _call(self, thread: CallThread, call: Any) -> tuple[str, bool]:
        """What a tool returns as the model gets it, and whether it failed: what it raises is an answer, too."""
        held = thread.held
        if call.name not in tools_of(type(held)):
            return str({"error": f"Tool {call.name} not found."}), True
        try:
            tool = getattr(held, call.name)
            return text_of(await thread.call(f"{call.name}()", lambda: tool(**call.arguments))), False
        except WorkflowError as error:
            cause = error.__cause__
            return str({"error": text_of(cause) if cause is not None else error_text(error)}), True

    async def _rewards(
        self, thread: CallThread, row: Mapping[str, Any], prompt: list[Any], completion: list[Any]
    ) -> dict[str, float | None]:
        """What the environment and the functions of environments say of the episode."""
        of, held = self.environment, thread.held
        found: dict[str, float | None] = {}
        kind = type(held).__name__
        if kind in of.own_rewards and hasattr(type(held), "get_reward"):
            found[kind] = _number(await thread.call("get_reward()", held.get_reward), "get_reward()")
        episode = current_episode()
        ids = [list(call.response_ids or ()) for call in episode.calls] if episode is not None else []
        for name, function in of.functions.items():
            columns = {str(key): [value] for key, value in row.items() if key != "prompt"}
            columns |= {
                "environments": [held],
                "prompts": [prompt],
                "completions": [completion],
                "completion_ids": [[token for turn in ids for token in turn]],
                "trainer_state": None,
                "log_extra": _unlogged,
                "log_metric": _unlogged,
            }
            taken = Parameters(function)
            if not taken.takes_all:
                columns = {key: value for key, value in columns.items() if key in taken.names}
            work = functools.partial(function, **columns)
            values = await contained(f"reward {name!r}", thread.call(f"the reward {name}", work))
            if not isinstance(values, list | tuple) or len(values) != 1:
                raise WorkflowError(f"the reward {name!r} returned {values!r:.80}; expected a list with one number.")
            found[name] = _number(values[0], f"the reward {name!r}")
        return found


def tools_of(kind: type) -> list[str]:
    """The names of the methods that are tools: public functions of the class, but for reset and get_reward."""
    members = inspect.getmembers(kind, predicate=inspect.isfunction)
    return [name for name, _ in members if name not in NOT_TOOLS and not name.startswith("_")]


def _schema_of(method: Callable[..., Any]) -> dict[str, Any]:
    try:
        from transformers.utils.chat_template_utils import get_json_schema
    except ImportError as error:
        raise MissingExtra("an environment whose methods are tools", "local") from error
    try:
        return get_json_schema(method)
    except Exception as error:
        raise ConfigError(
            f"the tool {getattr(method, '__qualname__', method)!r} has no schema: {error}. Expected typed arguments, and a "
            "docstring with a line for each of them below `Args:`. A method that is no tool begins with an underscore."
        ) from error


def _of_environments(function: Any) -> bool:
    return callable(function) and not isinstance(function, GroupReward) and "environments" in Parameters(function).names


def _is_given(row: Mapping[str, Any]) -> bool:
    """Whether the row is of the user's dataset: reset() then gets all of it, as in TRL."""
    return set(row) != {"id", "prompt", "seed"}


def _taken_by(function: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any]:
    taken = Parameters(function)
    return {key: value for key, value in row.items() if taken.takes_all or key in taken.names}


def _messages_of(prompt: Any) -> list[Any]:
    if isinstance(prompt, list | tuple) and prompt:
        return [dict(message) for message in prompt]
    return [{"role": "user", "content": "" if not prompt else text_of(prompt)}]


def _with_observation(prompt: list[Any], shown: Any) -> list[Any]:
    """The prompt with what reset() returned at the end of its last message."""
    if shown is None:
        return prompt
    last = prompt[-1]
    return [*prompt[:-1], {**last, "content": f"{last.get('content') or ''}{text_of(shown)}"}]


def _number(value: Any, what: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
        json.dumps(number, allow_nan=False)
    except (TypeError, ValueError):
        raise WorkflowError(f"{what} returned {value!r:.60}; expected a finite number, or None.") from None
    return number


def _unlogged(*args: Any, **kwargs: Any) -> None:
    """In place of TRL's own logging: return scores by name to have them recorded."""
