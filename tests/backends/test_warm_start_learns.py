"""A warm start and then GRPO on the problems of notebook 08, beside TRL's SFTTrainer and then its GRPOTrainer.

    python -m pytest tests/backends/test_warm_start_learns.py -m slow -s

prints the mean reward on problems that were held out, before, after the warm-up and after GRPO, of each seed.
"""

from __future__ import annotations

import asyncio
import random
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_warm_up_loss import MARKED  # noqa: E402
from trl_oracle import trl_module  # noqa: E402

import finetune_nb as ft  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.types import EpisodeKey, SamplingParams  # noqa: E402

SEEDS, EPOCHS, EXAMPLES, GENERATIONS, STEPS, TOKENS = 3, 6, 24, 8, 8, 12
PASSES, BATCH, RATE = 2, 8, 1e-3
HELD_OUT, REPLIES = 60, 4
STAGES = ("before", "after the warm-up", "after GRPO")
FORM = re.compile(r"=\s*(\S+)\s*")


def score(text, solution):
    """The rewards of the notebook with their weights."""
    form, numbers = FORM.fullmatch(text), re.findall(r"-?\d+", text)
    near = max(0.0, 1 - abs(int(numbers[-1][:9]) - int(solution)) / 50) if numbers else 0.0
    right = form is not None and form[1] == solution
    return (form is not None) + 0.5 * (0.5 if text.count("=") == 1 else -0.5) + 2.0 * right + 1.5 * near


def problems(seed):
    """Rows to learn from, and those held out."""
    pairs = [(a, b) for a in range(2, 21) for b in range(2, 21)]
    random.Random(seed).shuffle(pairs)
    rows = [{"prompt": f"{a}+{b}", "solution": str(a + b)} for a, b in pairs]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def demonstrations(rows):
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": "=" + row["solution"]},
            ]
        }
        for row in rows[:120]
    ]


def measured(policy, rows, seed):
    """The mean reward of what a policy replies to problems."""

    async def replies():
        params = SamplingParams(max_tokens=TOKENS)
        prompts = [policy.render([{"role": "user", "content": row["prompt"]}]) for row in rows for _ in range(REPLIES)]
        with policy.episode(EpisodeKey("try", 0, 0, 0)):
            return await asyncio.gather(*(policy.sample(p, params, seed + n) for n, p in enumerate(prompts)))

    texts = [policy.decode(sample.ids) for sample in ft.run_sync(replies())]
    return float(np.mean([score(t, rows[n // REPLIES]["solution"]) for n, t in enumerate(texts)]))


def ours(seed, folder):
    train, held_out = problems(seed)

    async def solve(prompt, llm):
        return (await llm.chat([{"role": "user", "content": prompt}])).content

    run = ft.Run(
        solve, lambda output, solution: score(output, solution), train, question="prompt", answer="solution",
        sampling={"max_tokens": TOKENS}, generations=GENERATIONS, examples_per_epoch=EXAMPLES, seed=seed,
        training={"learning_rate": RATE, "optimizer_steps": STEPS}, num_epochs=EPOCHS + 1, output_dir=folder,
    )  # fmt: skip
    ft.run_sync(run.rollout(0))  # loads the model
    policy = run._driver.adapter.policy
    found = [measured(policy, held_out, seed)]
    ft.run_sync(run.warm_up(demonstrations(train), epochs=PASSES, batch_size=BATCH, learning_rate=RATE, progress=False))
    found.append(measured(policy, held_out, seed))
    run.start()
    run.wait(progress=False)
    assert len(run) == EPOCHS + 1
    found.append(measured(policy, held_out, seed))
    run.close()
    return found


def theirs(seed, folder):
    trl, datasets = trl_module(), pytest.importorskip("datasets")
    train, held_out = problems(seed)
    policy = LocalPolicy.load("embedded", device="cpu", threads=1)
    model, tokenizer = policy.model, policy.tokenizer
    found = [measured(policy, held_out, seed)]
    shared = dict(
        output_dir=str(folder), learning_rate=RATE, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=0.0, max_grad_norm=1.0, seed=seed, use_cpu=True, bf16=False, activation_checkpointing=False, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    plain, tokenizer.chat_template = tokenizer.chat_template, MARKED
    trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            assistant_only_loss=True, num_train_epochs=PASSES, per_device_train_batch_size=BATCH, **shared
        ),
        train_dataset=datasets.Dataset.from_list(demonstrations(train)),
        processing_class=tokenizer,
    ).train()
    tokenizer.chat_template = plain
    model.eval()
    found.append(measured(policy, held_out, seed))
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
            ),
            "solution": row["solution"],
        }
        for row in train[: EPOCHS * EXAMPLES]
    ]
    trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, solution, **_: list(map(score, completions, solution)),
        args=trl.GRPOConfig(
            per_device_train_batch_size=EXAMPLES * GENERATIONS // STEPS, steps_per_generation=STEPS, beta=0.0, epsilon=0.2,
            num_generations=GENERATIONS, max_completion_length=TOKENS, max_steps=STEPS * EPOCHS, loss_type="dapo",
            temperature=1.0, shuffle_dataset=False, **shared,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train()  # fmt: skip
    model.eval()
    return [*found, measured(policy, held_out, seed)]


@pytest.mark.slow
def test_a_warm_start_helps_as_much_as_trls(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        own = np.array([ours(seed, tmp_path / f"ours{seed}") for seed in range(SEEDS)])
        other = np.array([theirs(seed, tmp_path / f"theirs{seed}") for seed in range(SEEDS)])
    finally:
        torch.set_num_threads(threads)
    for name, rewards in (("ours", own), ("TRL", other)):
        for stage, values in zip(STAGES, rewards.T, strict=True):
            print(f"\n{name}, {stage}: {values.mean():.2f} ({', '.join(f'{value:.2f}' for value in values)})", end="")
    assert (own[:, 1] > own[:, 0] + 0.5).all() and own[:, 2].mean() > own[:, 1].mean()
    assert (own[:, 1:].mean(0) > other[:, 1:].mean(0) - 0.3).all()
