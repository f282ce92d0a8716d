"""Every loss by its name teaches the embedded model to use its calculator.

SEEDS=3 python -m pytest tests/backends/test_losses_learn.py -m slow -s
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import loss_curves
from planted_faults import SEEDS

from finetune_nb.backends.local.config import LOSSES


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_learns_the_demo(loss, tmp_path):
    rewards = loss_curves.curves(loss, tmp_path, SEEDS)
    print("\n" + loss_curves.line(loss, rewards))
    assert rewards.mean(axis=0)[-1] >= rewards.mean(axis=0)[0] + 0.15
