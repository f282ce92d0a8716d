"""Evaluators that read rollouts in the Agent Trajectory Interchange Format."""

import math

import pytest

import finetune_nb as ft
from finetune_nb.plugins.eval.evaluator.atif_base_evaluator import AtifBaseEvaluator
from finetune_nb.plugins.eval.evaluator.atif_evaluator import AtifEvalSample
from finetune_nb.rewards.recorded import needs_trajectories
from finetune_nb.rewards.scoring import evaluate_items
from finetune_nb.types import EvalInputItem

CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
    {"id": "c2", "type": "function", "function": {"name": "look", "arguments": "not json"}},
]
EPISODE = [
    ft.EpisodeItem(role="system", content="You can add."),
    ft.EpisodeItem(role="user", content="1+1"),
    ft.EpisodeItem(role="assistant", content="", logprobs=[-0.5], metadata={"tool_calls": CALLS}),
    ft.EpisodeItem(role="tool", content="2", metadata={"tool_call_id": "c1"}),
    ft.EpisodeItem(role="tool", content="?", metadata={"tool_call_id": "c9"}),
    ft.EpisodeItem(role="assistant", content="2", logprobs=[-0.5], metadata={"reasoning_content": "easy"}),
]


class CountsTools(AtifBaseEvaluator):
    async def evaluate_atif_item(self, sample: AtifEvalSample) -> ft.EvalOutputItem:
        if sample.output_obj == "raises":
            raise ValueError("cannot be read")
        self.seen = sample
        tools = sum(len(step.tool_calls or ()) for step in sample.trajectory.steps)
        return ft.EvalOutputItem(id=sample.item_id, score=float(tools), reasoning={})


def items(*outputs):
    about = {"input_obj": "q", "expected_output_obj": "a", "full_dataset_entry": {}}
    return [EvalInputItem(id=n, output_obj=output, **about) for n, output in enumerate(outputs)]


def trajectory_of(item):
    if item.output_obj == "none":
        raise ValueError("the workflow made no model call")
    return ft.Trajectory(episode=EPISODE, reward=math.nan)


async def test_messages_are_steps_with_tool_calls_and_what_the_tools_returned():
    evaluator = CountsTools()
    found = await evaluate_items(evaluator, items("fine"), trajectory_of=trajectory_of)
    assert found.average_score == 2.0
    steps = evaluator.seen.trajectory.steps
    assert [(step.step_id, step.source, step.message) for step in steps] == [
        (1, "system", "You can add."),
        (2, "user", "1+1"),
        (3, "agent", ""),
        (4, "user", "?"),  # nobody called it
        (5, "agent", "2"),
    ]
    assert [(call.function_name, call.arguments) for call in steps[2].tool_calls] == [
        ("add", {"a": 1}),
        ("look", {"input": "not json"}),
    ]
    assert [result.model_dump() for result in steps[2].observation.results] == [
        {"source_call_id": "c1", "content": "2"}
    ]
    assert steps[4].reasoning_content == "easy"


async def test_a_rollout_that_cannot_be_scored_has_its_error_and_the_others_their_scores():
    info = ft.EvaluatorInfo(config=ft.EvaluatorBaseConfig(), description="counts")
    info.evaluate_atif_fn = CountsTools().evaluate_atif_fn
    found = await evaluate_items(info, items("raises", "none", "fine"), trajectory_of=trajectory_of)
    assert [each.score for each in found.eval_output_items] == [None, None, 2.0]
    assert [each.error for each in found.eval_output_items[:2]] == [
        "ValueError: cannot be read",
        "ValueError: the workflow made no model call",
    ]
    assert needs_trajectories({"counts": info})


async def test_an_evaluator_without_any_function_is_refused():
    info = ft.EvaluatorInfo(config=ft.EvaluatorBaseConfig())
    with pytest.raises(ft.ConfigError, match="a reward is a function, or has evaluate"):
        await evaluate_items(info, items("fine"), trajectory_of=trajectory_of)
