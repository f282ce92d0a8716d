"""Text environments of the gym kind: anything with reset() and step(text).

    run = ft.Run(env=MyGame, env_options={"examples": 32, "max_turns": 10})

The agent's loop puts what the environment shows to the model, and the model's reply to the environment, until the episode ends or
the turns are used up. Every rollout has an environment of its own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError, WorkflowError, did_you_mean
from ..hooks import resolve
from ..interfaces import Environment
from ..redaction import error_text
from ..text import text_of
from ..types import EvalInputItem
from .thread import CallThread, OwnRandom

__all__ = [
    "Game",
    "GymGame",
    "NamedEnvironment",
    "Play",
    "Step",
    "TaskOptions",
    "TextEnvironment",
    "TextOptions",
    "mistakes_in",
    "plain_info",
    "step_rewards",
]


class TextOptions(BaseModel):
    """The `env_options` of a text environment."""

    model_config = ConfigDict(extra="forbid")

    examples: int = Field(default=64, ge=1)
    """Episodes that the dataset has: one seed each, which all rollouts of its group begin with."""
    validation: int = Field(default=0, ge=0)
    """Held-out episodes, with seeds of their own."""
    seed: int = Field(default=0, ge=0)
    """The first seed."""
    max_turns: int = Field(default=20, ge=1)
    """Replies of the model in an episode; one that is not over by then ends there."""
    history: int | None = Field(default=None, ge=0)
    """Earlier turns that the model sees. None: all of them; 0: only what the environment shows now."""
    system: str | None = None
    """A system prompt. None: none."""
    make: dict[str, Any] = {}
    """Keyword arguments with which each environment is made."""
    shaped: bool = True
    """Whether the reward of a step counts at that step. Otherwise their sum is the reward of the whole rollout."""
    unfinished_reward: float | None = Field(default=None, allow_inf_nan=False)
    """The reward of an episode to which the environment gave none before the turns were used up, as games do that are scored
    when they are over. None: there is none, and the rollout is not trained on."""
    own_random: bool | None = None
    """Whether each environment has a state of its own of Python's and NumPy's global generators, so that a seed gives one
    episode, whatever runs beside it. Its calls then take turns with those of all others. None: as its kind needs it."""


class Step:
    """What a step led to."""

    __slots__ = ("done", "info", "observation", "reward", "truncated")

    def __init__(
        self, observation: Any, reward: Any, done: bool, truncated: bool = False, info: Mapping[str, Any] | None = None
    ) -> None:
        self.observation, self.reward = observation, reward
        self.done, self.truncated, self.info = bool(done), bool(truncated), info or {}


class Game:
    """One environment as the loop sees it, whatever its own interface is. Its methods may return something to await."""

    name: str = ""

    def reset(self, seed: int, row: Mapping[str, Any]) -> Any:
        """Begin an episode, and return what is shown: a text, or OpenAI messages."""
        raise NotImplementedError

    def step(self, action: str) -> Any:
        """Return a Step."""
        raise NotImplementedError

    def final_reward(self) -> float | None:
        """The reward of an episode that the loop ends, since its turns are used up; it is added to that of the last step."""
        return None

    def close(self) -> Any:
        """Release everything."""


class GymGame(Game):
    """An object with reset() and step(), of gymnasium's interface or of an older one with four values."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def reset(self, seed: int, row: Mapping[str, Any]) -> Any:
        takes = _parameters_of(self.env.reset)
        found = self.env.reset(seed=seed) if takes is None or "seed" in takes else self.env.reset()
        return _then(found, _first_of)

    def step(self, action: str) -> Any:
        return _then(self.env.step(action), step_of)

    def close(self) -> Any:
        close = getattr(self.env, "close", None)
        return close() if callable(close) else None


class TextEnvironment(Environment):
    """Anything with reset() and step(text).

    Args:
        given: The class, or a function that makes one, or "module:name" of either; each rollout has an instance of its own.
        options: See TextOptions.
    """

    own_random = False
    """What `own_random` is by default."""

    @classmethod
    def takes(cls, given: Any) -> bool:
        return all(callable(getattr(given, method, None)) for method in ("reset", "step"))

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        self.options = options_of(TextOptions, options)
        if isinstance(given, str):
            given = _imported(given)
        if not callable(given):
            raise ConfigError(
                f"env is an object of {type(given).__name__}, and rollouts are played at the same time: each needs one of its "
                f"own. Give the class, or a function that makes one: env={type(given).__name__}."
            )
        self.given, self.name = given, getattr(given, "__qualname__", type(given).__name__)

    def rows(self, role: str) -> list[dict[str, Any]]:
        first, size = self.options.seed, self.options.examples
        if role == "validation":
            first, size = first + size, self.options.validation
        return [{"id": f"seed-{seed}", "seed": seed} for seed in range(first, first + size)]

    def maker(self) -> Callable[[Mapping[str, Any]], Game]:
        """What makes the Game of a row; it can be pickled."""
        return functools.partial(_gym_game, self.given, self.options.make)

    @property
    def workflow(self) -> Any:
        isolated = self.own_random if self.options.own_random is None else self.options.own_random
        return Play(self.maker(), self.name, self.options, isolated)

    @property
    def reward(self) -> Any:
        return step_rewards if self.options.shaped else sum_of_steps

    @property
    def fingerprint(self) -> str:
        try:
            source = inspect.getsource(self.given)
        except (OSError, TypeError):  # made by exec, or by C
            source = self.name
        return f"{source} {self.options!r}"


class NamedEnvironment(TextEnvironment):
    """One environment of a package, made by its name. A subclass checks `name` and `options`, and has `game`."""

    @classmethod
    def takes(cls, given: Any) -> bool:
        return False  # one that is made has the interface of `TextEnvironment`

    @staticmethod
    def game(name: str, arguments: Mapping[str, Any], row: Mapping[str, Any]) -> Game:
        """Make the environment of that name for a row. arguments: the option `make`."""
        raise NotImplementedError

    def maker(self) -> Callable[[Mapping[str, Any]], Game]:
        return functools.partial(self.game, self.name, self.options.make)

    @property
    def fingerprint(self) -> str:
        return f"{self.package} {importlib.metadata.version(self.package)} {self.name} {self.options!r}"


def _gym_game(given: Callable[..., Any], arguments: Mapping[str, Any], row: Mapping[str, Any]) -> Game:
    return GymGame(given(**arguments))


class Play:
    """The agent: it plays one episode.

    Args:
        make: Makes the Game of a dataset's row.
        name: What messages call it.
        options: See TextOptions.
        isolated: Whether it has a state of its own of the global random generators.
    """

    def __init__(
        self, make: Callable[[Mapping[str, Any]], Game], name: str, options: TextOptions, isolated: bool
    ) -> None:
        self.make, self.name, self.options, self.isolated = make, name, options, isolated
        self.__name__ = name

    async def __call__(self, item: EvalInputItem, llm: Any) -> dict[str, Any]:
        """Play.

        Returns:
            Plain data: `reward` (None: the environment gave none), `step_rewards`, `turns`, `ended` ("done", "truncated", or
            "turn limit"), `observation` (what was shown last) and `info` (of the last step, its numbers and short texts).
        """
        row = item.full_dataset_entry if isinstance(item.full_dataset_entry, dict) else {}
        seed = row.get("seed")
        seed = seed if isinstance(seed, int) else 0
        own = OwnRandom(seed) if self.isolated else None
        async with CallThread(self.name, lambda: self.make(row), _close, own) as thread:
            return await self._episode(thread, seed, row, llm)

    async def _episode(self, thread: CallThread, seed: int, row: Mapping[str, Any], llm: Any) -> dict[str, Any]:
        options = self.options
        # Made and reset in one call: each costs two changes of threads.
        shown = _messages_of(await thread.call("reset()", lambda: thread.held.reset(seed, row)))
        game: Game = thread.held
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        turns: list[list[Any]] = []
        rewards: list[float | None] = []
        ended, step = "turn limit", None
        for _ in range(options.max_turns):
            kept = (
                turns if options.history is None else turns[len(turns) - options.history :] if options.history else []
            )
            reply = await llm.chat([*system, *(message for turn in kept for message in turn), *shown])
            turns.append([*shown, reply])
            step = await thread.call("step()", functools.partial(game.step, reply.content))
            rewards.append(_number(step.reward, self.name))
            if step.done or step.truncated:
                ended = "done" if step.done else "truncated"
                break
            shown = _messages_of(step.observation)
        final = None
        if ended == "turn limit" and type(game).final_reward is not Game.final_reward:
            final = await thread.call("final_reward()", game.final_reward)
        if final is not None:
            rewards[-1] = (rewards[-1] or 0.0) + _number(final, self.name)  # type: ignore[operator]
        if ended == "turn limit" and all(reward is None for reward in rewards):
            rewards[-1] = options.unfinished_reward
        known = [reward for reward in rewards if reward is not None]
        return {
            "reward": math.fsum(known) if known else None,
            "step_rewards": [reward or 0.0 for reward in rewards] if known else None,
            "turns": len(turns),
            "ended": ended,
            "observation": _messages_of(step.observation)[-1]["content"] if step is not None else "",
            "info": plain_info(step.info) if step is not None else {},
        }


def _close(game: Game) -> Any:
    return game.close()


def step_rewards(output: Mapping[str, Any]) -> list[float]:
    """The reward of each step of an episode. Raises WorkflowError where the environment gave none."""
    _require_reward(output)
    return output["step_rewards"]


def sum_of_steps(output: Mapping[str, Any]) -> float:
    """The sum of an episode's rewards. Raises WorkflowError where the environment gave none."""
    _require_reward(output)
    return output["reward"]


def _require_reward(output: Mapping[str, Any]) -> None:
    if output["reward"] is not None:
        return
    if output["ended"] == "turn limit":
        raise WorkflowError(
            f"the episode was not over after {output['turns']} turns, and the environment gave no reward until then. Raise "
            "max_turns of env_options, or set unfinished_reward."
        )
    raise WorkflowError("the environment gave no reward in this episode.")


# ── what environments return ─────────────────────────────────────────────────────────────────────────────────────────


def step_of(returned: Any) -> Step:
    """What a step returned: five values, four, a mapping or an object with observation, reward and done.

    Raises:
        WorkflowError: It is none of these.
    """
    found = returned
    if isinstance(found, Step):
        return found
    if isinstance(found, tuple) and len(found) == 5:
        observation, reward, terminated, truncated, info = found
        return Step(observation, reward, terminated, truncated, info)
    if isinstance(found, tuple) and len(found) == 4:
        observation, reward, done, info = found
        return Step(observation, reward, done, info=info)
    if isinstance(found, Mapping) and "done" in found:
        observation = found.get("observations", found.get("observation"))
        return Step(observation, found.get("reward"), found["done"], info=found.get("metadata") or found.get("info"))
    if all(hasattr(found, name) for name in ("observation", "reward", "done")):
        return Step(returned.observation, returned.reward, returned.done, info=getattr(returned, "metadata", None))
    shape = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
    raise WorkflowError(
        f"step() returned {shape}; expected (observation, reward, terminated, truncated, info), (observation, reward, done, "
        "info), a mapping or an object with observation, reward and done."
    )


class TaskOptions(BaseModel):
    """The `env_options` that lists of tasks have in common."""

    model_config = ConfigDict(extra="forbid")

    examples: int | None = Field(default=None, ge=1)
    """Tasks, from the first. None: all of them but those that are held out."""
    validation: int = Field(default=0, ge=0)
    """Held-out tasks: those that follow after `examples`, or else the last ones."""

    def begin_of_held_out(self, count: int, whose: str, what: str) -> int:
        """Find where the held-out tasks begin.

        Args:
            count: How many tasks there are.
            whose: What errors call the list.
            what: What they call its entries.

        Returns:
            The place of the first one.

        Raises:
            ConfigError: There are too few.
        """
        begin = count - self.validation if self.examples is None else self.examples
        if begin < 1 or count - begin < self.validation:
            raise ConfigError(
                f"{whose} has {count} {what}, too few for examples={self.examples} and validation={self.validation}. Lower them."
            )
        return begin

    def of_role(self, role: str, rows: Sequence[dict[str, Any]], begin: int) -> list[dict[str, Any]]:
        """Choose the rows of a role.

        Args:
            role: "train" or "validation".
            rows: All of them.
            begin: Where the held-out ones begin.

        Returns:
            Those of the role, in their order.
        """
        return [*(rows[:begin] if role == "train" else rows[begin : begin + self.validation])]


def options_of(kind: type[BaseModel], options: Mapping[str, Any]) -> Any:
    """The options of an environment, checked.

    Raises:
        ConfigError: There is no such option, or a value does not fit.
    """
    if unknown := [name for name in options if name not in kind.model_fields]:
        raise ConfigError(f"env_options has no {unknown[0]!r}. {did_you_mean(unknown[0], kind.model_fields)}")
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(f"env_options: {mistakes_in(error)}.") from None


def mistakes_in(error: ValidationError) -> str:
    """What is wrong with which fields."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3])


def _imported(path: str) -> Any:
    try:
        return resolve(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'the environment "text:{path}" cannot be imported: {error_text(error)}. Expected "text:module:class".'
        ) from error


def _first_of(found: Any) -> Any:
    """What a reset shows: it may come with a mapping of further things."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        return found[0]
    return getattr(found, "observation", found)


def _messages_of(shown: Any) -> list[Any]:
    """What an environment shows, as messages of the user."""
    if (
        isinstance(shown, list | tuple)
        and shown
        and all(isinstance(each, Mapping) and "role" in each for each in shown)
    ):
        return [dict(message) for message in shown]
    empty = shown is None or (isinstance(shown, list | tuple) and not shown)
    return [{"role": "user", "content": "" if empty else text_of(shown)}]


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise WorkflowError(
            f"{name} gave the reward {value!r:.60}; expected a finite number, or None where there is none."
        )
    return number


def plain_info(info: Any) -> dict[str, Any]:
    """The numbers and short texts of what an environment says besides."""
    found: dict[str, Any] = {}
    for key, value in info.items() if isinstance(info, Mapping) else ():
        if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            found[str(key)] = value[:200] if isinstance(value, str) else value
    return found


def _then(found: Any, change: Callable[[Any], Any]) -> Any:
    """Changes what a method returned, once it is there."""
    if not inspect.isawaitable(found):
        return change(found)

    async def later() -> Any:
        return change(await found)

    return later()


def _parameters_of(function: Any) -> set[str] | None:
    """Names of its parameters; None: it takes any keyword, or nobody knows."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind == inspect.Parameter.VAR_KEYWORD for each in parameters):
        return None
    return {each.name for each in parameters}
