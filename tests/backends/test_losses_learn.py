"""Every loss by its name teaches the embedded model to use its calculator.

    python -m pytest tests/backends/test_losses_learn.py -m slow -s

prints the mean reward of each epoch, over three seeds, as the reference has it.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from planted_faults import demo

import finetune_nb as ft
from finetune_nb.backends.local.config import LOSSES

EPOCHS, SEEDS = 8, 3


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_learns_the_demo(loss, tmp_path):
    curves = []
    for seed in range(SEEDS):
        run = demo(tmp_path, seed=seed, training={"loss": loss}, num_epochs=EPOCHS)
        for _ in range(EPOCHS):
            ft.run_sync(run.next_epoch())
        curves.append(run.epochs().mean_reward.tolist())
        run.close()
    mean = np.mean(curves, axis=0)
    print(f"\n| {loss} | {' | '.join(f'{value:.2f}' for value in mean)} |")
    assert mean[-1] >= mean[0] + 0.15
