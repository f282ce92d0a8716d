"""Drawing by difficulty beside drawing evenly: on the demo, and on a task with many solved and many hopeless examples.

    python -m pytest tests/rollouts/test_difficulty_learns.py -m slow -s

prints the held-out reward on the demo after the same rollouts and, on the other task, the rollouts that a held-out level took
(the median of nine seeds) and the share of the groups that taught.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from planted_faults import demo, questions

import finetune_nb as ft
from finetune_nb.examples.calculator.task import TOOLS, first_operation

SEEDS = 3
EXAMPLES, GENERATIONS = 8, 8
SOLVED, HOPELESS, LEARNABLE = 40, 40, 6
LEVEL, MOST = 0.85, 40


def held_out(run):
    return ft.run_sync(run.validate()).mean_reward


@pytest.mark.slow
def test_on_the_demo_it_is_no_worse(tmp_path):
    found = {}
    for draw in ("uniform", "difficulty"):
        found[draw] = []
        for seed in range(SEEDS):
            # As long as the demo and all 400 questions: with less of either, what seeds differ by is as much as the bound.
            run = demo(
                tmp_path / draw, seed=seed, draw=draw, validation=questions("held_out"), validation_interval=100,
                num_epochs=101, examples_per_epoch=40,
            )  # fmt: skip
            for _ in range(12):
                ft.run_sync(run.next_epoch(progress=False))
            found[draw].append(held_out(run))
            run.close()
        print(f"\n{draw}: {np.mean(found[draw]):.2f} ({', '.join(f'{each:.2f}' for each in found[draw])})", end="")
    assert np.mean(found["difficulty"]) > np.mean(found["uniform"]) - 0.05


async def first_move(question, llm):
    reply = await llm.chat([{"role": "user", "content": question}], tools=TOOLS)
    return ">" + str(reply.tool_calls[0].arguments.get("expression")) if reply.tool_calls else reply.content


def reward(output, wanted):
    return 1.0 if wanted == "anything" else float(output == wanted)


def mixed(seed):
    """Rows of which most teach nothing."""
    asked = [row["question"] for row in questions("train")]
    asked = np.random.default_rng(seed).permutation(asked)[: SOLVED + HOPELESS + LEARNABLE].tolist()
    wanted = ["anything"] * SOLVED + ["nothing"] * HOPELESS
    return [
        {"id": n, "question": each, "wanted": wanted[n] if n < len(wanted) else f">{first_operation(each)}"}
        for n, each in enumerate(asked)
    ]


def rollouts_needed(draw, seed, folder):
    """Rollouts until the held-out reward is at the level, or of all epochs where it never is; the share of groups that taught."""
    rows = [
        {"question": r["question"], "wanted": f">{first_operation(r['question'])}"} for r in questions("held_out")[:40]
    ]
    run = ft.Run(
        first_move, reward, mixed(seed), validation=rows, validation_interval=1000, sampling={"max_tokens": 10}, seed=seed,
        generations=GENERATIONS, examples_per_epoch=EXAMPLES, draw=draw, num_epochs=1001, output_dir=folder,
    )  # fmt: skip
    taught = []
    try:
        for _ in range(MOST):
            taught.append(ft.run_sync(run.next_epoch(progress=False)).metrics.groups_with_spread / EXAMPLES)
            if held_out(run) >= LEVEL:
                break
        return len(taught) * EXAMPLES * GENERATIONS, np.mean(taught)
    finally:
        run.close()


@pytest.mark.slow
def test_with_many_solved_and_many_hopeless_examples_it_needs_fewer_rollouts(tmp_path):
    rollouts, taught = {}, {}
    for draw in ("uniform", "difficulty"):
        runs = [rollouts_needed(draw, seed, tmp_path / draw / str(seed)) for seed in range(3 * SEEDS)]
        needed, shares = zip(*runs, strict=True)
        rollouts[draw], taught[draw] = np.median(needed), np.mean(shares)
        told = (
            f"{rollouts[draw]:,.0f} rollouts ({', '.join(map(str, needed))}), {taught[draw]:.1%} of the groups taught"
        )
        print(f"\n{draw}: {told}", end="")
    # The share differs by a third from seed to seed, the rollouts by more: a run may solve its six examples and never get there.
    assert taught["difficulty"] > 1.2 * taught["uniform"]
    assert rollouts["difficulty"] < 0.95 * rollouts["uniform"]
