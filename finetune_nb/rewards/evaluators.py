"""Evaluators: what scores a finished rollout. A plain function of the item, sync or async, is one; so is an object with
`evaluate(EvalInput) -> EvalOutput`. The built-in ones compare the output with the expected one, or combine others.

A score that is no number (None, NaN, a text, an exception) is no score: the item then carries an error, never 0.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

from pydantic import Field, field_validator

from ..components.builder import Builder
from ..components.registry import register_evaluator
from ..config.base import EvaluatorBaseConfig
from ..errors import ConfigError
from ..text import text_of
from ..threads import in_daemon_thread
from ..types import EvalInput, EvalInputItem, EvalOutput, EvalOutputItem
from ..user_code import contained, contained_call, raised_text

__all__ = [
    "ContainsConfig",
    "ExactMatchConfig",
    "NumericClosenessConfig",
    "RegexConfig",
    "WeightedConfig",
    "evaluate_items",
]


PATIENCE = 1.0
"""Seconds that a reward gets to clean up after the epoch was aborted."""


async def evaluate_items(evaluator: Any, items: Sequence[EvalInputItem], max_concurrency: int = 8) -> EvalOutput:
    """Scores every item. One that cannot be scored has score None and an error; an evaluator that scores all items in one
    call and raises leaves each of them with that error."""
    batch = getattr(evaluator, "evaluate_fn", None) or getattr(evaluator, "evaluate", None)
    if batch is not None:
        return await _batched(batch, items)
    if not callable(evaluator):
        raise ConfigError(
            f"an evaluator is a function of the item, or has evaluate(EvalInput); got {type(evaluator).__name__}."
        )
    if inspect.iscoroutinefunction(evaluator) or inspect.iscoroutinefunction(type(evaluator).__call__):
        gate, ask = asyncio.Semaphore(max_concurrency), cast(Callable[[EvalInputItem], Awaitable[Any]], evaluator)

        async def score(item: EvalInputItem) -> EvalOutputItem:
            async with gate:
                return await _asked(item.id, ask(item))

        verdicts = await asyncio.gather(*map(score, items))
    else:
        verdicts = await in_daemon_thread(_score_all, evaluator, items)  # one thread: a slow reward blocks nobody
        verdicts = [await _asked(*v) if isinstance(v, tuple) else v for v in verdicts]
    return _output(verdicts)


async def _asked(item_id: Any, value: Awaitable[Any]) -> EvalOutputItem:
    """The verdict of a function that returned something to await."""
    try:
        return _verdict(item_id, await contained("the reward", value, PATIENCE))
    except Exception as error:
        return no_score(item_id, error)


def _score_all(evaluator: Callable[[EvalInputItem], Any], items: Sequence[EvalInputItem]) -> list[Any]:
    verdicts: list[Any] = []
    for item in items:
        try:
            value = contained_call("the reward", evaluator, item)
        except Exception as error:
            verdicts.append(no_score(item.id, error))
        else:
            verdicts.append((item.id, value) if inspect.isawaitable(value) else _verdict(item.id, value))
    return verdicts


async def _batched(batch: Callable[[EvalInput], Awaitable[EvalOutput]], items: Sequence[EvalInputItem]) -> EvalOutput:
    try:
        asked = batch(EvalInput.model_construct(eval_input_items=list(items)))
        output = await contained("the evaluator", asked, PATIENCE)
        by_id = {text_of(item.id): item for item in output.eval_output_items}
    except Exception as error:
        return _output([no_score(item.id, error) for item in items])
    verdicts = []
    for item in items:
        given = by_id.get(text_of(item.id), no_score(item.id, "the evaluator returned nothing for this item"))
        verdicts.append(_verdict(item.id, given))
    return _output(verdicts)


def _verdict(item_id: Any, value: Any) -> EvalOutputItem:
    """`verdict` for any value: reading it may run code of its class."""
    try:
        return contained_call("the reward", verdict, item_id, value)
    except Exception as error:
        return no_score(item_id, error)


def verdict(item_id: Any, value: Any) -> EvalOutputItem:
    """What an evaluator returned, as a score with its reasoning. inf stays inf: the curriculum leaves its group out."""
    reasoning: Any = {}
    if isinstance(value, EvalOutputItem):
        if value.error is not None:
            return no_score(item_id, value.error, value.reasoning)
        value, reasoning = value.score, value.reasoning
    elif isinstance(value, Mapping):
        value, reasoning = value.get("score"), value.get("reasoning", {})
    if value is None or isinstance(value, str | bytes):
        return no_score(item_id, f"the reward is {value!r:.60}; expected a number", reasoning)
    try:
        score = float(value)
    except OverflowError:
        return no_score(item_id, "the reward is an integer too large for a float", reasoning)
    except (TypeError, ValueError):
        return no_score(item_id, f"the reward is of type {type(value).__name__}; expected a number", reasoning)
    if math.isnan(score):
        return no_score(item_id, "the reward is NaN; expected a number", reasoning)
    return EvalOutputItem(id=item_id, score=score, reasoning=reasoning, error=None)


def no_score(item_id: Any, error: Exception | str, reasoning: Any = None) -> EvalOutputItem:
    text = error if isinstance(error, str) else raised_text(error)
    return EvalOutputItem(id=item_id, score=None, reasoning=reasoning or {}, error=text)


def _output(verdicts: list[EvalOutputItem]) -> EvalOutput:
    from .numbers import mean  # numpy, which `import finetune_nb` does not load

    scores = [v.score for v in verdicts if isinstance(v.score, int | float) and math.isfinite(v.score)]
    average = mean(scores) if scores else None
    return EvalOutput.model_construct(average_score=average, eval_output_items=verdicts)


class ExactMatchConfig(EvaluatorBaseConfig, name="exact_match"):
    """1 if the output is the expected text, else 0."""

    ignore_case: bool = False
    """Whether capitals count as small letters."""
    strip: bool = True
    """Whether white space around both is ignored."""


@register_evaluator(config_type=ExactMatchConfig)
async def exact_match(config: ExactMatchConfig, builder: Builder):
    def plain(value: Any) -> str:
        text = str(value).strip() if config.strip else str(value)
        return text.casefold() if config.ignore_case else text

    yield lambda item: float(plain(item.output_obj) == plain(item.expected_output_obj))


class NumericClosenessConfig(EvaluatorBaseConfig, name="numeric_closeness"):
    """1 where output and expected number differ by at most `tolerance`; beyond it 0 or, with `scale`, a straight line."""

    tolerance: float = Field(default=1e-6, ge=0)
    """Largest difference that counts as equal."""
    scale: float | None = Field(default=None, gt=0)
    """Difference at which the score reaches 0; None = 0 as soon as the tolerance is exceeded."""


@register_evaluator(config_type=NumericClosenessConfig)
async def numeric_closeness(config: NumericClosenessConfig, builder: Builder):
    def score(item: EvalInputItem) -> float:
        expected = float(item.expected_output_obj)
        try:
            difference = abs(float(str(item.output_obj).replace(",", "").strip()) - expected)
        except ValueError:
            return 0.0  # an output that is no number is as far off as can be
        if difference <= config.tolerance:
            return 1.0
        return max(0.0, 1.0 - difference / config.scale) if config.scale else 0.0

    yield score


class ContainsConfig(EvaluatorBaseConfig, name="contains"):
    """1 if the output contains a text, else 0."""

    text: str | None = None
    """None = the item's expected output."""
    ignore_case: bool = False
    """Whether capitals count as small letters."""


@register_evaluator(config_type=ContainsConfig)
async def contains(config: ContainsConfig, builder: Builder):
    def score(item: EvalInputItem) -> float:
        needle = str(item.expected_output_obj if config.text is None else config.text)
        text = str(item.output_obj)
        return float(needle.casefold() in text.casefold() if config.ignore_case else needle in text)

    yield score


class RegexConfig(EvaluatorBaseConfig, name="regex"):
    """1 if the pattern is found in the output, else 0."""

    pattern: str
    """A regular expression of Python's `re`, searched for anywhere."""

    @field_validator("pattern")
    @classmethod
    def compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


@register_evaluator(config_type=RegexConfig)
async def regex(config: RegexConfig, builder: Builder):
    pattern = re.compile(config.pattern)
    yield lambda item: float(pattern.search(str(item.output_obj)) is not None)


class WeightedConfig(EvaluatorBaseConfig, name="weighted"):
    """The weighted sum of other evaluators; their scores are its reasoning. No sum where one of them has no score."""

    weights: dict[str, float] = Field(min_length=1)
    """Evaluator name -> weight. Weights that add up to 1 keep the sum in the range of the parts."""


@register_evaluator(config_type=WeightedConfig)
async def weighted(config: WeightedConfig, builder: Builder):
    parts = {name: await builder.get_evaluator(name) for name in config.weights}
    yield _Weighted(config.weights, parts)


class _Weighted:
    def __init__(self, weights: Mapping[str, float], parts: Mapping[str, Any]) -> None:
        self._weights, self._parts = weights, parts

    async def evaluate(self, eval_input: EvalInput) -> EvalOutput:
        items = eval_input.eval_input_items
        outputs = [await evaluate_items(part, items) for part in self._parts.values()]
        verdicts = []
        for item, *found in zip(items, *(output.eval_output_items for output in outputs), strict=True):
            scores = dict(zip(self._parts, (v.score for v in found), strict=True))
            missing = [f"{name}: {v.error}" for name, v in zip(self._parts, found, strict=True) if v.score is None]
            if missing:
                verdicts.append(no_score(item.id, "; ".join(missing), scores))
            else:
                total = sum(weight * scores[name] for name, weight in self._weights.items())
                verdicts.append(verdict(item.id, {"score": total, "reasoning": scores}))
        return _output(verdicts)
