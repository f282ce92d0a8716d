"""The embedded model's adapter, trained here and sampled by a server in a process of its own: what is learned from the version
before, and what that takes.

    python -m pytest tests/backends/test_overlap_learns.py -m slow -s

prints the mean rewards of three seeds, an epoch a column, and the seconds an epoch, with and without overlap in turns.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("aiohttp")

from planted_faults import questions
from vllm_process import served

import finetune_nb as ft
from finetune_nb.backends.local.models import EMBEDDED
from finetune_nb.examples.calculator.agent import correct, solve

EPOCHS, SEEDS = 8, 3


@pytest.mark.slow
def test_what_is_learned_from_the_version_before(tmp_path):
    rows = [row for row in questions() if row["question"].count("+") + row["question"].count("-") == 1]
    rewards, seconds = {0: [], 1: []}, {0: [], 1: []}
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
                seconds[staleness].append((time.perf_counter() - started) / EPOCHS)
                rewards[staleness].append(run.epochs().mean_reward.tolist())
                assert run.epochs().version_lag.tolist()[1:] == [staleness] * (EPOCHS - 1)
                run.close()
    for staleness in (0, 1):
        for seed, (curve, took) in enumerate(zip(rewards[staleness], seconds[staleness], strict=True)):
            print(
                f"max_staleness {staleness}, seed {seed}: {' '.join(f'{r:.2f}' for r in curve)}  {took:.1f} s an epoch"
            )
        curves = np.array(rewards[staleness])
        assert curves[:, -2:].mean() > curves[:, :2].mean() + 0.1
