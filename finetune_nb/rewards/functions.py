"""Reward functions: plain functions whose parameters are filled by name, of one rollout or of all rollouts of an example."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, did_you_mean
from ..types import EvalInputItem, Trajectory
from ..user_code import LEFT_OUT, Parameters

__all__ = [
    "GroupReward",
    "RewardFunction",
    "Rewards",
    "batch_method",
    "evaluators_from",
    "group_reward",
    "needs_group",
    "row_of",
]

Rewards = Callable[..., Any] | Mapping[str, Any] | Sequence[Callable[..., Any]]
"""What a run takes as its reward: a function, several by name with or without a weight, or a list."""
TrajectoryOf = Callable[[EvalInputItem], Trajectory]

OF_A_ROLLOUT = ("item", "question", "output", "trajectory", "group")
OF_A_GROUP = ("items", "question", "outputs", "trajectories")


class GroupReward:
    """A function that scores all rollouts of one example at once. Made by `group_reward`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise ConfigError(f"group_reward takes a function; got {type(function).__name__}.")
        self.function = function
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def group_reward(function: Callable[..., Any]) -> GroupReward:
    """Mark a function that scores all rollouts of one example at once.

        @ft.group_reward
        def shorter(outputs):
            return [-len(output) for output in outputs]

    Its parameters are filled by name: `outputs` (what the workflow returned), `items`, `trajectories`, each a list with an entry
    for every rollout that did not fail; `question`, and any column of the dataset's row.

    Args:
        function: A sync or async function. It returns a list with one reward for each rollout, in their order: a number, None
            where there is none, a dict of scores, or a list with one number a sampled turn.

    Returns:
        What `Run` takes as a reward or an evaluator. It can still be called.

    Raises:
        ConfigError: It is no function.
    """
    return GroupReward(function)


def evaluators_from(
    reward: Rewards | None, evaluators: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The evaluators of a run that is made from functions.

    Args:
        reward: A function; a mapping of names to functions, or to (function, weight); or a list of functions.
        evaluators: Further functions by name.

    Returns:
        The functions by name; and the sections of all evaluators, among them "reward", which may be a sum of others.

    Raises:
        ConfigError: The reward is none of these, or two functions have one name.
    """
    functions: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    if isinstance(reward, Mapping | list | tuple):
        weights: dict[str, float] = {}
        for name, function, weight in _parts(reward):
            if name in weights:
                raise ConfigError(
                    f"two rewards are called {name!r}. Name them: reward={{'first': ..., 'second': ...}}."
                )
            functions[name], weights[name] = function, weight
        if not weights:
            raise ConfigError(
                'reward is empty; expected a function, or several: {"format": (tags, 0.2), "correct": right}.'
            )
        if "reward" in weights:
            raise ConfigError("no part of the reward can be called 'reward', which is their sum. Choose another name.")
        sections["reward"] = {"_type": "weighted", "weights": weights}
    elif reward is not None:
        functions["reward"] = reward
    for name, function in (evaluators or {}).items():
        if name in functions or name in sections:
            raise ConfigError(f"evaluator {name!r} has the name of a reward. Choose another one.")
        functions[name] = function
    sections |= {name: {"_type": "python_function"} for name in functions}
    return functions, sections


def _parts(reward: Mapping[str, Any] | Sequence[Any]) -> list[tuple[str, Any, float]]:
    """Name, function and weight of each reward."""
    if isinstance(reward, Mapping):
        return [(str(name), *_weighted(name, entry)) for name, entry in reward.items()]
    return [(_name_of(function), function, 1.0) for function in reward]


def _weighted(name: Any, entry: Any) -> tuple[Any, float]:
    if not isinstance(entry, tuple):
        return entry, 1.0
    if len(entry) != 2 or isinstance(entry[1], bool) or not isinstance(entry[1], int | float):
        raise ConfigError(f"reward {name!r} is {entry!r:.80}; expected a function, or (function, weight).")
    if not math.isfinite(entry[1]):
        raise ConfigError(f"reward {name!r} has the weight {entry[1]}; expected a finite number.")
    return entry[0], float(entry[1])


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if name == "<lambda>":
        raise ConfigError(
            'a lambda in a list of rewards has no name. Give it one: reward={"short": lambda output: ...}.'
        )
    return name


def needs_group(evaluator: Any) -> bool:
    """Whether an evaluator can only score once all rollouts of an example have ended.

    Args:
        evaluator: A function, or an object with `evaluate`.

    Returns:
        True for what `group_reward` marks, and for a function with a parameter `group`.
    """
    if isinstance(evaluator, GroupReward):
        return True
    if batch_method(evaluator) is not None or not callable(evaluator):
        return False
    return "group" in Parameters(evaluator).names


def batch_method(evaluator: Any) -> Any:
    """The method with which an evaluator scores all rollouts in one call, as those of the NeMo Agent Toolkit do.

    Args:
        evaluator: A function, or an object with `evaluate`.

    Returns:
        The method; None for a function.
    """
    names = ("evaluate_atif_fn", "evaluate_fn", "evaluate")
    return next((method for name in names if (method := getattr(evaluator, name, None)) is not None), None)


class RewardFunction:
    """A function bound to the dataset's rows.

    Args:
        function: The function, or a GroupReward.
        trajectory_of: Makes the trajectory of a rollout, where a function asks for it.

    Raises:
        ConfigError: It is no function.
    """

    def __init__(self, function: Any, trajectory_of: TrajectoryOf | None = None) -> None:
        if not callable(function):
            raise ConfigError(
                f"a reward is a function, or has evaluate(EvalInput); got {type(function).__name__}. Several rewards are a dict "
                'or a list of functions: {"format": (tags, 0.2), "correct": right}.'
            )
        self.of_group = isinstance(function, GroupReward)
        self.function = function.function if isinstance(function, GroupReward) else function
        self.is_async = any(map(inspect.iscoroutinefunction, (self.function, type(self.function).__call__)))
        self._trajectory_of = trajectory_of
        self._parameters = Parameters(self.function)
        self.wants_trajectory = not {"trajectory", "trajectories"}.isdisjoint(self._parameters.names)

    @property
    def name(self) -> str:
        """What messages call it."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def check(self, items: Sequence[EvalInputItem]) -> None:
        """Check that it can be called with rows like these.

        Args:
            items: The dataset's rows, of which the first hundred count.

        Raises:
            ConfigError: It has a parameter that nothing fills.
        """
        columns: dict[str, None] = {}
        for item in items[:100]:
            columns |= dict.fromkeys(row_of(item))
        known = {*self._offered, *columns}
        for parameter in self._parameters.each:
            required = parameter.default is inspect.Parameter.empty
            if required and parameter.name not in known and not self._takes_the_rollout(columns):
                raise ConfigError(self._unknown(parameter.name, columns))

    def of_rollout(self, item: EvalInputItem, group: Sequence[EvalInputItem] = ()) -> Any:
        """Call it for one rollout.

        Args:
            item: The rollout.
            group: All rollouts of the example, this one among them.

        Returns:
            What it returns; for an async function something to await.
        """
        row = row_of(item)
        values: dict[str, Callable[[], Any]] = {
            "item": lambda: item,
            "question": lambda: item.input_obj,
            "output": lambda: item.output_obj,
            "trajectory": lambda: self._trajectory(item),
            "group": lambda: list(group),
        }
        if self._takes_the_rollout(row):
            values[self._parameters.single or ""] = values["item"]
        return self._call(values, row)

    def of_rollouts(self, group: Sequence[EvalInputItem]) -> Any:
        """Call it for all rollouts of one example.

        Args:
            group: The rollouts, at least one.

        Returns:
            What it returns: one reward a rollout; for an async function something to await.
        """
        row = row_of(group[0])
        values: dict[str, Callable[[], Any]] = {
            "items": lambda: list(group),
            "question": lambda: group[0].input_obj,
            "outputs": lambda: [item.output_obj for item in group],
            "trajectories": lambda: [self._trajectory(item) for item in group],
        }
        if self._takes_the_rollout(row):
            values[self._parameters.single or ""] = values["items"]
        return self._call(values, row)

    @property
    def _offered(self) -> tuple[str, ...]:
        return OF_A_GROUP if self.of_group else OF_A_ROLLOUT

    def _takes_the_rollout(self, columns: Iterable[str]) -> bool:
        """Whether its only parameter has a name of its own: it gets the item, or the items of a group."""
        single = self._parameters.single
        return single is not None and single not in self._offered and single not in columns

    def _trajectory(self, item: EvalInputItem) -> Trajectory:
        if self._trajectory_of is None:
            raise ConfigError(f"reward {self.name!r} takes `trajectory`, which is not known here. Take `item` instead.")
        return self._trajectory_of(item)

    def _call(self, values: Mapping[str, Callable[[], Any]], row: Mapping[str, Any]) -> Any:
        def find(parameter: inspect.Parameter) -> Any:
            if parameter.name in values:
                return values[parameter.name]()
            if parameter.name in row:
                return row[parameter.name]
            if parameter.default is not inspect.Parameter.empty:
                return LEFT_OUT
            raise ConfigError(self._unknown(parameter.name, row))

        args, kwargs = self._parameters.arguments(find, row)
        return self.function(*args, **kwargs)

    def _unknown(self, name: str, columns: Iterable[str]) -> str:
        known = [*self._offered, *columns]
        return f"reward {self.name!r} wants {name!r}, which no row has. {did_you_mean(name, known)}"


def row_of(item: EvalInputItem) -> Mapping[str, Any]:
    """The columns of a rollout's row in the dataset; none of one that is no mapping."""
    row = item.full_dataset_entry
    return row if isinstance(row, Mapping) else {}
