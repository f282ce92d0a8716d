"""reasoning-gym's data sets as they are installed."""

from __future__ import annotations

from typing import Any

import pytest
import reasoning_gym
from intervals import reward_interval

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.examples.calculator.agent import solve as calculate
from finetune_nb.testing import FakeAdapter, ScriptedPolicy

pytestmark = pytest.mark.slow
TASKS = """
    ab aiw arc_1d base_conversion basic_arithmetic binary_matrix calendar_arithmetic caesar_cipher chain_sum countdown
    family_relationships gcd knights_knaves letter_counting mini_sudoku n_queens number_sequence prime_factorization
    tower_of_hanoi word_ladder
"""


def knowing(rows: list[dict[str, Any]]) -> FakeAdapter:
    """An adapter whose policy knows the stored answers."""
    answers = {row["question"]: row["answer"] for row in rows}
    return FakeAdapter(
        policy=ScriptedPolicy(lambda messages, seed: f"<answer>{answers[messages[-1]['content']]}</answer>")
    )


@pytest.mark.parametrize("name", TASKS.split())
async def test_a_task_goes_through_a_run(name, tmp_path):
    options = {"size": 4, "seed": 5, "system": "default"}
    tasks = reasoning_gym.create_dataset(name, size=4, seed=5)
    adapter = knowing(list(tasks))
    run = ft.Run(
        env=f"reasoning_gym:{name}",
        env_options=options,
        adapter=adapter,
        generations=2,
        sampling={"max_tokens": 4096},
        output_dir=tmp_path,
    )
    await run.next_epoch()
    frame = run.trajectories()
    assert len(frame) == 8
    assert frame.error.isna().all()
    assert frame.reward.min() >= 0.99
    run.close()


async def test_a_dataset_object_is_taken_and_its_metadata_are_columns(tmp_path):
    tasks = reasoning_gym.create_dataset("chain_sum", size=6, seed=1, max_digits=1)

    async def solve(expression, num_terms, llm):  # metadata, by their names
        assert str(num_terms).isdigit()
        return (await llm.chat([{"role": "user", "content": expression}])).content

    answers = {each["metadata"]["expression"]: each["answer"] for each in tasks}
    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: answers[messages[-1]["content"]]))
    run = ft.Run(solve, env=tasks, adapter=adapter, generations=2, output_dir=tmp_path)
    await run.next_epoch()
    assert run.trajectories().reward.tolist() == [1.0] * 12
    assert run.config.run.environment.name == "ChainSumDataset"
    run.close()


def rows_of(**options: Any) -> list[dict[str, Any]]:
    return ft.Run(env="reasoning_gym:chain_sum", env_options={"size": 40, **options}).config.builder.ready(
        "dataset", "environment:train"
    )


def test_a_level_is_the_difficulty_of_its_own_curriculum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terms = {level: {row["num_terms"] for row in rows_of(level=level)} for level in (0, 3)}
    assert max(terms[0]) < max(terms[3])
    assert rows_of(seed=1) == rows_of(seed=1) != rows_of(seed=2)


def test_held_out_tasks_are_none_of_the_training_set(tmp_path):
    options = {"size": 40, "max_terms": 2, "max_digits": 1, "validation": 30}
    run = ft.Run(env="reasoning_gym:chain_sum", env_options=options, output_dir=tmp_path)
    ready = run.config.builder.ready
    train, held_out = (ready("dataset", f"environment:{role}") for role in ("train", "validation"))
    assert len(held_out) == 30
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    with pytest.raises(ConfigError, match="has only [0-9]+ tasks that are not in the training set"):
        ft.Run(env="reasoning_gym:chain_sum", env_options={**options, "size": 500, "validation": 400})


def test_mistakes_say_what_is_known():
    with pytest.raises(ConfigError, match="no data set 'chain_sums'. Did you mean 'chain_sum'"):
        ft.Run(env="reasoning_gym:chain_sums")
    with pytest.raises(ConfigError, match="'max_digit', which is no option.*'max_digits'"):
        ft.Run(env="reasoning_gym:chain_sum", env_options={"max_digit": 2})
    with pytest.raises(ConfigError, match="refuses these options.*max_digits"):
        ft.Run(env="reasoning_gym:chain_sum", env_options={"min_digits": 3, "max_digits": 1})
    with pytest.raises(ConfigError, match="'size', and env is a data set that is made already"):
        ft.Run(env=reasoning_gym.create_dataset("chain_sum", size=3), env_options={"size": 4})


@pytest.mark.proof
async def test_the_reward_rises_in_three_epochs(tmp_path):
    """Tasks and scorer are reasoning-gym's, the agent is the calculator's: it learns to use its tool."""

    async def solve(expression, llm):
        return await calculate(expression.replace(" ", ""), llm)

    options = {"size": 100, "min_terms": 2, "max_terms": 3, "max_digits": 1}
    training = {"learning_rate": 1e-3}
    run = ft.Run(solve, env="reasoning_gym:chain_sum", env_options=options, training=training, output_dir=tmp_path)
    for _ in range(4):
        await run.next_epoch()
    frame = run.trajectories()
    print(frame.groupby("epoch").reward.mean().round(3).to_dict())
    before, after = (reward_interval(frame, epoch) for epoch in (0, 3))
    assert after[0] > before[1]
    run.close()
