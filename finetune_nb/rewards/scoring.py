"""Scores finished rollouts with a run's evaluators: those of one rollout, those of a group, and weighted sums of them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..text import text_of
from ..threads import in_daemon_thread
from ..types import EvalInput, EvalInputItem, EvalOutput, EvalOutputItem
from ..user_code import contained, contained_call
from .functions import RewardFunction, TrajectoryOf, needs_group
from .verdicts import no_score, output_of, verdict_of, weighted_sum

__all__ = [
    "WeightedSum",
    "check_evaluator",
    "evaluate_items",
    "score",
]

PATIENCE = 1.0
"""Seconds that a reward gets to clean up after the epoch was aborted."""


class WeightedSum:
    """The weighted sum of other evaluators, which are asked once however often their scores are used.

    Args:
        config: Has the `weights` in force: evaluator name -> weight.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def weights(self) -> dict[str, float]:
        """Evaluator name -> weight."""
        return self.config.weights


async def score(
    evaluators: Mapping[str, Any],
    items: Sequence[EvalInputItem],
    groups: Sequence[Sequence[int]] | None,
    known: Mapping[str, Sequence[EvalOutputItem]] | None = None,
    max_concurrency: int = 8,
    trajectory_of: TrajectoryOf | None = None,
) -> dict[str, EvalOutput]:
    """Score rollouts with every evaluator that can score them by now.

    Args:
        evaluators: Evaluators by name. A weighted sum is made of the others' verdicts.
        items: The rollouts.
        groups: Positions in `items` of the rollouts of each example. None: not all of them have ended, and evaluators that need
            them are left out.
        known: Verdicts by evaluator that are there already, one a rollout.
        max_concurrency: How many calls of an async function run at once.
        trajectory_of: Makes the trajectory of a rollout, where a function asks for it.

    Returns:
        The verdicts by evaluator, one a rollout in the order of `items`. Evaluators that could not be asked yet are missing.
    """
    found: dict[str, EvalOutput] = {}
    verdicts: dict[str, Sequence[EvalOutputItem]] = dict(known or {})
    for name, evaluator in evaluators.items():
        if name in verdicts or isinstance(evaluator, WeightedSum):
            continue
        if not needs_group(evaluator):
            output = await evaluate_items(evaluator, items, max_concurrency, trajectory_of)
        elif groups is not None:
            output = await _evaluate_groups(evaluator, items, groups, max_concurrency, trajectory_of)
        else:
            continue
        found[name] = output
        verdicts[name] = output.eval_output_items

    # A sum may have sums among its parts.
    sums = {name: each for name, each in evaluators.items() if isinstance(each, WeightedSum) and name not in verdicts}
    while ready := [name for name, each in sums.items() if verdicts.keys() >= each.weights.keys()]:
        for name in ready:
            weights = sums.pop(name).weights
            added = []
            for place, item in enumerate(items):
                added.append(weighted_sum(item.id, weights, {part: verdicts[part][place] for part in weights}))
            found[name] = output_of(added)
            verdicts[name] = added
    return {name: found[name] for name in evaluators if name in found}


def check_evaluator(evaluator: Any, items: Sequence[EvalInputItem]) -> None:
    """Check that an evaluator can be called with rows like these.

    Args:
        evaluator: A function, or an object with `evaluate`, which takes any.
        items: The dataset's rows.

    Raises:
        ConfigError: It is no evaluator, or a function with a parameter that nothing fills.
    """
    if not isinstance(evaluator, WeightedSum) and _batch_of(evaluator) is None:
        RewardFunction(evaluator).check(items)


def _batch_of(evaluator: Any) -> Any:
    """The method that scores all items in one call; None for a function of one rollout."""
    return getattr(evaluator, "evaluate_fn", None) or getattr(evaluator, "evaluate", None)


# ── of one rollout ───────────────────────────────────────────────────────────────────────────────────────────────────


async def evaluate_items(
    evaluator: Any,
    items: Sequence[EvalInputItem],
    max_concurrency: int = 8,
    trajectory_of: TrajectoryOf | None = None,
) -> EvalOutput:
    """Score every rollout with one evaluator.

    Args:
        evaluator: A function, or an object with `evaluate(EvalInput) -> EvalOutput`.
        items: The rollouts.
        max_concurrency: How many calls of an async function run at once.
        trajectory_of: Makes the trajectory of a rollout, where a function asks for it.

    Returns:
        One verdict a rollout. One that cannot be scored has score None and an error; an evaluator that scores all items in one
        call and raises leaves each of them with that error.

    Raises:
        ConfigError: It is no evaluator.
    """
    batch = _batch_of(evaluator)
    if batch is not None:
        return await _batched(batch, items)
    function = RewardFunction(evaluator, trajectory_of)
    if function.is_async:
        gate = asyncio.Semaphore(max_concurrency)

        async def ask(item: EvalInputItem) -> EvalOutputItem:
            async with gate:
                return await _asked(item.id, function.of_rollout, item)

        return output_of(list(await asyncio.gather(*map(ask, items))))
    called = await in_daemon_thread(_call_all, function.of_rollout, items)  # one thread: a slow reward blocks nobody
    return output_of([await _awaited(item.id, value) for item, value in zip(items, called, strict=True)])


async def _asked(item_id: Any, function: Callable[..., Any], *args: Any) -> EvalOutputItem:
    """The verdict of an async function."""
    try:
        value = await contained("the reward", function(*args), PATIENCE)
    except Exception as error:
        return no_score(item_id, error)
    return verdict_of(item_id, value)


def _call_all(function: Callable[[EvalInputItem], Any], items: Sequence[EvalInputItem]) -> list[Any]:
    """What a sync function returns for each rollout, as a verdict; or what is to be awaited."""
    called: list[Any] = []
    for item in items:
        try:
            value = contained_call("the reward", function, item)
        except Exception as error:
            called.append(no_score(item.id, error))
        else:
            called.append(value if inspect.isawaitable(value) else verdict_of(item.id, value))
    return called


async def _awaited(item_id: Any, value: Any) -> EvalOutputItem:
    """The verdict of a sync function that returned something to await."""
    if isinstance(value, EvalOutputItem):
        return value
    return await _asked(item_id, lambda: value)


async def _batched(batch: Callable[[EvalInput], Awaitable[EvalOutput]], items: Sequence[EvalInputItem]) -> EvalOutput:
    try:
        asked = batch(EvalInput.model_construct(eval_input_items=list(items)))
        output = await contained("the evaluator", asked, PATIENCE)
        by_id = {text_of(item.id): item for item in output.eval_output_items}
    except Exception as error:
        return output_of([no_score(item.id, error) for item in items])
    verdicts = []
    for item in items:
        given = by_id.get(text_of(item.id), no_score(item.id, "the evaluator returned nothing for this item"))
        verdicts.append(verdict_of(item.id, given))
    return output_of(verdicts)


# ── of a group ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def _evaluate_groups(
    evaluator: Any,
    items: Sequence[EvalInputItem],
    groups: Sequence[Sequence[int]],
    max_concurrency: int,
    trajectory_of: TrajectoryOf | None,
) -> EvalOutput:
    """One verdict a rollout, of a function that needs all rollouts of the example."""
    function = RewardFunction(evaluator, trajectory_of)
    calls: list[_Call] = []
    for places in groups:
        group = [items[place] for place in places]
        if function.of_group:
            calls.append(_Call(places, partial(function.of_rollouts, group)))
        else:
            calls += [_Call([place], partial(function.of_rollout, items[place], group)) for place in places]

    if function.is_async:
        gate = asyncio.Semaphore(max_concurrency)

        async def ask(call: _Call) -> Any:
            async with gate:
                return await _returned(call.run())

        values = await asyncio.gather(*map(ask, calls))
    else:
        called = await in_daemon_thread(_run_all, calls)
        values = [await _returned(value) if inspect.isawaitable(value) else value for value in called]

    verdicts: list[Any] = [None] * len(items)
    for call, value in zip(calls, values, strict=True):
        group = [items[place] for place in call.places]
        found = _group_verdicts(function, group, value) if function.of_group else [_verdict(group[0], value)]
        for place, verdict in zip(call.places, found, strict=True):
            verdicts[place] = verdict
    return output_of(verdicts)


@dataclass(frozen=True)
class _Call:
    """A call of a reward function, and the rollouts that it scores."""

    places: Sequence[int]
    run: Callable[[], Any]


@dataclass(frozen=True)
class _Raised:
    """In place of what a call returns."""

    error: Exception


def _run_all(calls: Sequence[_Call]) -> list[Any]:
    """What sync calls return, or something to await."""
    values: list[Any] = []
    for call in calls:
        try:
            values.append(contained_call("the reward", call.run))
        except Exception as error:
            values.append(_Raised(error))
    return values


async def _returned(value: Awaitable[Any]) -> Any:
    try:
        return await contained("the reward", value, PATIENCE)
    except Exception as error:
        return _Raised(error)


def _verdict(item: EvalInputItem, value: Any) -> EvalOutputItem:
    return no_score(item.id, value.error) if isinstance(value, _Raised) else verdict_of(item.id, value)


def _group_verdicts(function: RewardFunction, group: Sequence[EvalInputItem], value: Any) -> list[EvalOutputItem]:
    """The verdicts of a function that returns one reward for each rollout of a group."""
    if not isinstance(value, _Raised):
        try:
            value = contained_call("the reward", list, value)
        except Exception as error:
            value = _Raised(error)
    if isinstance(value, _Raised):
        return [no_score(item.id, value.error) for item in group]
    if len(value) != len(group):
        error = f"group reward {function.name!r} returned {len(value)} rewards; expected one for each of {len(group)} rollouts"
        return [no_score(item.id, error) for item in group]
    return [verdict_of(item.id, each) for item, each in zip(group, value, strict=True)]
