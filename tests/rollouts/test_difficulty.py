"""How hard examples are by the record, and which are drawn by that."""

import math

import numpy as np
import pytest
from factories import make_epoch

from finetune_nb.errors import ConfigError
from finetune_nb.rollouts.difficulty import (
    STATES,
    DifficultySettings,
    ExampleState,
    Visits,
    draw_by_difficulty,
    states_of,
)
from finetune_nb.rollouts.trajectory_builder import EvalTrajectoryBuilderConfig, draw_of

SETTINGS = DifficultySettings()


def visits(*epochs):
    """Of epochs, each the rewards by example."""
    found = Visits()
    for index, rewards in enumerate(epochs):
        found.add(index, make_epoch(rewards, index).statistics)
    return found


def states(found, epoch, settings=SETTINGS, examples=None):
    return [STATES[code] for code in states_of(found, epoch, settings, examples).state]


def test_a_missing_reward_is_no_reward_of_0():
    found = visits({"a": [1.0, None, 1.0], "b": [None, None], "c": [math.inf, 0.0]}, {"b": [None]})
    assert found.examples == ["a", "b", "c"] and found.rollouts == [3, 3, 2] and found.rewarded == [2, 0, 1]
    assert found.rate[0] == 1.0 and math.isnan(found.rate[1]) and found.rate[2] == 0.0
    assert states(found, 2) == [ExampleState.RESTING, ExampleState.FRESH, ExampleState.LEARNING]
    assert found.epochs == [1, 2, 1] and found.last == [0, 1, 0] and found.checked == [0, -1, 0]


def test_the_newest_visit_counts_half():
    found = visits({"a": [0.0, 0.0]}, {"a": [1.0, 0.0]}, {"a": [1.0, 1.0, 1.0, 0.0]})
    assert found.rate == [0.5 * 0.75 + 0.5 * (0.5 * 0.5)] and found.total == [4.0] and found.passed == [4]


def test_rewards_beyond_1_count_as_1_and_a_half_reward_as_half():
    found = visits({"a": [5.0, -3.0], "b": [0.5, 0.5]})
    assert found.rate == [0.5, 0.5] and found.passed == [1, 0] and found.total == [2.0, 1.0]


def test_a_solved_example_rests_and_is_checked_and_rests_twice_as_long():
    once = visits({"a": [1.0, 1.0]})
    settings = DifficultySettings(rest=3)
    assert [states(once, epoch, settings)[0] for epoch in (1, 2, 3, 4)] == ["resting"] * 3 + ["solved"]
    twice = visits({"a": [1.0, 1.0]}, {"x": [1.0]}, {"a": [1.0, 1.0]})
    assert states_of(twice, 3, settings, ["a"]).rests_until.tolist() == [3 + 2 * 3]
    lapsed = visits({"a": [1.0, 1.0]}, {"a": [1.0, 0.0]})
    assert states(lapsed, 2, settings) == ["learning"]
    for _ in range(20):
        twice.add(2, make_epoch({"a": [1.0]}).statistics)
    assert states_of(twice, 3, settings, ["a"]).rests_until.tolist() == [3 + 8 * 3]  # and no longer
    assert states(once, 1, DifficultySettings(rest=0)) == ["solved"]


def test_an_example_is_too_hard_once_nothing_passed_twice():
    once, twice = visits({"a": [0.0, 0.0]}), visits({"a": [0.0, 0.0]}, {"a": [0.0]})
    assert states(once, 1) == ["learning"]
    assert [states(twice, epoch)[0] for epoch in (2, 6, 7)] == ["resting", "resting", "too hard"]
    turned = visits({"a": [1.0]}, {"a": [0.0]})
    assert states(turned, 2) == ["learning"]


def test_ids_are_told_apart_by_their_text():
    found = visits({1: [1.0], "1.0": [0.0]})
    assert len(found) == 2 and states(found, 1, examples=[1, "1.0", "b"]) == ["resting", "learning", "fresh"]


def drawn(found, size, epoch=5, seed=0, examples=range(100), **settings):
    return draw_by_difficulty(list(examples), size, epoch, seed, found, DifficultySettings(**settings))


def test_a_draw_is_the_same_for_the_same_record_and_another_for_another_seed_or_epoch():
    found = visits({n: [float(n % 2), 0.0] for n in range(100)})
    assert drawn(found, 10) == drawn(found, 10) and len(set(drawn(found, 10))) == 10
    assert drawn(found, 10) != drawn(found, 10, seed=1) and drawn(found, 10) != drawn(found, 10, epoch=6)
    again = Visits.from_json(found.as_json())
    assert drawn(again, 10) == drawn(found, 10) and again.as_json() == found.as_json()


def test_it_is_around_the_target():
    found = visits({n: [1.0] * (n // 10) + [0.0] * (10 - n // 10) for n in range(10, 100)})  # rates of 0.1 to 0.9
    rates = found.rate
    for target in (0.2, 0.5, 0.8):
        places = [p for seed in range(40) for p in drawn(found, 8, 1, seed, range(10, 100), target=target, width=0.1)]
        assert abs(np.mean([rates[place] for place in places]) - target) < 0.03


def test_fresh_examples_are_drawn_like_those_at_the_target():
    found = visits({n: [1.0, 0.0] for n in range(50)})
    share = np.mean([place < 50 for seed in range(50) for place in drawn(found, 20, 1, seed)])
    assert 0.42 < share < 0.58


def test_resting_examples_are_drawn_only_where_others_are_too_few():
    found = visits({n: [1.0] for n in range(90)})
    assert all(place >= 90 for place in drawn(found, 10, 1))
    assert set(range(90, 100)) < set(drawn(found, 30, 1))
    assert drawn(found, 100, 1) and len(set(drawn(found, 100, 1))) == 100


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="examples_per_epoch is not given"):
        EvalTrajectoryBuilderConfig(draw="difficulty")
    with pytest.raises(ConfigError, match="goes by the record of a run"):
        draw_of(EvalTrajectoryBuilderConfig(draw="difficulty", examples_per_epoch=2), 2, 0, 0, None)
    config = EvalTrajectoryBuilderConfig(draw="difficulty", examples_per_epoch=2)
    with pytest.raises(ConfigError, match="examples_per_epoch is 2, but the dataset has 0 rows"):
        draw_of(config, 2, 0, 0, lambda epoch: Visits())([])


@pytest.mark.parametrize("damage", [{"rate": []}, {"rollouts": None}, {"last": ["x"]}])
def test_a_damaged_record_of_a_fork_is_refused(damage):
    record = visits({"a": [1.0]}).as_json() | damage
    with pytest.raises((ValueError, TypeError)):
        Visits.from_json(record)
