"""How fast the curriculum selects from 100,000 groups of 8, beside loops over the trajectories.

Each test fails only on the ratio measured in its own run; the CPU seconds are printed, for the record.
"""

import gc
import math
import random
import time

import numpy as np
import pytest

from finetune_nb.config import CurriculumSettings
from finetune_nb.curriculum import group_statistics, keep, select
from finetune_nb.metrics import epoch_metrics
from finetune_nb.preview import Basis, preview
from finetune_nb.preview_card import preview_html
from finetune_nb.types import CurriculumState, EpisodeItem, EpisodeItemRole, Trajectory, TrajectoryCollection

pytestmark = pytest.mark.benchmark

GROUPS, GENERATIONS = 100_000, 8
SETTINGS = CurriculumSettings(enabled=True)
STATE = CurriculumState(percentile=0.3)


def make_collection(groups, generations):
    """Rewards are eighths, so that means are exact in both ways of selecting; a third of the groups has no spread."""
    rng = random.Random(0)
    fields = set(Trajectory.model_fields)
    episode = [
        EpisodeItem(role=EpisodeItemRole.USER, content="2+2"),
        EpisodeItem(role=EpisodeItemRole.ASSISTANT, content="4", logprobs=[-0.5] * 8),
    ]
    made = []
    for i in range(groups):
        metadata, level, noise = {"id": i, "scores": {"right": 1.0}}, rng.randint(0, 4), rng.choice([0, 1, 4])
        rewards = [(level + rng.randint(0, noise)) / 8 for _ in range(generations)]
        made.append([Trajectory.model_construct(fields, episode=episode, reward=r, metadata=metadata) for r in rewards])
    return TrajectoryCollection.model_construct(trajectories=made, run_id="r")


@pytest.fixture(scope="module")
def collection():
    return make_collection(GROUPS, GENERATIONS)


def barest_loop(groups):
    """The shortest loop to the same groups. It trusts that no reward is missing, and notes nothing."""
    kept = []
    for group in groups:
        rewards = [trajectory.reward for trajectory in group]
        if max(rewards) - min(rewards) >= SETTINGS.min_reward_diff:
            kept.append((sum(rewards) / len(rewards), group))
    kept.sort(key=lambda pair: pair[0], reverse=True)
    return [group for _, group in kept[: math.ceil(len(kept) * STATE.percentile)]]


def plain_loop(groups):
    """The obvious way to the same result: missing rewards do not count, each left-out example has its reason."""
    kept, left_out = [], {}
    for group in groups:
        rewards = [trajectory.reward for trajectory in group if not math.isnan(trajectory.reward)]
        if not rewards:
            left_out.setdefault("no_reward", []).append(group[0].metadata["id"] if group else None)
        elif max(rewards) - min(rewards) < SETTINGS.min_reward_diff:
            left_out.setdefault("no_reward_spread", []).append(group[0].metadata["id"])
        else:
            kept.append((sum(rewards) / len(rewards), group))
    kept.sort(key=lambda pair: pair[0], reverse=True)
    share = max(1, math.ceil(len(kept) * STATE.percentile))
    left_out["beyond_percentile"] = [group[0].metadata["id"] for _, group in kept[share:]]
    return [group for _, group in kept[:share]], left_out


def cpu_seconds(work, rounds=5):
    """Least of a few rounds, and the last result. Garbage collection rests: it would fall on either side by chance."""
    seconds = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            begin = time.process_time()
            result = work()
            seconds.append(time.process_time() - begin)
    finally:
        gc.enable()
    return min(seconds), result


def report(capsys, benchmark, what, ours, **others):
    ratios = {f"{name}_ratio": seconds / ours for name, seconds in others.items()}
    benchmark.extra_info.update(cpu_seconds=ours, **others, **ratios)
    beside = ", ".join(f"{name} loop {seconds:.4f} s ({seconds / ours:.1f}x)" for name, seconds in others.items())
    with capsys.disabled():
        print(f"\n{what}: {ours:.4f} s CPU; {beside}")


def same_groups(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(a is b for a, b in zip(ours, theirs, strict=True))


def test_select_from_statistics_is_many_times_faster_than_the_barest_loop(collection, benchmark, capsys):
    groups = collection.trajectories
    statistics = group_statistics(groups)
    barest, expected = cpu_seconds(lambda: barest_loop(groups))
    ours, selection = cpu_seconds(lambda: select(statistics, SETTINGS, STATE, 0, 0))
    report(capsys, benchmark, "select", ours, barest=barest)
    benchmark.pedantic(select, (statistics, SETTINGS, STATE, 0, 0), rounds=5)
    assert same_groups(keep(groups, selection), expected)
    assert barest / ours >= 8


def test_selection_from_a_collection_is_faster_than_the_plain_loop(collection, benchmark, capsys):
    groups = collection.trajectories

    def whole_road():
        selection = select(group_statistics(groups), SETTINGS, STATE, 0, 0)
        return keep(groups, selection), selection

    barest, _ = cpu_seconds(lambda: barest_loop(groups))
    plain, (expected, left_out) = cpu_seconds(lambda: plain_loop(groups))
    ours, (kept, selection) = cpu_seconds(whole_road)
    report(capsys, benchmark, "group_statistics + select + keep", ours, barest=barest, plain=plain)
    benchmark.pedantic(whole_road, rounds=3)
    assert same_groups(kept, expected)
    assert {reason: sorted(ids) for reason, ids in left_out.items()} == {
        reason: sorted(ids) for reason, ids in selection.left_out().items()
    }
    assert plain / ours >= 1.5


def test_metrics_of_an_ordinary_epoch_grow_no_faster_than_its_groups(benchmark, capsys):
    """100 groups of 8 with two messages each (target: below 2 ms), and ten times as many."""
    seconds = {}
    for size in (100, 1000):
        epoch = make_collection(size, GENERATIONS)
        statistics = group_statistics(epoch.trajectories)
        selection = select(statistics, SETTINGS, STATE, 0, 0)
        seconds[size], _ = cpu_seconds(
            lambda e=epoch, st=statistics, sel=selection: epoch_metrics(e, st, sel), rounds=20
        )
        if size == 100:
            benchmark.pedantic(epoch_metrics, (epoch, statistics, selection), rounds=20)
    benchmark.extra_info["cpu_seconds"] = seconds[100]
    with capsys.disabled():
        print(f"\nepoch_metrics of 100 groups: {seconds[100] * 1e3:.2f} ms CPU; of 1000: {seconds[1000] * 1e3:.2f} ms")
    assert seconds[1000] < 15 * seconds[100]


def test_a_preview_on_cached_statistics_costs_little_more_than_one_selection(collection):
    statistics = group_statistics(collection.trajectories)
    basis = Basis(3, statistics, STATE, np.full(GROUPS, 64 * GENERATIONS), 1e-6)
    shares = iter(np.linspace(0.2, 0.9, 100).tolist())

    def drag():
        found = preview(basis, SETTINGS, SETTINGS, SETTINGS.updated({"percentile": next(shares)}), 0)
        return found.groups, found.moves, found.trajectories, found.tokens, found.counts

    drag()  # the unchanged selection stays
    choosing, _ = cpu_seconds(lambda: select(statistics, SETTINGS, STATE, 4, 0))
    moving, _ = cpu_seconds(drag)
    drawing, _ = cpu_seconds(lambda: preview_html(preview(basis, SETTINGS, SETTINGS, SETTINGS, 0)))
    print(
        f"\npreview on {GROUPS:,} groups: {moving * 1e3:.1f} ms CPU, its card {drawing * 1e3:.1f} ms; "
        f"one selection {choosing * 1e3:.1f} ms"
    )
    assert moving < 5 * choosing
