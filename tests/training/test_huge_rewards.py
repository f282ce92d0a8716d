"""Rewards near the limits of floats: means, deviations, advantages and losses stay finite, or an error says why not."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from factories import item, make_epoch, make_trajectory
from hypothesis import given
from hypothesis import strategies as st

import finetune_nb as ft
from finetune_nb.analysis.run_comparison import compare_runs
from finetune_nb.config import CurriculumSettings
from finetune_nb.errors import BackendError, JobFailed
from finetune_nb.frames import groups
from finetune_nb.rewards.numbers import mean
from finetune_nb.testing import sums
from finetune_nb.training.batch import turn_advantages
from finetune_nb.training.curriculum import group_statistics, select
from finetune_nb.training.metrics import advantages, deviations
from finetune_nb.types import CurriculumState, GroupReason

REWARDS = st.lists(st.lists(st.floats(allow_infinity=False), max_size=5), min_size=1, max_size=5)
"""Groups of finite and missing rewards."""


def statistics_of(rewards: list[list[float]]):
    return group_statistics([[make_trajectory(reward) for reward in group] for group in rewards])


@given(REWARDS)
def test_means_spreads_deviations_and_advantages_of_finite_rewards_are_finite(rewards):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = statistics_of(rewards)
        scaled, plain, deviation = advantages(statistics), advantages(statistics, scale=False), deviations(statistics)
    present = ~np.isnan(statistics.rewards)
    known = statistics.counts > 0
    assert np.isfinite(statistics.means[known]).all() and not np.isnan(statistics.spreads[known]).any()
    assert np.isfinite(scaled[present]).all() and np.isfinite(plain[present]).all()
    assert np.isfinite(deviation[(statistics.counts > 1) & np.isfinite(statistics.spreads)]).all()
    assert np.abs(scaled[present]).max(initial=0) <= math.sqrt(5)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6), st.sampled_from([2.0**300, 2.0**700, 2.0**1000]))
def test_the_advantages_of_huge_rewards_are_those_of_the_same_rewards_in_another_unit(rewards, unit):
    spread = max(rewards) - min(rewards)
    if spread < 1:
        return
    huge = advantages(statistics_of([[reward * unit for reward in rewards]]))
    values = np.array(rewards)
    expected = (values - values.mean()) / values.std(ddof=1)
    assert huge == pytest.approx(expected, abs=1e-6)


def test_a_group_with_huge_rewards_changes_no_digit_of_another_group():
    ordinary = [0.1, 0.7, 0.4]
    alone = advantages(statistics_of([ordinary]))
    beside = advantages(statistics_of([[1e300, -1e300, 0.25], ordinary]))
    assert beside[3:].tolist() == alone.tolist()


def test_a_mean_of_the_largest_floats_is_their_mean():
    largest = float(np.finfo(float).max)
    assert mean([largest, largest, largest]) == pytest.approx(largest)
    assert mean([largest, -largest]) == 0
    assert math.isnan(mean([])) and math.isinf(mean([math.inf, 1.0]))


def test_shaped_rewards_near_the_limit_give_finite_advantages():
    group = []
    for reward, shaped in ((1e308, [1e308, 1e308]), (-1e308, [-1e308, 0.5]), (0.25, [0.0, 0.0])):
        trajectory = make_trajectory(reward)
        trajectory.episode = [item("user", "?"), item("assistant", "a"), item("tool", "t"), item("assistant", "b")]
        trajectory.shaped_rewards = shaped
        group.append(trajectory)
    for scale in (True, False):
        for row in turn_advantages(group, scale):
            assert all(map(math.isfinite, row))


def test_epochs_frames_and_comparisons_of_huge_rewards_hold_no_infinity(recwarn):
    epoch = make_epoch([[8e307, -8e307], [1e308, 1.7e308], [0.0, 1.0]])
    table = groups([epoch])
    assert np.isfinite(table[["mean", "std", "spread"]].to_numpy(float)).all()
    assert math.isfinite(epoch.metrics.mean_reward) and all(map(math.isfinite, epoch.metrics.group_quantiles))
    comparison = compare_runs({"a": [epoch], "b": [make_epoch([[-1e308], [-1.7e308], [0.0]])]})
    (difference,) = comparison.differences
    assert math.isfinite(difference.mean) and math.isfinite(difference.low) and math.isfinite(difference.high)
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_a_group_whose_rewards_differ_by_more_than_a_float_holds_is_left_out_with_a_reason():
    statistics = statistics_of([[1.7e308, -1.7e308], [0.0, 1.0]])
    selection = select(statistics, CurriculumSettings(enabled=True, percentile=1.0), CurriculumState(1.0), 0, 0)
    assert selection.kept.tolist() == [1] and selection.reason_of(0) is GroupReason.INFINITE_REWARD
    assert advantages(statistics)[:2].tolist() == [0.0, 0.0]


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


@pytest.mark.parametrize("scale_rewards", [True, False])
def test_the_loss_of_huge_rewards_is_finite_or_the_job_says_why_not(tmp_path, scale_rewards):
    rewards = iter([1e300, 0.25, -1e300, 0.5] * 3)
    run = ft.Run(
        solve,
        lambda item: next(rewards),
        sums(3),
        training={"scale_rewards": scale_rewards},
        generations=4,
        output_dir=tmp_path,
        sampling={"max_tokens": 4},
    )
    try:
        if scale_rewards:
            epoch = ft.run_sync(run.next_epoch())
            assert math.isfinite(epoch.train_metrics["loss"])
        else:
            with pytest.raises((BackendError, JobFailed), match="scale_rewards"):
                ft.run_sync(run.next_epoch())
    finally:
        run.close()
