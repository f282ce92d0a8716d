"""What it costs to score recorded rollouts anew. Absolute figures are printed, in CPU seconds on one core; a test fails on ratios
alone."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
from measuring import by_turns

import finetune_nb as ft
from finetune_nb.rewards.recorded import weighted_scores
from finetune_nb.store.store import RunStore
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, make_trajectory
from finetune_nb.training.curriculum import statistics_of
from finetune_nb.types import TrajectoryCollection

EPOCHS, GROUPS, GENERATIONS = 10, 1_250, 8


class Recorded(ScriptedBuilder):
    """Groups of rollouts whose outputs and scores are recorded."""

    def __init__(self):
        super().__init__(lambda epoch: {})

    async def finalize(self, run_id, meta=None):
        groups = []
        for group in range(GROUPS):
            known = {"output": f"answer {group}", "scores": {"a": group % 5 / 5, "b": group % 3}}
            rewards = [float((group + k) % 2) for k in range(GENERATIONS)]
            groups.append([make_trajectory(r, str(group), k, run_id, **known) for k, r in enumerate(rewards)])
        return TrajectoryCollection(trajectories=groups, run_id=run_id)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run of 100,000 rollouts, opened from its folder."""
    run = ft.Run(builder=Recorded(), adapter=FakeAdapter(), output_dir=tmp_path_factory.mktemp("runs"))
    for _ in range(EPOCHS):
        ft.run_sync(run.next_epoch())
    run.close()
    return ft.Run.open(run.folder)


@pytest.mark.benchmark(group="rewards")
def test_100000_stored_rollouts_are_scored_anew_in_little_more_than_a_plain_loop(benchmark, stored):
    reward = len

    def plain():
        for epoch in RunStore.open(stored.folder).epochs:
            texts = epoch.columns(["output"]).column("output").to_pylist()
            for text in texts:
                reward(json.loads(text))

    found = by_turns(3, own=lambda: stored.rescore(lambda output: len(output)), plain=plain)
    rescored = benchmark.pedantic(lambda: stored.rescore(lambda output: len(output)), rounds=1)
    rollouts = sum(len(epoch.after.rewards) for epoch in rescored.epochs)
    benchmark.extra_info |= {"rescore_s": found["own"], "plain_s": found["plain"], "target_s": 3.0}
    print(f"\n{rollouts:,} rollouts scored anew in {found['own']:.2f} s CPU; a bare loop {found['plain']:.2f}")
    assert rollouts == EPOCHS * GROUPS * GENERATIONS
    assert found.ratio("own", "plain") < 40


@pytest.mark.benchmark(group="rewards")
def test_memory_does_not_grow_with_the_epochs_that_are_scored_anew(benchmark, stored):
    def peak(epochs):
        tracemalloc.start()
        stored.rescore(lambda output: len(output), epochs)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / 1e6

    peak(slice(0, 1))
    one, three = peak(slice(0, 1)), benchmark.pedantic(lambda: peak(slice(0, 3)), rounds=1)
    benchmark.extra_info |= {"one_epoch_mb": one, "three_epochs_mb": three}
    print(f"\npeak for one epoch of {GROUPS * GENERATIONS:,} rollouts {one:.1f} MB, for 3 epochs {three:.1f} MB")
    assert three < 1.5 * one


@pytest.mark.benchmark(group="rewards")
def test_the_preview_of_a_moved_weight_over_100000_groups(benchmark):
    groups = 100_000
    rng = np.random.default_rng(0)
    scores = {name: rng.random(groups * GENERATIONS) for name in ("a", "b", "c")}
    ids, offsets = tuple(range(groups)), np.arange(groups + 1) * GENERATIONS

    def ours():
        return statistics_of(ids, weighted_scores({"a": 0.2, "b": 1.0, "c": 0.5}, scores), offsets)

    def plain():
        total = 0.2 * scores["a"] + 1.0 * scores["b"] + 0.5 * scores["c"]
        rewards = total.reshape(groups, GENERATIONS)
        return rewards.mean(1), rewards.max(1) - rewards.min(1)

    found = by_turns(5, own=ours, plain=plain)
    benchmark.pedantic(ours, rounds=1)
    benchmark.extra_info |= {"own_s": found["own"], "plain_s": found["plain"], "target_s": 0.03}
    print(
        f"\na moved weight over {groups:,} groups: {found['own'] * 1e3:.1f} ms CPU; bare numpy {found['plain'] * 1e3:.1f}"
    )
    assert found.ratio("own", "plain") < 8
    assert not math.isnan(found["own"])
