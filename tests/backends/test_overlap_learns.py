"""The embedded model's adapter, trained here and sampled by a server in a process of its own: what is learned from the version
before, and what that takes.

    SEEDS=3 python -m pytest tests/backends/test_overlap_learns.py -m slow -s

prints the mean rewards of three seeds in place of one, an epoch a column, and the seconds an epoch, with and without overlap.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("aiohttp")

from planted_faults import SEEDS, questions
from vllm_process import served

import finetune_nb as ft
from finetune_nb.backends.local.models import EMBEDDED
from finetune_nb.examples.calculator.agent import correct, solve

EPOCHS = 8


@pytest.mark.slow
def test_what_is_learned_from_the_version_before(tmp_path):
    rows = [row for row in questions() if row["question"].count("+") + row["question"].count("-") == 1]
    rewards: dict[int, list[list[float]]] = {0: [], 1: []}
    with served(EMBEDDED) as url:
        for seed in range(SEEDS):
            for staleness in (0, 1):
                run = ft.Run(
                    solve,
                    correct,
                    rows,
                    training={"lora": {"rank": 16}, "learning_rate": 2e-3, "max_staleness": staleness},
                    sampler=url,
                    sampling={"max_tokens": 10},
                    generations=8,
                    examples_per_epoch=6,
                    seed=seed,
                    output_dir=tmp_path,
                    num_epochs=EPOCHS,
                )
                ft.run_sync(run.rollout())  # the model is loaded, and the server compared with it
                started = time.perf_counter()
                run.start()
                run.wait(progress=False)
                took = (time.perf_counter() - started) / EPOCHS
                curve = run.epochs().mean_reward.tolist()
                rewards[staleness].append(curve)
                shown = " ".join(f"{reward:.2f}" for reward in curve)
                print(f"max_staleness {staleness}, seed {seed}: {shown}  {took:.1f} s an epoch", flush=True)
                assert run.epochs().version_lag[1] == run.epochs().version_lag.max() == staleness
                run.close()
    for curves in map(np.array, rewards.values()):
        assert curves[:, -2:].mean() > curves[:, :2].mean() + 0.1
