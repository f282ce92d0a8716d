"""A base class of evaluators that score one rollout at a time, as in the NeMo Agent Toolkit."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ..types import EvalInput, EvalInputItem, EvalOutput, EvalOutputItem
from ..user_code import contained
from .verdicts import no_score, output_of

__all__ = [
    "BaseEvaluator",
    "score_each",
]

T = TypeVar("T")


class BaseEvaluator(ABC):
    """Scores rollouts one by one, several at a time.

    Args:
        max_concurrency: How many rollouts are scored at once, 1 or more.
        tqdm_desc: Kept for the Toolkit, not used here: the panel shows how far an epoch is.
    """

    def __init__(self, max_concurrency: int = 4, tqdm_desc: str = "Evaluating") -> None:
        self.max_concurrency, self.tqdm_desc = max_concurrency, tqdm_desc

    @abstractmethod
    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        """Score one rollout.

        Args:
            item: The rollout.

        Returns:
            The verdict.
        """

    async def evaluate(self, eval_input: EvalInput) -> EvalOutput:
        """Score all rollouts.

        Args:
            eval_input: The rollouts.

        Returns:
            One verdict a rollout, in their order. One for which `evaluate_item` raised has no score, and the error. (The Toolkit
            gives it a score of 0.)
        """
        items = eval_input.eval_input_items
        return await score_each(self, items, self.evaluate_item, [item.id for item in items])


async def score_each(
    evaluator: Any, items: Sequence[T], score: Callable[[T], Coroutine[Any, Any, EvalOutputItem]], ids: Sequence[Any]
) -> EvalOutput:
    """Scores items one by one, as many at a time as the evaluator's `max_concurrency` says. One for which `score` raised has no
    score, and the error."""
    gate = asyncio.Semaphore(evaluator.max_concurrency)

    async def verdict_on(item: T, item_id: Any) -> EvalOutputItem:
        async with gate:
            try:
                return await contained(f"evaluator {type(evaluator).__name__}", score(item))
            except Exception as error:
                return no_score(item_id, error)

    return output_of(await asyncio.gather(*map(verdict_on, items, ids)))
