"""Scores finished rollouts with a run's evaluators: those of one rollout, those of a group, and weighted sums of them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import ConfigError
from ..text import text_of
from ..threads import in_daemon_thread
from ..types import EvalInput, EvalInputItem, EvalOutput, EvalOutputItem
from ..user_code import contained, contained_call
from .atif import atif_sample
from .functions import RewardFunction, TrajectoryOf, batch_method, needs_group
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
    if not isinstance(evaluator, WeightedSum) and batch_method(evaluator) is None:
        RewardFunction(evaluator).check(items)


# ── one evaluator ────────────────────────────────────────────────────────────────────────────────────────────────────


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
    batch = batch_method(evaluator)
    if batch is not None:
        reads_atif = batch == getattr(evaluator, "evaluate_atif_fn", None)
        return await (_batched_as_atif(batch, items, trajectory_of) if reads_atif else _batched(batch, items))
    function = RewardFunction(evaluator, trajectory_of)
    calls = [_Call(function, [place], [item], partial(function.of_rollout, item)) for place, item in enumerate(items)]
    return await _made(function, calls, len(items), max_concurrency)


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
            calls.append(_Call(function, places, group, partial(function.of_rollouts, group)))
            continue
        for place, item in zip(places, group, strict=True):
            calls.append(_Call(function, [place], [item], partial(function.of_rollout, item, group)))
    return await _made(function, calls, len(items), max_concurrency)


async def _batched(batch: Callable[[Any], Awaitable[EvalOutput]], items: Sequence[EvalInputItem]) -> EvalOutput:
    return await _asked(batch, EvalInput.model_construct(eval_input_items=list(items)), items)


async def _batched_as_atif(
    batch: Callable[[Any], Awaitable[EvalOutput]],
    items: Sequence[EvalInputItem],
    trajectory_of: TrajectoryOf | None,
) -> EvalOutput:
    """As _batched, for an evaluator that reads ATIF. A rollout that has no trajectory is not shown to it."""
    samples, without = [], {}
    for place, item in enumerate(items):
        try:
            if trajectory_of is None:
                raise ConfigError("an evaluator of ATIF needs trajectories, which are not known here")
            samples.append(atif_sample(item, trajectory_of(item)))
        except Exception as error:
            without[place] = no_score(item.id, error)
    found = await _asked(batch, samples, items)
    return output_of([without.get(place, verdict) for place, verdict in enumerate(found.eval_output_items)])


async def _asked(
    batch: Callable[[Any], Awaitable[EvalOutput]], rollouts: Any, items: Sequence[EvalInputItem]
) -> EvalOutput:
    """The verdicts on `items`, which `batch` is given as `rollouts`."""
    try:
        asked = batch(rollouts)
        output = await contained("the evaluator", asked, PATIENCE)
        by_id = {text_of(item.id): item for item in output.eval_output_items}
    except Exception as error:
        return output_of([no_score(item.id, error) for item in items])
    verdicts = []
    for item in items:
        given = by_id.get(text_of(item.id), no_score(item.id, "the evaluator returned nothing for this item"))
        verdicts.append(verdict_of(item.id, given))
    return output_of(verdicts)


# ── calls of a function ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a reward function."""

    function: RewardFunction
    places: Sequence[int]
    """Which rollouts it scores."""
    items: Sequence[EvalInputItem]
    """The rollouts themselves."""
    run: Callable[[], Any]

    def verdicts(self, value: Any) -> list[EvalOutputItem]:
        """One a rollout, of what was returned. Reading it may run code of its class."""
        if not self.function.of_group:
            return [verdict_of(self.items[0].id, value)]
        try:
            values = contained_call("the reward", list, value)
        except Exception as error:
            return self.none(error)
        if len(values) != len(self.items):
            return self.none(
                f"group reward {self.function.name!r} returned {len(values)} rewards; expected one for each of "
                f"{len(self.items)} rollouts"
            )
        return [verdict_of(item.id, each) for item, each in zip(self.items, values, strict=True)]

    def none(self, error: Exception | str) -> list[EvalOutputItem]:
        """The verdicts that there is no score."""
        return [no_score(item.id, error) for item in self.items]


async def _made(function: RewardFunction, calls: Sequence[_Call], count: int, max_concurrency: int) -> EvalOutput:
    """Makes the calls, which together score `count` rollouts."""
    if function.is_async:
        gate = asyncio.Semaphore(max_concurrency)

        async def ask(call: _Call) -> list[EvalOutputItem]:
            async with gate:
                return await _awaited(call, call.run)

        found = await asyncio.gather(*map(ask, calls))
    else:
        made = await in_daemon_thread(_make_all, calls)  # one thread: a slow reward blocks nobody
        found = [
            each if isinstance(each, list) else await _awaited(call, lambda value=each: value.awaitable)
            for call, each in zip(calls, made, strict=True)
        ]
    verdicts: list[Any] = [None] * count
    for call, of_call in zip(calls, found, strict=True):
        for place, verdict in zip(call.places, of_call, strict=True):
            verdicts[place] = verdict
    return output_of(verdicts)


@dataclass(frozen=True, slots=True)
class _Returned:
    """What a sync function returned to be awaited."""

    awaitable: Awaitable[Any]


def _make_all(calls: Sequence[_Call]) -> list[list[EvalOutputItem] | _Returned]:
    """The verdicts of sync calls, or what is to be awaited for them."""
    made: list[list[EvalOutputItem] | _Returned] = []
    for call in calls:
        try:
            value = contained_call("the reward", call.run)
        except Exception as error:
            made.append(call.none(error))
        else:
            made.append(_Returned(value) if inspect.isawaitable(value) else call.verdicts(value))
    return made


async def _awaited(call: _Call, work: Callable[[], Awaitable[Any]]) -> list[EvalOutputItem]:
    try:
        value = await contained("the reward", work(), PATIENCE)
    except Exception as error:
        return call.none(error)
    return call.verdicts(value)
