"""What a reward function or an evaluator returned, as a verdict: a score, or the reason why there is none.

A value that is no number (None, NaN, a text, an exception) is no score: the verdict then carries an error, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from ..types import EvalOutput, EvalOutputItem
from ..user_code import contained_call, raised_text
from .numbers import in_order

__all__ = [
    "Verdict",
    "no_score",
    "output_of",
    "scores_of",
    "verdict",
    "verdict_of",
    "weighted_sum",
    "words_of",
]


class Verdict(EvalOutputItem):
    """One verdict on one rollout, with what it is made of."""

    parts: dict[str, float | None] = Field(default_factory=dict)
    """Scores by name, where a function returned several."""
    turns: list[float] | None = None
    """(T,) a reward for each of the T turns that the policy sampled; they add up to the score."""


def verdict_of(item_id: Any, value: Any) -> EvalOutputItem:
    """Read what user code returned. Reading it may run code of its class.

    Args:
        item_id: Id of the example.
        value: What was returned.

    Returns:
        The verdict, with an error if the value is no score.
    """
    try:
        return contained_call("the reward", verdict, item_id, value)
    except Exception as error:
        return no_score(item_id, error)


def verdict(item_id: Any, value: Any) -> EvalOutputItem:
    """Read a value as a score with its reasoning.

    Args:
        item_id: Id of the example.
        value: A number; a mapping with `score` and `reasoning`; any other mapping, of several scores that are added up; a list of
            rewards, one a sampled turn, that are added up; or a verdict. inf stays inf: the curriculum leaves its group out.

    Returns:
        The verdict, with an error if the value is no score.
    """
    if isinstance(value, EvalOutputItem):
        return _checked(item_id, value)
    if isinstance(value, Mapping):
        if "score" not in value:
            return _sum_of_parts(item_id, value)
        return _scored(item_id, value["score"], value.get("reasoning", {}))
    if isinstance(value, list | tuple):
        return _sum_of_turns(item_id, value)
    return _scored(item_id, value, {})


def _checked(item_id: Any, given: EvalOutputItem) -> EvalOutputItem:
    if given.error is not None:
        return no_score(item_id, given.error, given.reasoning)
    scored = _scored(item_id, given.score, given.reasoning)
    if isinstance(given, Verdict) and scored.error is None and (given.parts or given.turns is not None):
        return given.model_copy(update={"id": item_id, "score": scored.score})
    return scored


def _scored(item_id: Any, value: Any, reasoning: Any) -> EvalOutputItem:
    score, error = _number(value)
    if error is not None:
        return no_score(item_id, error, reasoning)
    return EvalOutputItem(id=item_id, score=score, reasoning=reasoning, error=None)


def _number(value: Any) -> tuple[float, str | None]:
    """A value as a float, or why it is none."""
    if value is None or isinstance(value, str | bytes):
        return math.nan, f"the reward is {value!r:.60}; expected a number"
    try:
        score = float(value)
    except OverflowError:
        return math.nan, "the reward is an integer too large for a float"
    except (TypeError, ValueError):
        return math.nan, f"the reward is of type {type(value).__name__}; expected a number"
    if math.isnan(score):
        return math.nan, "the reward is NaN; expected a number"
    return score, None


def _sum_of_parts(item_id: Any, values: Mapping[Any, Any]) -> EvalOutputItem:
    if not values:
        return no_score(item_id, "the reward is an empty dict; expected a number, or scores by name")
    parts: dict[str, float | None] = {}
    errors: list[str] = []
    for name, value in values.items():
        score, error = _number(value)
        parts[str(name)] = None if error else score
        if error:
            errors.append(f"{name}: {error}")
    if errors:
        return Verdict(id=item_id, score=None, reasoning={}, error="; ".join(errors), parts=parts)
    total = in_order(score for score in parts.values() if score is not None)
    return Verdict(id=item_id, score=total, reasoning={}, parts=parts)


def _sum_of_turns(item_id: Any, values: Sequence[Any]) -> EvalOutputItem:
    turns: list[float] = []
    for place, value in enumerate(values):
        score, error = _number(value)
        if error is None and math.isinf(score):
            error = "the reward is infinite; expected a number"
        if error is not None:
            return no_score(item_id, f"turn {place}: {error}")
        turns.append(score)
    return Verdict(id=item_id, score=math.fsum(turns), reasoning={}, turns=turns)


def no_score(item_id: Any, error: Exception | str, reasoning: Any = None) -> EvalOutputItem:
    """Make the verdict that there is no score.

    Args:
        item_id: Id of the example.
        error: Why.
        reasoning: What the evaluator said of it.

    Returns:
        The verdict.
    """
    text = error if isinstance(error, str) else raised_text(error)
    return EvalOutputItem(id=item_id, score=None, reasoning=reasoning or {}, error=text)


def weighted_sum(item_id: Any, weights: Mapping[str, float], found: Mapping[str, EvalOutputItem]) -> EvalOutputItem:
    """Add up scores: sum over the names of weight * score.

    A reward of a turn counts at its turn, any other at the last one, so that the turns add up to the score.

    Args:
        item_id: Id of the example.
        weights: Name -> weight.
        found: Name -> verdict, for each of the weights.

    Returns:
        The verdict; its reasoning has the scores. It has an error if one of them is missing.
    """
    scores = {name: found[name].score for name in weights}
    missing = [f"{name}: {found[name].error}" for name in weights if scores[name] is None]
    if missing:
        return no_score(item_id, "; ".join(missing), scores)
    total = in_order(weight * scores[name] for name, weight in weights.items())
    score, error = _number(total)
    if error is not None:
        return no_score(item_id, error, scores)
    return Verdict(id=item_id, score=score, reasoning=scores, turns=_weighted_turns(weights, found))


def _weighted_turns(weights: Mapping[str, float], found: Mapping[str, EvalOutputItem]) -> list[float] | None:
    of_turns = {name: turns for name in weights if (turns := getattr(found[name], "turns", None))}
    if not of_turns:
        return None
    total = [0.0] * max(map(len, of_turns.values()))
    for name, weight in weights.items():
        if name in of_turns:
            for place, value in enumerate(of_turns[name]):
                total[place] += weight * value
        else:
            total[-1] += weight * found[name].score
    return total


def scores_of(verdicts: Mapping[str, EvalOutputItem], reward_name: str | None) -> dict[str, float | None]:
    """The scores of a rollout by name.

    Args:
        verdicts: By evaluator.
        reward_name: The evaluator whose score is the reward.

    Returns:
        A score for each evaluator, and for each part of one that returned several: by the part's name, for an evaluator that is
        not the reward "<evaluator>.<part>".
    """
    scores = {name: each.score for name, each in verdicts.items()}
    for name, each in verdicts.items():
        for part, score in getattr(each, "parts", {}).items():
            known = part if name == reward_name and part not in scores else f"{name}.{part}"
            scores[known] = score
    return scores


def words_of(verdicts: Mapping[str, EvalOutputItem], reward_name: str | None) -> dict[str, Any]:
    """What the evaluators said of a rollout besides their scores.

    Args:
        verdicts: By evaluator.
        reward_name: The evaluator whose score is the reward; what it said is kept apart from the others.

    Returns:
        Evaluator -> its words, without those that said nothing.
    """
    return {name: each.reasoning for name, each in verdicts.items() if each.reasoning and name != reward_name}


def output_of(verdicts: list[EvalOutputItem]) -> EvalOutput:
    """Put verdicts together.

    Args:
        verdicts: One a rollout.

    Returns:
        The verdicts with the mean of their scores, None if there is none.
    """
    from .numbers import mean  # numpy, which `import finetune_nb` does not load

    scores = [each.score for each in verdicts if isinstance(each.score, int | float) and math.isfinite(each.score)]
    average = mean(scores) if scores else None
    return EvalOutput.model_construct(average_score=average, eval_output_items=verdicts)
