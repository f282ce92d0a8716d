"""How fast the curriculum selects from 100,000 groups of 8, beside loops over the trajectories.

Each test fails only on the ratio measured in its own run; the CPU seconds are printed, for the record.
"""

import math
import random

import numpy as np
import pytest
from measuring import by_turns

from finetune_nb.config import CurriculumSettings
from finetune_nb.training.curriculum import group_statistics, keep, select
from finetune_nb.training.metrics import epoch_metrics
from finetune_nb.training.preview import PreviewInput, preview
from finetune_nb.types import CurriculumState, EpisodeItem, EpisodeItemRole, Trajectory, TrajectoryCollection
from finetune_nb.views.preview_card import preview_html

pytestmark = [pytest.mark.benchmark, pytest.mark.proof]

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


def report(capsys, benchmark, what, found):
    """Returns how many times as long as ours each other side takes."""
    ratios = {side: found.ratio(side, "ours") for side in found.seconds if side != "ours"}
    benchmark.extra_info.update(cpu_seconds=found["ours"], **{f"{side}_ratio": ratio for side, ratio in ratios.items()})
    beside = ", ".join(f"{side} loop {found[side]:.4f} s ({ratio:.1f}x)" for side, ratio in ratios.items())
    with capsys.disabled():
        print(f"\n{what}: {found['ours']:.4f} s CPU; {beside}")
    return ratios


def same_groups(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(a is b for a, b in zip(ours, theirs, strict=True))


def test_select_from_statistics_is_many_times_faster_than_the_barest_loop(collection, benchmark, capsys):
    groups = collection.trajectories
    statistics = group_statistics(groups)

    def ours():
        return select(statistics, SETTINGS, STATE, 0, 0)

    found = by_turns(5, barest=lambda: barest_loop(groups), ours=ours)
    ratios = report(capsys, benchmark, "select", found)
    benchmark.pedantic(ours, rounds=5)
    assert same_groups(keep(groups, found.made["ours"]), found.made["barest"])
    assert ratios["barest"] >= 8


def test_selection_from_a_collection_is_faster_than_the_plain_loop(collection, benchmark, capsys):
    groups = collection.trajectories

    def whole_road():
        selection = select(group_statistics(groups), SETTINGS, STATE, 0, 0)
        return keep(groups, selection), selection

    found = by_turns(5, barest=lambda: barest_loop(groups), plain=lambda: plain_loop(groups), ours=whole_road)
    ratios = report(capsys, benchmark, "group_statistics + select + keep", found)
    benchmark.pedantic(whole_road, rounds=3)
    (kept, selection), (expected, left_out) = found.made["ours"], found.made["plain"]
    assert same_groups(kept, expected)
    assert {reason: sorted(ids) for reason, ids in left_out.items()} == {
        reason: sorted(ids) for reason, ids in selection.left_out().items()
    }
    assert ratios["plain"] >= 1.5


def test_metrics_of_an_ordinary_epoch_grow_no_faster_than_its_groups(benchmark, capsys):
    """100 groups of 8 with two messages each (target: below 2 ms), and ten times as many."""

    def metrics_of(size):
        epoch = make_collection(size, GENERATIONS)
        statistics = group_statistics(epoch.trajectories)
        selection = select(statistics, SETTINGS, STATE, 0, 0)
        return lambda: epoch_metrics(epoch, statistics, selection)

    few, many = metrics_of(100), metrics_of(1000)
    found = by_turns(21, few=few, many=many)
    benchmark.pedantic(few, rounds=20)
    benchmark.extra_info["cpu_seconds"] = found["few"]
    with capsys.disabled():
        print(
            f"\nepoch_metrics of 100 groups: {found['few'] * 1e3:.2f} ms CPU; of 1000: {found['many'] * 1e3:.2f} ms, "
            f"{found.ratio('many', 'few'):.1f} times as long"
        )
    assert found.ratio("many", "few") < 15


def test_a_preview_on_cached_statistics_costs_little_more_than_one_selection(collection):
    statistics = group_statistics(collection.trajectories)
    basis = PreviewInput(3, statistics, STATE, np.full(GROUPS, 64 * GENERATIONS), 1e-6)
    shares = iter(np.linspace(0.2, 0.9, 100).tolist())

    def drag():
        found = preview(basis, SETTINGS, SETTINGS, SETTINGS.updated({"percentile": next(shares)}), 0)
        return found.groups, found.moves, found.trajectories, found.tokens, found.counts

    def card():
        return preview_html(preview(basis, SETTINGS, SETTINGS, SETTINGS, 0))

    found = by_turns(9, choosing=lambda: select(statistics, SETTINGS, STATE, 4, 0), moving=drag, drawing=card)
    print(
        f"\npreview on {GROUPS:,} groups: {found['moving'] * 1e3:.1f} ms CPU, its card {found['drawing'] * 1e3:.1f} ms; "
        f"one selection {found['choosing'] * 1e3:.1f} ms"
    )
    assert found.ratio("moving", "choosing") < 5
