"""The built-in evaluators: they compare the output with the expected one, or combine others."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, FiniteFloat, field_validator

from ..components.builder import Builder
from ..components.registry import register_evaluator
from ..config.base import EvaluatorBaseConfig
from ..config.sections import Config
from ..errors import ConfigError
from ..types import EvalInputItem
from .scoring import WeightedSum

__all__ = [
    "ContainsConfig",
    "ExactMatchConfig",
    "NumericClosenessConfig",
    "RegexConfig",
    "WeightedConfig",
    "reward_name_of",
    "reward_parts",
    "weighted_reward",
]


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

    weights: dict[str, FiniteFloat] = Field(min_length=1)
    """Evaluator name -> weight. Weights that add up to 1 keep the sum in the range of the parts. They may be changed while the
    run continues, as reward.<name>."""


@register_evaluator(config_type=WeightedConfig)
async def weighted(config: WeightedConfig, builder: Builder):
    for name in config.weights:
        await builder.get_evaluator(name)  # one that is not there is an error before the first rollout
    yield WeightedSum(config)


def reward_name_of(config: Config) -> str:
    """The evaluator whose score is a run's reward.

    Args:
        config: The run's config.

    Returns:
        Its name.

    Raises:
        ConfigError: The config names none, and there are several or none.
    """
    tuning = config.finetuning
    builder = config.trajectory_builders.get(tuning.trajectory_builder or "")
    named = getattr(builder, "reward", None) or tuning.reward_function
    if named is not None:
        return named.name
    evaluators = list(config.eval.evaluators)
    if len(evaluators) != 1:
        raise ConfigError(
            f"which of {len(evaluators)} evaluators is the reward is not said. Name it in finetuning.reward_function."
        )
    return evaluators[0]


def reward_parts(config: Config) -> list[str]:
    """The evaluators that a run's reward is made of.

    Args:
        config: The run's config.

    Returns:
        The parts of a weighted sum and the sum itself; else the one evaluator.

    Raises:
        ConfigError: As in `reward_name_of`.
    """
    weighted = weighted_reward(config)
    return [*(weighted.weights if weighted else ()), reward_name_of(config)]


def weighted_reward(config: Config) -> WeightedConfig | None:
    """The section of a run's reward if it is a weighted sum.

    Args:
        config: The run's config.

    Returns:
        The section; None if the reward is something else.
    """
    try:
        section = config.eval.evaluators.get(reward_name_of(config))
    except ConfigError:
        return None
    return section if isinstance(section, WeightedConfig) else None
