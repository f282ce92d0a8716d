"""The numbers of an epoch, and GRPO's advantages, against the standard library's statistics."""

import math
import statistics as stdlib
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from measuring import by_turns

from finetune_nb.config import CurriculumSettings
from finetune_nb.training.curriculum import group_statistics, select
from finetune_nb.training.metrics import advantages, epoch_metrics, has_signal
from finetune_nb.types import (
    CurriculumState,
    DPOItem,
    EpisodeItem,
    EpisodeItemRole,
    RolloutFailure,
    Trajectory,
    TrajectoryCollection,
)

NAN, INF = math.nan, math.inf
QUESTION = EpisodeItem(role=EpisodeItemRole.USER, content="2+2")


def rollout(reward, example_id="q", scores=None, logprobs=(-0.5, -0.25)):
    answer = EpisodeItem(role=EpisodeItemRole.ASSISTANT, content="4", logprobs=list(logprobs))
    metadata = {"id": example_id} | ({} if scores is None else {"scores": scores})
    return Trajectory(episode=[QUESTION, answer], reward=reward, metadata=metadata)


def measured(groups, percentile=1.0, failures=(), **settings):
    collection = TrajectoryCollection(trajectories=groups, run_id="r", failures=list(failures))
    stats = group_statistics(groups)
    settings = CurriculumSettings(enabled=True, **settings)
    return epoch_metrics(collection, stats, select(stats, settings, CurriculumState(percentile), 0, 0))


def of_rewards(*groups):
    return group_statistics([[rollout(reward) for reward in group] for group in groups])


# ── metrics of an epoch ──────────────────────────────────────────────────────────────────────────────────────────────


def test_rewards_are_summed_up_over_finite_ones_only():
    found = measured([[rollout(1.0), rollout(0.0), rollout(NAN)], [rollout(INF), rollout(0.5)], [rollout(-2.0)], []])
    assert found.mean_reward == pytest.approx(-0.125)
    assert (found.min_reward, found.max_reward) == (-2.0, 1.0)
    assert found.group_quantiles == pytest.approx(tuple(np.quantile([0.5, -2], [0.1, 0.5, 0.9])))
    assert (found.trajectories, found.groups, found.groups_with_spread) == (6, 4, 1)


def test_kept_numbers_are_of_the_kept_groups():
    easy, hard = [rollout(1.0), rollout(0.5), rollout(NAN)], [rollout(0.25), rollout(0.0)]
    found = measured([hard, easy, [rollout(0.7)] * 2], percentile=0.5)
    assert (found.kept_groups, found.kept_trajectories, found.kept_mean_reward) == (1, 3, 0.75)
    assert (found.groups, found.groups_with_spread, found.trajectories) == (3, 2, 7)


def test_an_epoch_without_any_reward_has_nan_and_not_zero():
    for groups in ([], [[rollout(NAN)], []]):
        found = measured(groups)
        numbers = (
            found.mean_reward,
            found.min_reward,
            found.max_reward,
            found.kept_mean_reward,
            *found.group_quantiles,
        )
        assert all(map(math.isnan, numbers))
        assert (found.kept_groups, found.groups_with_spread) == (0, 0)


def test_failed_rollouts_are_counted_and_are_no_rewards():
    found = measured([[rollout(1.0), rollout(0.5)]], failures=[RolloutFailure("q", 2, "TimeoutError: 5 s")])
    assert (found.failures, found.trajectories, found.mean_reward) == (1, 2, 0.75)


def test_scores_are_means_over_finite_values_and_nan_where_there_is_none():
    scores = [
        {"right": 1.0, "short": None},
        {"right": 0, "short": NAN},
        {"right": "n/a", "short": INF},
        {"right": INF},
        None,
    ]
    found = measured([[rollout(1.0, scores=s) for s in scores]]).scores
    assert found["right"] == 0.5 and math.isnan(found["short"]) and set(found) == {"right", "short"}


def test_sampled_tokens_are_those_that_the_policy_sampled():
    masked = rollout(0.5, logprobs=())
    foreign = EpisodeItem(role=EpisodeItemRole.ASSISTANT, content="4", logprobs={"content": []})
    echoed = EpisodeItem(role=EpisodeItemRole.TOOL, content="4", logprobs=[-1.0])
    odd = Trajectory(episode=[foreign, echoed], reward=0.0)
    assert measured([[rollout(1.0), masked, odd], [rollout(0.0, logprobs=[-1.0] * 5)]]).sampled_tokens == 7
    foreign.logprobs = {"content": [{"token": "4", "logprob": -0.5}] * 3}  # as OpenAI gives them
    assert measured([[odd]]).sampled_tokens == 3
    foreign.logprobs = {"content": [{"token": "4"}]}
    assert measured([[odd]]).sampled_tokens == 0


def test_turns_that_were_rendered_anew_are_counted_among_those_that_carry_on():
    def turn(**metadata):
        known = {"token_ids": [1], "prompt_token_ids": [0], **metadata}
        return EpisodeItem(role=EpisodeItemRole.ASSISTANT, content="4", logprobs=[-0.5], metadata=known)

    drifts = Trajectory(episode=[QUESTION, turn(), turn(drifted=True), turn(), turn(conversation=1)], reward=1.0)
    found = measured([[drifts, rollout(0.0)]])
    assert (found.continued_turns, found.drifted_turns) == (2, 1)


def test_preferences_have_rewards_and_no_sampled_tokens():
    pair = Trajectory(episode=[DPOItem(prompt="p", chosen_response="a", rejected_response="b")], reward=1.0)
    found = measured([[pair, pair]])
    assert (found.mean_reward, found.sampled_tokens, found.scores) == (1.0, 0, {})


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.measures
def test_metrics_cost_little_beside_validating_the_same_epoch():
    groups = [[rollout(float(g % 8 == i), scores={"right": 1.0}) for i in range(8)] for g in range(100)]
    collection, stats = TrajectoryCollection(trajectories=groups, run_id="r"), group_statistics(groups)
    selection = select(stats, CurriculumSettings(enabled=True), CurriculumState(0.5), 0, 0)

    document = collection.model_dump_json()
    found = by_turns(
        7,
        measuring=lambda: epoch_metrics(collection, stats, selection),
        validating=lambda: TrajectoryCollection.model_validate_json(document),
    )
    assert found.ratio("measuring", "validating") < 1


# ── advantages ───────────────────────────────────────────────────────────────────────────────────────────────────────

rewards = st.one_of(st.floats(-10, 10).map(lambda r: round(r, 3)), st.just(NAN))


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(rewards, max_size=6), max_size=6), st.booleans())
def test_advantages_are_distances_to_the_groups_mean_in_standard_deviations(groups, scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = advantages(of_rewards(*groups), scale)
    expected = []
    for group in groups:
        values = [r for r in group if not math.isnan(r)]
        mean = stdlib.fmean(values) if values else NAN
        deviation = stdlib.stdev(values) + 1e-4 if len(values) > 1 else 1.0
        expected += [(r - mean) / (deviation if scale else 1.0) for r in group]
    assert found.shape == (sum(map(len, groups)),) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_advantages_of_a_known_group():
    np.testing.assert_allclose(advantages(of_rewards([1, 0, 0, 1])), np.array([1, -1, -1, 1]) * 0.5 / (3**-0.5 + 1e-4))
    np.testing.assert_array_equal(advantages(of_rewards([1, 0, 0, 1]), scale=False), [0.5, -0.5, -0.5, 0.5])


def test_trajectory_without_reward_has_no_advantage_and_does_not_move_the_others():
    found = advantages(of_rewards([1, NAN, 0], [NAN]))
    np.testing.assert_array_equal(found[[0, 2]], advantages(of_rewards([1, 0])))
    assert np.isnan(found[[1, 3]]).all()


def test_group_with_an_infinite_reward_has_no_advantages():
    found = advantages(of_rewards([INF, 1, 0], [-INF, INF], [1, 0]))
    assert np.isnan(found[:5]).all() and np.isfinite(found[5:]).all()


def test_group_without_spread_has_advantage_zero():
    np.testing.assert_array_equal(advantages(of_rewards([0.7] * 3, [0.4], [0.1 + 0.2, 0.3])), np.zeros(6))


def test_signal_is_a_finite_spread_above_rounding():
    stats = of_rewards([1, 0], [0.1 + 0.2, 0.3], [0.5], [], [NAN], [INF, 0], [0.5, NAN, 0.499])
    assert has_signal(stats).tolist() == [True, False, False, False, False, False, True]
    assert has_signal(of_rewards([1e308, -1e308])).tolist() == [False]  # the difference overflows
    assert has_signal(of_rewards()).tolist() == [] and advantages(of_rewards()).tolist() == []
