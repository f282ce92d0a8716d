"""The curriculum's choice, against a plain-Python transcription of the rules that it shares with NeMo's ART trainer."""

import functools
import math
import operator
import random
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetune_nb.config import CurriculumSettings
from finetune_nb.errors import ConfigError
from finetune_nb.training.curriculum import (
    group_statistics,
    infer_selection,
    keep,
    select,
    state_from_dict,
    state_to_dict,
    steer,
)
from finetune_nb.types import CurriculumState, GroupReason, Trajectory

NAN, INF = math.nan, math.inf
ON = CurriculumSettings(enabled=True)
START = CurriculumState(percentile=0.3)
quick = hypothesis_settings(deadline=None, max_examples=150)


@functools.cache
def rollout(reward, example_id=None):
    return Trajectory(episode=[], reward=reward, metadata=None if example_id is None else {"id": example_id})


def statistics_of(*groups):
    return group_statistics([[rollout(reward, f"q{i}") for reward in group] for i, group in enumerate(groups)])


def kept_by(groups, settings=ON, state=START, epoch=0, seed=0):
    return select(statistics_of(*groups), settings, state, epoch, seed).kept.tolist()


def left_out(selection):
    return {str(reason): ids for reason, ids in selection.left_out().items()}


rewards = st.one_of(st.integers(0, 20).map(lambda n: n / 20), st.sampled_from([NAN, INF, -INF, -1.0]))
group_lists = st.lists(st.lists(rewards, max_size=5), max_size=12)
percentiles = st.integers(1, 100).map(lambda n: n / 100)
any_settings = st.builds(
    CurriculumSettings,
    enabled=st.booleans(),
    percentile=percentiles,
    schedule=st.sampled_from(["automatic", "manual"]),
    increment_percentile=percentiles,
    expansion_interval=st.integers(1, 4),
    min_reward_diff=st.sampled_from([0, 0.05, 0.1, 0.5]),
    sort_ascending=st.booleans(),
    random_subsample=st.one_of(st.none(), percentiles),
)


# ── the shared rules, transcribed ────────────────────────────────────────────────────────────────────────────────────


def added(numbers):
    """Their sum, one after the other: `sum` does so up to Python 3.11, and keeps what rounding loses since 3.12."""
    return functools.reduce(operator.add, numbers, 0)


class ReferenceCurriculum:
    """The rules in plain Python, quirks included; works on floats and on Fractions. The random subsample is apart."""

    def __init__(self, initial, increment, interval, min_diff, ascending):
        self.p, self.last, self.total, self.included = initial, -1, 0, set()
        self.increment, self.interval, self.min_diff, self.ascending = increment, interval, min_diff, ascending

    def filter(self, groups, epoch):
        """Positions of the chosen groups, in order."""
        if len(groups) == 1:
            return [0]
        kept = []
        for i, group in enumerate(groups):
            if not group or max(group) - min(group) < self.min_diff:
                continue
            kept.append((added(group) / len(group), i))
        if not kept:
            return []
        kept.sort(key=lambda pair: pair[0] if self.ascending else -pair[0])
        if self.total == 0:
            self.total = len(kept)
        if epoch - self.last >= self.interval and self.p < 1:
            self.p = min(1, self.p + self.increment)
            self.last = epoch
        chosen = [i for _, i in kept[: max(1, math.ceil(len(kept) * self.p))]]
        self.included = set(chosen)
        return chosen


def without_unusable_rewards(group):
    """What the reference is shown: NaN counts as absent, and a group with an infinite reward as empty."""
    return [] if any(math.isinf(r) for r in group) else [r for r in group if not math.isnan(r)]


def drawn_dyadic(rng):
    """Numbers that floats hold exactly, means included (sizes are powers of two): nothing needs forgiving."""
    eighths = functools.partial(rng.randint, 0)
    groups = [
        [eighths(8) / 8 for _ in range(rng.choice([0, 1, 2, 4, 8]))] for _ in range(rng.choice([0, 1, 2, 5, 12, 30]))
    ]
    numbers = [rng.randint(1, 16) / 16, rng.randint(1, 8) / 16, rng.randint(0, 6) / 8]
    return groups, numbers, float


def drawn_decimal(rng):
    """Decimals such as 0.1, which floats do not hold: the reference works on the exact fractions that were meant."""
    groups = [
        [rng.randint(-5, 20) / 10 for _ in range(rng.choice([0, 1, 2, 3, 5, 7]))]
        for _ in range(rng.choice([0, 1, 2, 5, 10, 30]))
    ]
    numbers = [rng.randint(1, 20) / 20, rng.randint(1, 10) / 20, rng.randint(0, 8) / 10]
    return groups, numbers, lambda number: Fraction(round(number * 20), 20)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("draw", [drawn_dyadic, drawn_decimal])
def test_selection_equals_the_reference_but_for_the_intended_differences(draw):
    """11,000 calls each. The intended differences, and how each is taken into account:

    1. a single group is treated like any other: the reference gets an empty one beside it, which it always drops;
    2. NaN and infinite rewards: the reference is shown what `without_unusable_rewards` leaves;
    3. forgiven rounding: the reference sees exactly representable numbers, or the exact fractions;
    4. random_subsample: ours is a part of the reference's choice, in its order, of the share rounded up;
    5. included_groups: the reference's, less what the subsample took away.
    """
    rng = random.Random(draw.__name__)
    calls = 0
    while calls < 11_000:
        _, (initial, increment, min_diff), exact = draw(rng)
        interval, ascending = rng.randint(1, 4), rng.random() < 0.5
        fraction = rng.choice([None, None, rng.randint(1, 20) / 20])
        reference = ReferenceCurriculum(exact(initial), exact(increment), interval, exact(min_diff), ascending)
        settings = CurriculumSettings(
            enabled=True,
            percentile=0.01,  # not read by select
            increment_percentile=increment,
            expansion_interval=interval,
            min_reward_diff=min_diff,
            sort_ascending=ascending,
            random_subsample=fraction,
        )
        state, epoch = CurriculumState(percentile=initial), 0
        for _ in range(rng.randint(1, 12)):
            groups = draw(rng)[0]
            if rng.random() < 0.3:
                for group in groups:
                    group[:] = [rng.choice([NAN, INF, -INF]) if rng.random() < 0.1 else r for r in group]
            shown = [[exact(r) for r in without_unusable_rewards(group)] for group in groups]
            expected = reference.filter([*shown, []] if len(shown) == 1 else shown, epoch)
            selection = select(
                group_statistics([list(map(rollout, g)) for g in groups]), settings, state, epoch, seed=7
            )
            kept, state = selection.kept.tolist(), selection.state

            if fraction is None:
                assert kept == expected
            else:
                assert len(kept) == math.ceil(Fraction(round(fraction * 20), 20) * len(expected))
                assert kept == [i for i in expected if i in kept]
            codes = {name: {i for i in range(len(groups)) if selection.reason_of(i) == name} for name in GroupReason}
            assert codes[GroupReason.KEPT] == set(kept)
            assert codes[GroupReason.SUBSAMPLED] == set(expected) - set(kept)
            if expected:
                assert state.included_groups == reference.included - codes[GroupReason.SUBSAMPLED]
            assert state.percentile == pytest.approx(float(reference.p), abs=1e-9)
            assert (state.percentile == 1) == (reference.p == 1)
            assert (state.last_expansion_epoch, state.total_groups) == (reference.last, reference.total)
            epoch += rng.choice([1, 1, 1, 2, 3])
            calls += 1


def test_single_group_without_spread_is_left_out_where_the_reference_lets_it_through():
    assert ReferenceCurriculum(0.3, 0.2, 5, 0.1, False).filter([[1.0, 1.0]], epoch=0) == [0]
    selection = select(statistics_of([1.0, 1.0]), ON, START, epoch=9, seed=0)
    assert left_out(selection) == {"no_reward_spread": ["q0"]}
    assert selection.state == START


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_statistics_hold_rewards_by_group_with_nan_where_there_is_none():
    found = statistics_of([1.0, 0.0], [], [NAN], [0.5, NAN, 0.25])
    assert found.example_ids == ("q0", None, "q2", "q3")
    assert found.offsets.tolist() == [0, 2, 2, 3, 6] and found.offsets.dtype == np.int64
    assert found.counts.tolist() == [2, 0, 0, 2] and found.counts.dtype == np.int64
    np.testing.assert_array_equal(found.rewards, [1, 0, NAN, 0.5, NAN, 0.25])
    np.testing.assert_array_equal(found.means, [0.5, NAN, NAN, 0.375])
    np.testing.assert_array_equal(found.spreads, [1, NAN, NAN, 0.25])


def test_statistics_of_groups_with_an_infinite_reward_have_no_spread():
    found = statistics_of([INF, 0.0], [-INF, NAN], [INF, -INF], [INF, INF])
    np.testing.assert_array_equal(found.means, [INF, -INF, INF, INF])
    assert np.isnan(found.spreads).all()


def test_statistics_need_no_metadata():
    found = group_statistics([[rollout(1.0)], [Trajectory(episode=[], reward=0.0, metadata={"generation": 0})]])
    assert found.example_ids == (None, None)
    assert len(group_statistics([])) == 0 and group_statistics([]).offsets.tolist() == [0]


@quick
@given(group_lists)
def test_statistics_agree_with_each_group_on_its_own_and_never_warn(groups):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = statistics_of(*groups)
        select(together, ON, START, epoch=0, seed=0)
    for position, group in enumerate(groups):
        values = [r for r in group if not math.isnan(r)]
        assert together.counts[position] == len(values)
        start, end = together.offsets[position : position + 2]
        np.testing.assert_array_equal(together.rewards[start:end], group)
        if not values:
            assert math.isnan(together.means[position]) and math.isnan(together.spreads[position])
        elif any(map(math.isinf, values)):
            assert math.isinf(together.means[position]) and math.isnan(together.spreads[position])
        else:
            assert together.means[position] == pytest.approx(sum(values) / len(values))
            assert together.spreads[position] == max(values) - min(values)


# ── selection ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_left_out_group_says_why():
    groups = [[0.5, 0.5], [1, 0.5], [NAN, NAN], [], [INF, 0], [0.2, 0], [0.4, 0]]
    assert kept_by(groups) == [1]
    assert left_out(select(statistics_of(*groups), ON, START, 0, 0)) == {
        "no_reward_spread": ["q0"],
        "no_reward": ["q2", None],
        "infinite_reward": ["q4"],
        "beyond_percentile": ["q5", "q6"],
    }


def test_best_groups_come_first_and_worst_first_when_ascending():
    groups = [[0.2, 0], [0.8, 0], [0.5, 0]]
    assert kept_by(groups, state=CurriculumState(1.0)) == [1, 2, 0]
    assert kept_by(groups, replace(ON, sort_ascending=True), CurriculumState(1.0)) == [0, 2, 1]


@pytest.mark.parametrize("ascending", [False, True])
def test_groups_of_equal_mean_stay_in_input_order_whatever_the_order_of_their_rewards(ascending):
    groups = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.1, 0.3], [0.3, 0.1, 0.2]]
    assert len({added(group) / 3 for group in groups}) > 1  # floats add up differently
    assert kept_by(groups, replace(ON, sort_ascending=ascending), CurriculumState(1.0)) == [0, 1, 2, 3]


def test_means_too_large_for_nine_decimals_are_still_told_apart():
    assert kept_by([[1e300, 0], [3e300, 0], [5e6, 0], [2e300, 0]], state=CurriculumState(1.0)) == [1, 3, 0, 2]


def test_share_is_rounded_up_but_forgives_float_rounding():
    ten = [[1, 0]] * 10
    assert 10 * (0.1 + 0.2) > 3
    assert len(kept_by(ten, state=CurriculumState(0.1 + 0.2))) == 3
    assert len(kept_by(ten, state=CurriculumState(0.31))) == 4
    assert len(kept_by(ten, state=CurriculumState(1e-12))) == 1


def test_spread_at_the_minimum_is_kept_though_floats_make_it_smaller():
    assert 0.3 - 0.2 < 0.1
    assert kept_by([[0.3, 0.2]]) == [0]
    assert kept_by([[0.3, 0.2001]]) == []


def test_group_with_one_reward_has_spread_zero():
    assert left_out(select(statistics_of([1.0], [0.5, NAN]), ON, START, 0, 0)) == {"no_reward_spread": ["q0", "q1"]}
    assert kept_by([[1.0], [0.5, NAN]], replace(ON, min_reward_diff=0), CurriculumState(1.0)) == [0, 1]


def test_automatic_schedule_grows_first_at_the_epoch_before_the_interval_and_ends_at_one():
    state, seen = START, []
    for epoch in range(20):
        selection = select(statistics_of([1, 0], [0.5, 0]), ON, state, epoch, 0)
        assert selection.settings == replace(ON, percentile=selection.state.percentile)
        state = selection.state
        seen.append(round(state.percentile, 9))
    assert seen == [0.3] * 4 + [0.5] * 5 + [0.7] * 5 + [0.9] * 5 + [1.0]


def test_increments_that_sum_to_one_but_for_rounding_end_at_exactly_one():
    state = CurriculumState(0.1)
    for epoch in range(9):
        state = select(
            statistics_of([1, 0]), replace(ON, increment_percentile=0.1, expansion_interval=1), state, epoch, 0
        ).state
    assert added([0.1] * 10) < 1 and state.percentile == 1 and state.last_expansion_epoch == 8


def test_subsample_is_a_part_of_the_chosen_groups_and_included_groups_are_the_rest():
    stats = statistics_of(*[[i / 20, -1] for i in range(20)])
    settings = replace(ON, random_subsample=0.5)
    selection = select(stats, settings, CurriculumState(0.5), 0, seed=3)
    assert len(selection.kept) == 5
    assert selection.kept.tolist() == sorted(selection.kept, reverse=True)  # best first, as without the subsample
    assert min(selection.kept) >= 10  # the best half
    assert selection.state.included_groups == set(selection.kept.tolist())
    assert len(selection.left_out()[GroupReason.SUBSAMPLED]) == 5


def test_subsample_depends_on_seed_and_epoch_alone():
    stats = statistics_of(*[[i / 20, -1] for i in range(20)])
    settings = replace(ON, random_subsample=0.3, expansion_interval=1000)

    def draw(seed, epoch):
        return tuple(select(stats, settings, CurriculumState(1.0), epoch, seed).kept.tolist())

    random.seed(1)
    first = draw(0, 0)
    random.seed(2)
    np.random.seed(2)
    assert draw(0, 0) == first
    assert len({draw(seed, epoch) for seed in range(5) for epoch in range(5)}) > 20


@quick
@given(group_lists, any_settings, percentiles, st.integers(0, 9), st.integers(0, 2**63))
def test_kept_and_left_out_are_all_groups_once(groups, settings, percentile, epoch, seed):
    stats = statistics_of(*groups)
    selection = select(stats, settings, CurriculumState(percentile), epoch, seed)
    kept = selection.kept.tolist()
    assert len(kept) == len(set(kept))
    assert set(kept) == set(np.flatnonzero(selection.reasons == 0).tolist())
    assert len(kept) + sum(map(len, selection.left_out().values())) == len(groups)
    assert selection.reasons.dtype == np.int8 and selection.example_ids is stats.example_ids
    assert selection.settings == replace(settings, percentile=selection.state.percentile)
    assert keep(groups, selection) == [groups[i] for i in kept]


@quick
@given(group_lists, any_settings, percentiles, st.integers(0, 9))
def test_disabled_keeps_every_group_in_order_and_the_state(groups, settings, percentile, epoch):
    state = CurriculumState(percentile, 2, 3, frozenset({1}))
    selection = select(statistics_of(*groups), replace(settings, enabled=False), state, epoch, 0)
    assert selection.kept.tolist() == list(range(len(groups)))
    assert selection.state == state and selection.left_out() == {}


@quick
@given(group_lists, any_settings, percentiles, st.randoms(use_true_random=False))
def test_order_of_groups_and_rewards_does_not_matter_even_with_nan(groups, settings, percentile, rng):
    order = rng.sample(range(len(groups)), len(groups))
    shuffled = [rng.sample(groups[i], len(groups[i])) for i in order]
    # equal means keep their input order by design, and a subsample draws positions: compare what is chosen, by mean
    settings = replace(settings, enabled=True, random_subsample=None)
    found = []
    for case in (groups, shuffled):
        stats = statistics_of(*case)
        selection = select(stats, settings, CurriculumState(percentile), 0, 0)
        codes = np.bincount(selection.reasons, minlength=len(GroupReason)).tolist()
        found.append((np.round(stats.means[selection.kept], 9).tolist(), codes))
    assert found[0] == found[1]


@quick
@given(group_lists, any_settings, percentiles, percentiles)
def test_larger_percentile_keeps_the_same_groups_and_more(groups, settings, one, other):
    settings = replace(settings, enabled=True, random_subsample=None)
    small, large = (kept_by(groups, settings, CurriculumState(p, last_expansion_epoch=0)) for p in sorted((one, other)))
    assert large[: len(small)] == small


@quick
@given(group_lists, any_settings)
def test_nothing_to_keep_leaves_the_state_untouched(groups, settings):
    state = CurriculumState(0.2, -1, 0, frozenset({4}))
    flat = [[group[0]] * 3 for group in groups if group]
    selection = select(statistics_of(*flat), replace(settings, enabled=True, min_reward_diff=0.1), state, 50, 0)
    assert selection.kept.tolist() == [] and selection.state == state


# ── steering ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ALWAYS_SPREAD = statistics_of(*[[i / 10, -1] for i in range(10)])


def percentiles_over(epochs, settings, state, resumed_at=None):
    """Percentile in force at each epoch, with settings that follow the state as a Run's do."""
    seen = []
    for epoch in epochs:
        state = steer(state, settings, epoch, resumed=epoch == resumed_at)
        selection = select(ALWAYS_SPREAD, settings, state, epoch, 0)
        state, settings = selection.state, selection.settings
        seen.append(round(state.percentile, 9))
    return seen, state


@quick
@given(percentiles, st.integers(1, 4), st.integers(0, 30))
def test_manual_percentile_stays_for_as_long_as_the_schedule_is_manual(percentile, interval, begin):
    manual = replace(ON, percentile=percentile, schedule="manual", expansion_interval=interval)
    seen, _ = percentiles_over(range(begin, begin + 12), manual, CurriculumState(0.77))
    assert seen == [percentile] * 12


@quick
@given(st.integers(1, 6), st.integers(0, 6))
def test_automatic_again_goes_on_from_the_manual_value_one_interval_later(interval, manual_epochs):
    manual = replace(ON, percentile=0.4, schedule="manual", expansion_interval=interval)
    _, state = percentiles_over(range(manual_epochs), manual, START)
    again = replace(manual, schedule="automatic")
    epochs = range(manual_epochs, manual_epochs + interval + 1)
    seen, _ = percentiles_over(epochs, again, state, resumed_at=manual_epochs)
    assert seen == [0.4] * interval + [0.6]


def test_percentile_changed_under_an_automatic_schedule_goes_on_from_there():
    seen, _ = percentiles_over(range(10, 17), replace(ON, percentile=0.5), CurriculumState(0.3, last_expansion_epoch=9))
    assert seen == [0.5] * 5 + [0.7] * 2


def test_steering_changes_nothing_while_nobody_steers():
    state = CurriculumState(0.3, 4, 7, frozenset({1, 2}))
    assert steer(state, ON, epoch=9) is state


# ── other people's trainers ──────────────────────────────────────────────────────────────────────────────────────────

FOREIGN = statistics_of([1, 0], [0.5, 0.5], [NAN], [INF, 0], [0.6, 0], [0.2, 0.15])


def test_inferred_selection_keeps_what_was_kept_and_concludes_the_reasons():
    selection = infer_selection(FOREIGN, [4], ON, CurriculumState(0.5))
    assert selection.inferred and selection.kept.tolist() == [4]
    assert left_out(selection) == {
        "beyond_percentile": ["q0"],
        "no_reward_spread": ["q1", "q5"],
        "no_reward": ["q2"],
        "infinite_reward": ["q3"],
    }
    assert selection.state == CurriculumState(0.5) and selection.settings.percentile == 0.5


def test_inferred_selection_takes_kept_groups_as_given_even_without_spread():
    selection = infer_selection(FOREIGN, [5, 1, 2], ON, START)
    assert selection.kept.tolist() == [5, 1, 2]
    assert [selection.reason_of(i) for i in (1, 2, 5)] == [GroupReason.KEPT] * 3


def test_inferred_selection_with_the_curriculum_off_blames_no_spread():
    selection = infer_selection(FOREIGN, [], replace(ON, enabled=False), None)
    assert left_out(selection) == {
        "not_submitted": ["q0", "q1", "q4", "q5"],
        "no_reward": ["q2"],
        "infinite_reward": ["q3"],
    }
    assert selection.state == CurriculumState(ON.percentile)


@pytest.mark.parametrize("position", [-1, 6])
def test_inferred_selection_refuses_positions_that_are_no_groups(position):
    with pytest.raises(ValueError, match="not among the 6 groups"):
        infer_selection(FOREIGN, [0, position], ON, START)


@given(percentiles, st.integers(-1, 99), st.integers(0, 99), st.frozensets(st.integers(0, 99)))
def test_state_survives_the_trainers_dict(percentile, last, total, included):
    state = CurriculumState(percentile, last, total, included)
    record = state_to_dict(state)
    assert list(record) == ["current_percentile", "last_expansion_epoch", "total_groups", "included_groups"]
    assert isinstance(record["included_groups"], set)
    assert state_from_dict(record) == state
    assert state_from_dict({**record, "included_groups": sorted(included), "config": {}}) == state


@pytest.mark.parametrize(
    "record", [None, {}, {"current_percentile": "a lot"}, {"current_percentile": 0}, {"current_percentile": NAN},
               {"current_percentile": 0.5, "included_groups": 3}, {"current_percentile": 0.5, "total_groups": INF}]
)  # fmt: skip
def test_unreadable_state_says_what_was_expected(record):
    with pytest.raises(ConfigError, match="current_percentile"):
        state_from_dict(record)
