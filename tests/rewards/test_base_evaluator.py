"""Evaluators as the Toolkit's documents write them: a class with `evaluate_item`, registered with an EvaluatorInfo."""

import asyncio

import pytest

import finetune_nb as ft
from finetune_nb.rewards.scoring import evaluate_items
from finetune_nb.types import EvalInputItem


class OverlapConfig(ft.EvaluatorBaseConfig, name="word_overlap"):
    lower: bool = True


class Overlap(ft.BaseEvaluator):
    running = most = 0

    def __init__(self, lower=True, max_concurrency=4):
        super().__init__(max_concurrency, tqdm_desc="Evaluating overlap")
        self.lower = lower

    async def evaluate_item(self, item):
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        if item.output_obj is None:
            raise ValueError("no output")
        if item.output_obj == "exit":
            raise SystemExit(3)
        words = [set(str(text).lower().split()) for text in (item.output_obj, item.expected_output_obj)]
        score = len(words[0] & words[1]) / len(words[0] | words[1])
        return ft.EvalOutputItem(id=item.id, score=score, reasoning={"words": sorted(words[0])})


@ft.register_evaluator(config_type=OverlapConfig)
async def overlap(config, builder):
    evaluator = Overlap(config.lower, builder.get_max_concurrency())
    yield ft.EvaluatorInfo(config=config, evaluate_fn=evaluator.evaluate, description="Overlap Evaluator")


def items(*outputs):
    about = {"input_obj": "q", "expected_output_obj": "a b", "full_dataset_entry": {}}
    return [EvalInputItem(id=n, output_obj=output, **about) for n, output in enumerate(outputs)]


async def test_an_evaluator_that_is_registered_with_its_description_scores_each_rollout():
    config = ft.load_config({"eval": {"evaluators": {"overlap": {"_type": "word_overlap"}}}})
    async with ft.Builder(config) as builder:
        found = await evaluate_items(await builder.get_evaluator("overlap"), items("a b", "A c", None, "exit"))
    assert [each.score for each in found.eval_output_items] == [1.0, pytest.approx(1 / 3), None, None]
    assert found.average_score == pytest.approx(2 / 3)
    assert [each.error for each in found.eval_output_items[2:]] == ["ValueError: no output", "SystemExit: 3"]


async def test_as_many_are_scored_at_once_as_was_said():
    evaluator = Overlap(max_concurrency=3)
    await evaluator.evaluate(ft.EvalInput(eval_input_items=items(*["a"] * 12)))
    assert evaluator.most == 3
