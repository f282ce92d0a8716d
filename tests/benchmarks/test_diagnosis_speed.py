"""What finding out why a run does not learn costs: of a long run from the disk, and after every epoch."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from measuring import by_turns

import finetune_nb as ft
from finetune_nb import frames
from finetune_nb.analysis.diagnosis import diagnosis, epoch_warnings
from finetune_nb.training.metrics import length_correlation
from finetune_nb.types import finish_reason, sampled_tokens

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.benchmark
EPOCHS = 20


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A run of the demo's size, and the CPU seconds of each epoch: 320 rollouts, of which the first 4 epochs are real."""
    from planted_faults import demo

    run = demo(tmp_path_factory.mktemp("demo"), examples_per_epoch=40, num_epochs=4)
    seconds = []
    for _ in range(4):
        started = time.process_time()
        ft.run_sync(run.next_epoch())
        seconds.append(time.process_time() - started)
    run.close()
    return run, seconds


def test_20_epochs_of_320_rollouts_are_diagnosed_in_less_time_than_their_messages_become_a_frame(demo):
    run, _ = demo
    epochs = [*ft.Run.open(Path(run.folder)).records] * (EPOCHS // 4)
    found = by_turns(3, diagnosis=lambda: diagnosis("demo", epochs), frame=lambda: frames.messages(epochs))
    rollouts = sum(epoch.metrics.trajectories for epoch in epochs)
    print(f"\n{rollouts:,} rollouts of {EPOCHS} epochs: {found['diagnosis']:.3f} s (target 1 s); "
          f"their messages as a frame: {found['frame']:.3f} s")  # fmt: skip
    assert rollouts == 6400
    assert found.ratio("frame", "diagnosis") > 1


def test_what_is_looked_at_after_every_epoch_takes_less_than_a_hundredth_of_it(demo):
    run, seconds = demo
    epoch = run[-1]
    collection = epoch.collection

    def looked_at():
        everyone = [trajectory for group in collection.trajectories for trajectory in group]
        tokens = np.array([sampled_tokens(each) for each in everyone])
        messages = np.array([len(each.episode) for each in everyone])
        cut = np.array([finish_reason(each) == "length" for each in everyone])
        length_correlation(epoch.statistics, tokens, messages, cut)
        return epoch_warnings(epoch.metrics)

    found = by_turns(9, looked_at=looked_at)
    share = found["looked_at"] / min(seconds)
    print(f"\n{1000 * found['looked_at']:.1f} ms after an epoch of {min(seconds):.2f} s: {share:.2%}")
    assert share < 0.01
