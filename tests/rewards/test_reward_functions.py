"""Rewards as functions: their parameters by name, several with weights, of a turn, of a group, and those written for TRL."""

from __future__ import annotations

import asyncio
import math

import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.rewards.functions import RewardFunction
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from finetune_nb.types import EvalInputItem

ROWS = [
    {"id": "a", "question": "3+4", "answer": "7", "level": 2},
    {"id": "b", "question": "1+1", "answer": "2", "level": 1},
]


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def make_run(reward, rows=ROWS, workflow=solve, script=lambda messages, seed: str(seed % 10), **options):
    adapter = FakeAdapter(policy=ScriptedPolicy(script))
    return ft.Run(workflow, reward, rows, adapter=adapter, generations=options.pop("generations", 3), **options)


@pytest.fixture
def collected(tmp_path, closing):
    """One epoch of a run with that reward: its trajectories as a frame."""

    def collect(reward, **options):
        run = closing(make_run(reward, output_dir=tmp_path, **options))
        ft.run_sync(run.next_epoch())
        return run.trajectories()

    return collect


def item(output="7", **row):
    row = {"id": "a", "question": "3+4", "answer": "7", **row}
    return EvalInputItem(
        id=row["id"],
        input_obj=row["question"],
        expected_output_obj=row["answer"],
        output_obj=output,
        full_dataset_entry=row,
    )


# ── parameters by name ───────────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_are_filled_by_name_from_the_rollout_and_its_row():
    def reward(question, output, answer, item, level, missing="default"):
        return question, output, answer, item.id, level, missing

    assert RewardFunction(reward).of_rollout(item(level=3)) == ("3+4", "7", "7", "a", 3, "default")


def test_positional_only_parameters_and_callable_objects_are_filled_too():
    class Reward:
        def __call__(self, output, answer, /, *, level):
            return output, answer, level

    assert RewardFunction(Reward()).of_rollout(item(level=1)) == ("7", "7", 1)


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (lambda item: item.id, "a"),
        (lambda anything: anything.id, "a"),
        (lambda output: output, "7"),
        (lambda question: question, "3+4"),
        (lambda answer: answer, "7"),
        (lambda output, **row: row["level"], 5),
        (len, TypeError),
    ],
)
def test_a_single_parameter_is_the_item_unless_its_name_says_something_else(function, given):
    if given is TypeError:
        with pytest.raises(TypeError):
            RewardFunction(function).of_rollout(item())
    else:
        assert RewardFunction(function).of_rollout(item(level=5)) == given


def test_the_trajectory_is_that_of_the_rollout(collected):
    def reward(trajectory, output):
        assert math.isnan(trajectory.reward)
        return float(trajectory.episode[-1].content == output)

    assert collected(reward).reward.tolist() == [1.0] * 6


def test_a_parameter_that_nothing_fills_is_refused_before_the_first_rollout(tmp_path, closing):
    run = closing(make_run(lambda output, anwser: 1.0, output_dir=tmp_path))
    with pytest.raises(ConfigError, match="wants 'anwser', which no row has. Did you mean 'answer'"):
        ft.run_sync(run.next_epoch())
    assert len(run) == 0


def test_a_reward_that_is_no_function_is_refused_with_the_forms_that_there_are(tmp_path, closing):
    run = closing(make_run("correct", output_dir=tmp_path))
    with pytest.raises(ConfigError, match="Several rewards are a dict"):
        ft.run_sync(run.next_epoch())


# ── datasets without a question ──────────────────────────────────────────────────────────────────────────────────────

PROMPTS = [{"prompt": "1+1", "solution": "2"}, {"prompt": "2+1", "solution": "3"}]


@pytest.mark.parametrize(
    ("workflow", "names"),
    [
        (lambda prompt, llm: llm.chat([{"role": "user", "content": prompt}]).content, {}),
        (lambda prompt, solution, llm: llm.chat([{"role": "user", "content": prompt}]).content, {}),
        (lambda question, llm: llm.chat([{"role": "user", "content": question}]).content, {"question": "prompt"}),
    ],
)
def test_agent_and_reward_may_name_any_column(collected, workflow, names):
    def right(output, solution):
        return float(output == solution)

    frame = collected(right, rows=PROMPTS, workflow=workflow, script=lambda messages, seed: "2", **names)
    assert frame.error.isna().all()
    assert frame.groupby("example").reward.first().tolist() == [1.0, 0.0]


def test_question_and_answer_name_the_columns_of_the_item(collected):
    frame = collected(
        lambda item: float(item.expected_output_obj == item.output_obj),
        rows=PROMPTS, script=lambda messages, seed: messages[-1]["content"][0], question="prompt", answer="solution",
    )  # fmt: skip
    assert frame.reward.tolist() == [0.0] * 6
    assert set(frame.output) == {"1", "2"}


def test_a_question_that_is_no_column_is_refused(tmp_path, closing):
    run = closing(make_run(lambda output: 1.0, rows=PROMPTS, question="promt", output_dir=tmp_path))
    with pytest.raises(ft.DatasetError, match="no column 'promt' for the question. Did you mean 'prompt'"):
        ft.run_sync(run.next_epoch())


# ── several ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def short(output):
    return 1.0


def right(output, answer):
    return 0.5


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({"short": (short, 0.2), "right": right}, 0.2 * 1.0 + 1.0 * 0.5),
        ({"short": short}, 1.0),
        ([short, right], 1.5),
        ((short, right), 1.5),
    ],
)
def test_several_rewards_are_scores_and_their_weighted_sum_is_the_reward(collected, reward, expected):
    frame = collected(reward)
    assert frame.reward.tolist() == [expected] * 6
    names = ["short", "right"] if isinstance(reward, list | tuple) else list(reward)
    assert [name for name in frame if name.startswith("score_")] == [*(f"score_{name}" for name in ["reward", *names])]


def test_each_reward_is_called_once_a_rollout(collected):
    calls = []

    def counted(item):
        calls.append(item.id)
        return 1.0

    collected({"counted": (counted, 2.0), "right": right}, evaluators={"other": lambda item: 0.0})
    assert sorted(calls) == ["a"] * 3 + ["b"] * 3


def test_a_sum_is_missing_where_a_part_is(collected):
    frame = collected({"short": short, "late": lambda item: None if item.id == "a" else 1.0})
    assert frame[frame.example == "a"].reward.isna().all()
    assert frame[frame.example == "a"].error.tolist() == ["late: the reward is None; expected a number"] * 3
    assert frame[frame.example == "b"].reward.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({}, "reward is empty"),
        ([], "reward is empty"),
        ([lambda output: 1.0], "a lambda in a list of rewards has no name"),
        ([short, short], "two rewards are called 'short'"),
        ({"reward": short}, "which is their sum"),
        ({"short": (short, "much")}, r"expected a function, or \(function, weight\)"),
        ({"short": (short, math.inf)}, "expected a finite number"),
        ({"short": (short, 1.0, 2.0)}, r"expected a function, or \(function, weight\)"),
    ],
)
def test_what_is_wrong_with_several_rewards_is_said_at_once(tmp_path, reward, message):
    with pytest.raises(ConfigError, match=message):
        make_run(reward, output_dir=tmp_path)


def test_an_evaluator_cannot_have_the_name_of_a_reward(tmp_path):
    with pytest.raises(ConfigError, match="evaluator 'short' has the name of a reward"):
        make_run({"short": short}, evaluators={"short": short}, output_dir=tmp_path)


def test_a_function_may_return_several_scores(collected):
    frame = collected(lambda output: {"tags": 0.25, "right": 1})
    assert frame.reward.tolist() == [1.25] * 6
    assert frame.score_tags.tolist() == [0.25] * 6
    assert frame.score_right.tolist() == [1.0] * 6


def test_weights_are_live_settings(tmp_path, closing):
    run = closing(make_run({"short": (short, 0.2), "right": right}, output_dir=tmp_path))
    assert {name: value for name, value in run.live.items() if name.startswith("reward.")} == {
        "reward.short": 0.2,
        "reward.right": 1.0,
    }
    ft.run_sync(run.next_epoch())
    run.live["reward.short"] = 2
    ft.run_sync(run.next_epoch())
    assert run.trajectories(epoch=0).reward.unique().tolist() == [0.7]
    assert run.trajectories(epoch=1).reward.unique().tolist() == [2.5]
    assert [(change.field, change.old, change.new) for change in run.changes] == [("reward.short", 0.2, 2.0)]
    for wrong in ("much", math.nan, math.inf):
        with pytest.raises(ConfigError):
            run.live["reward.short"] = wrong
    with pytest.raises(ConfigError, match=r"reward\.shrt"):
        run.live["reward.shrt"] = 1.0


def test_a_weight_that_was_changed_stays_when_the_run_is_resumed(tmp_path, closing):
    reward = {"short": (short, 0.2), "right": right}
    run = closing(make_run(reward, output_dir=tmp_path, name="r"))
    run.live["reward.short"] = 2.0
    ft.run_sync(run.next_epoch())
    run.close()
    run = closing(make_run(reward, output_dir=tmp_path, name="r", resume="auto"))
    assert run.live["reward.short"] == 2.0
    ft.run_sync(run.next_epoch())
    assert run.trajectories(epoch=1).reward.unique().tolist() == [2.5]


# ── of a turn ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def two_turns(question, llm):
    messages = [{"role": "user", "content": question}]
    for _ in range(2):
        reply = await llm.chat(messages)
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": "again"}]
    return reply.content


def test_a_list_has_one_reward_a_turn(tmp_path, closing):
    run = closing(make_run(lambda output: [0.25, 1.0], workflow=two_turns, output_dir=tmp_path))
    epoch = ft.run_sync(run.next_epoch())
    trajectory = epoch.collection.trajectories[0][0]
    assert (trajectory.reward, trajectory.shaped_rewards) == (1.25, [0.25, 1.0])


def test_in_a_sum_a_reward_of_the_whole_rollout_counts_at_the_last_turn(tmp_path, closing):
    run = closing(
        make_run({"steps": (lambda output: [1.0, 2.0], 0.5), "right": right}, workflow=two_turns, output_dir=tmp_path)
    )
    epoch = ft.run_sync(run.next_epoch())
    trajectory = epoch.collection.trajectories[0][0]
    assert (trajectory.reward, trajectory.shaped_rewards) == (2.0, [0.5, 1.5])


def test_a_list_of_another_length_is_no_reward(collected):
    frame = collected(lambda output: [1.0, 1.0, 1.0], workflow=two_turns)
    assert frame.reward.isna().all()
    assert frame.error.unique().tolist() == ["the reward has 3 rewards of turns; the policy sampled 2 turns"]


# ── of a group ───────────────────────────────────────────────────────────────────────────────────────────────────────


@ft.group_reward
def ranked(outputs):
    order = sorted(outputs)
    return [float(order.index(output)) for output in outputs]


def test_a_group_reward_gets_all_rollouts_of_one_example(collected):
    seen = []

    @ft.group_reward
    def reward(question, outputs, items, trajectories, level):
        seen.append((question, len(outputs), len(trajectories), {item.id for item in items}, level))
        return range(len(outputs))

    frame = collected(reward)
    assert sorted(seen) == [("1+1", 3, 3, {"b"}, 1), ("3+4", 3, 3, {"a"}, 2)]
    assert sorted(frame.reward) == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_may_ask_for_its_group(collected, is_async):
    def novel(output, group):
        return 1.0 / sum(other.output_obj == output for other in group)

    async def later(output, group):
        await asyncio.sleep(0)
        return novel(output, group)

    frame = collected(later if is_async else novel, script=lambda messages, seed: "same")
    assert frame.reward.tolist() == [1 / 3] * 6


def test_a_group_reward_is_part_of_a_sum(collected):
    frame = collected({"ranked": (ranked, 10.0), "right": right})
    assert (frame.reward == 10 * frame.score_ranked + frame.score_right).all()


def test_rollouts_that_failed_are_not_in_the_group(collected):
    async def flaky(question, item, llm):
        reply = (await llm.chat([{"role": "user", "content": question}])).content
        if item.id == "a" and reply in "02468":
            raise ValueError("even")
        return reply

    sizes = {}

    @ft.group_reward
    def reward(items, outputs):
        sizes[items[0].id] = len(items)
        return [1.0] * len(outputs)

    frame = collected(reward, workflow=flaky, generations=8)
    failed = frame.error.str.contains("even").sum()
    assert 0 < failed < 8
    assert sizes == {"a": 8 - failed, "b": 8}


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda outputs: [1.0], "returned 1 rewards; expected one for each of 3 rollouts"),
        (lambda outputs: None, "TypeError"),
        (lambda outputs: 1 / 0, "ZeroDivisionError"),
        (lambda outputs: [None] * len(outputs), "the reward is None"),
    ],
)
def test_a_group_reward_that_gives_none_says_why(collected, function, error):
    frame = collected(ft.group_reward(function))
    assert frame.reward.isna().all()
    assert frame.error.str.contains(error).all()


def test_a_group_reward_can_still_be_called():
    assert ranked(["b", "a"]) == [1.0, 0.0]
    assert ranked.__name__ == "ranked"
    with pytest.raises(ConfigError, match="group_reward takes a function"):
        ft.group_reward("ranked")


def test_a_validation_and_a_single_rollout_are_groups_of_one(tmp_path, closing):
    sizes = []

    @ft.group_reward
    def reward(outputs):
        sizes.append(len(outputs))
        return [1.0] * len(outputs)

    run = closing(make_run(reward, validation=sums(2), output_dir=tmp_path))
    assert ft.run_sync(run.validate()).mean_reward == 1.0
    trajectory = ft.run_sync(run.rollout(0))
    assert sizes == [1, 1, 1]
    assert trajectory.reward == 1.0
    assert trajectory.metadata["group_size"] == 1
    assert "a group of 1 rollout" in trajectory._repr_html_()


# ── TRL ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reward_function_of_trl_gets_what_trl_gives_it(collected):
    seen = {}

    def reward_len(completions, prompts, completion_ids, solution, **kwargs):
        seen.update(kwargs, completions=completions, prompts=prompts, ids=completion_ids, solution=solution)
        return [float(len(completion)) for completion in completions]

    frame = collected(ft.from_trl(reward_len), rows=PROMPTS[:1], question="prompt", script=lambda messages, seed: "ab")
    assert frame.reward.tolist() == [2.0] * 3
    assert seen["completions"] == ["ab"] * 3
    assert seen["prompts"] == ["1+1"] * 3
    assert seen["solution"] == ["2"] * 3
    assert seen["ids"] == [[ord("a"), ord("b")]] * 3
    assert {"trainer_state", "log_metric", "log_extra"} <= set(seen)


def test_a_conversational_one_gets_messages(collected):
    rows = [{"prompt": [{"role": "user", "content": "1+1"}], "solution": "2"}]

    async def chat(prompt, llm):
        return (await llm.chat(prompt)).content

    async def right(prompts, completions, solution, **kwargs):
        assert prompts[0] == rows[0]["prompt"]
        said = [completion[0]["content"] for completion in completions]
        return [1.0 if one == other else None for one, other in zip(said, solution, strict=True)]

    frame = collected(ft.from_trl(right), rows=rows, workflow=chat, script=lambda messages, seed: "2")
    assert frame.reward.tolist() == [1.0] * 3


def test_rewards_of_trl_have_their_names_in_a_list(collected):
    def long(completions, **kwargs):
        return [1.0] * len(completions)

    frame = collected([ft.from_trl(long), right])
    assert frame.score_long.tolist() == [1.0] * 6
    assert frame.reward.tolist() == [1.5] * 6
