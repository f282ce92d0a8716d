"""The index of an epoch: which rollouts there are, in which groups, and what filters and orders make of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from factories import item, make_epoch, make_trajectory
from hostile import HOSTILE
from records import epoch_of, failed, stored, with_tool

from finetune_nb.analysis.browse_index import (
    CUT,
    FAILED,
    SIGNAL_NAMES,
    SORTS,
    BrowseFilter,
    browse_index,
    group_order,
    leading,
    least_likely,
    matching,
    means_before,
    packed,
)
from finetune_nb.analysis.learning_signal import learning_signal
from finetune_nb.errors import ConfigError
from finetune_nb.types import RolloutFailure


def mixed():
    """a: three trajectories, one without a reward, and one failure; b: no spread; lost: failures alone."""
    failures = [RolloutFailure("a", 1, "Error: lost"), failed("lost", 0), failed("lost", 1)]
    epoch = make_epoch({"a": [1, 0, None], "b": [0, 0]}, failures=failures)
    for place, trajectory in enumerate(epoch.collection.trajectories[0]):
        trajectory.metadata["generation"] = (0, 2, 3)[place]
    return epoch


@pytest.fixture(params=["in memory", "on the disk"])
def epoch(request, tmp_path):
    return mixed() if request.param == "in memory" else stored(tmp_path, mixed())[0]


def listed(index, order, **wanted):
    found = matching(index, BrowseFilter.of(wanted))
    return [index.examples[group] for group in group_order(index, found, order)]


def test_failed_rollouts_stand_in_their_group_by_generation(epoch):
    index = browse_index(epoch)
    assert index.examples == ["a", "b", "lost"] and index.starts.tolist() == [0, 4, 6, 8]
    assert [index.name_of(place) for place in range(4)] == ["e0/a/0", "e0/a/1", "e0/a/2", "e0/a/3"]
    assert (index.flags & FAILED).tolist() == [0, 1, 0, 0, 0, 0, 1, 1]
    assert np.array_equal(index.rewards, [1, np.nan, 0, np.nan, 0, 0, np.nan, np.nan], equal_nan=True)
    assert sorted(index.rows.tolist()) == list(range(8)) and index.rows[1] == 5


def test_the_signals_are_those_of_the_learning_signal(epoch):
    index = browse_index(epoch)
    expected = {example.id: example.signal for example in learning_signal(epoch).examples}
    assert {index.examples[g]: SIGNAL_NAMES[code] for g, code in enumerate(index.signals)} == expected


def test_a_generation_that_was_not_recorded_is_named_by_its_place():
    epoch = epoch_of([[make_trajectory(1, "a", None), make_trajectory(0, "a", 0), make_trajectory(0, "a", None)]])
    index = browse_index(epoch)
    assert [index.name_of(place) for place in range(3)] == ["e0/a/0", "e0/a/#0", "e0/a/#2"]


def test_every_field_of_a_filter_counts(epoch):
    index = browse_index(epoch)

    def names(**wanted):
        found = matching(index, BrowseFilter.of(wanted))
        return [index.name_of(place) for place in np.flatnonzero(found)]

    assert len(names()) == 8
    assert names(failed=True) == ["e0/a/1", "e0/lost/0", "e0/lost/1"]
    assert names(failed=False, signal="teaches") == ["e0/a/0", "e0/a/2", "e0/a/3"]
    assert names(missing=True) == ["e0/a/3"]
    assert names(reward=(0.5, None)) == ["e0/a/0"]
    assert names(reward=(None, 0)) == ["e0/a/2", "e0/b/0", "e0/b/1"]
    assert names(turns=(3, None)) == []
    assert names(signal="failed") == ["e0/lost/0", "e0/lost/1"]


def test_a_reward_that_float32_rounds_is_still_inside_its_own_limits():
    index = browse_index(make_epoch([[0.1, 0.7]]))
    assert matching(index, BrowseFilter.of({"reward": (0.1, 0.7)})).all()


def test_a_rollout_that_was_cut_is_found():
    reply = item("assistant", "4", finish_reason="length")
    cut = make_trajectory()
    cut.episode = [item("user", "2+2"), reply]
    index = browse_index(epoch_of([[cut, make_trajectory(generation=1)]]))
    assert (index.flags & CUT).tolist() == [CUT, 0]
    assert matching(index, BrowseFilter(cut=True)).tolist() == [True, False]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"failled": True}, "Did you mean 'failed'"),
        ({"failed": "yes"}, "expected True, False or None"),
        ({"reward": 0.5}, r"\(lowest, highest\)"),
        ({"reward": (0, "1")}, r"\(lowest, highest\)"),
        ({"signal": "teachs"}, "Did you mean 'teaches'"),
        ({"text": 7}, "expected a text"),
        ("failed", "expected a mapping"),
    ],
)
def test_a_filter_that_does_not_fit_is_an_error(given, says):
    with pytest.raises(ConfigError, match=says):
        BrowseFilter.of(given)


def test_groups_are_sorted_by_every_order_and_groups_without_a_value_come_last(tmp_path):
    first = make_epoch({"a": [0, 1], "b": [0.5, 0.5], "c": [1, 1]}, 0)
    second = make_epoch({"a": [0, 1, 1], "b": [0, 0.5], "c": [None, None]}, 1, failures=[failed("lost")])
    second.collection.trajectories[1][0].episode = with_tool().episode  # the longest, with the least likely token
    index = browse_index(second, [first], means_before(second, [first]))
    everything = matching(index, BrowseFilter())
    least = least_likely(second)

    def order(sort):
        return [index.examples[group] for group in group_order(index, everything, sort, least)]

    assert order("recorded") == ["a", "b", "c", "lost"]
    assert order("spread") == ["a", "b", "c", "lost"]
    assert order("mean")[:2] == ["b", "a"]
    assert order("change") == ["b", "a", "c", "lost"]
    assert order("length")[0] == "b" and order("unlikely")[0] == "b"
    assert order("call") == ["b", "a", "c", "lost"]
    assert order("advantage")[-2:] == ["c", "lost"]
    with pytest.raises(ConfigError, match="Did you mean 'spread'"):
        order("spred")
    assert set(SORTS) == {"recorded", "spread", "mean", "change", "length", "unlikely", "call", "advantage"}


def test_only_rollouts_that_the_filter_lets_through_count_for_the_order():
    index = browse_index(make_epoch({"a": [1, 0], "b": [0.5, 0.5]}))
    assert listed(index, "spread", reward=(0.5, 0.5)) == ["b"]


def test_the_least_likely_token_of_a_row_is_that_of_the_file(epoch):
    found = least_likely(epoch)
    assert found[:5].tolist() == [-0.5] * 5 and np.isnan(found[5:]).all()


def test_the_least_likely_tool_call_is_that_of_the_messages_that_call_one(tmp_path):
    made = make_epoch({"a": [1, 0, 0]}, failures=[failed("a")])
    rollouts = made.collection.trajectories[0]
    rollouts[0].episode = with_tool().episode  # -3 in its call
    rollouts[0].episode[-1].logprobs = [-9.0]
    rollouts[1].episode[1].metadata["tool_calls"] = []
    rollouts[2].episode[1].metadata["reasoning_content"] = 'it has "tool_calls": [{}] in it'
    for epoch in (made, *stored(tmp_path, made)):
        assert least_likely(epoch)[0] == -9.0
        found = least_likely(epoch, calls=True)
        assert found[0] == -3.0 and np.isnan(found[1:]).all() and len(found) == 4


def test_the_rollout_that_a_group_is_sorted_by_is_opened_first():
    epoch = make_epoch({"a": [0, 0.5, 1], "b": [1, 0, 0], "c": [None, None]}, failures=[failed("lost")])
    index = browse_index(epoch)
    everything = matching(index, BrowseFilter())

    def first(sort, found=everything):
        return [
            index.name_of(rollout) for rollout in leading(index, found, sort, -np.arange(float(len(index)))).tolist()
        ]

    assert first("spread") == ["e0/a/0", "e0/b/0", "e0/c/0", "e0/lost/9"]
    assert first("unlikely") == ["e0/a/2", "e0/b/2", "e0/c/1", "e0/lost/9"]
    assert first("advantage")[:2] == ["e0/a/0", "e0/b/0"]
    assert first("spread", matching(index, BrowseFilter(reward=(0.5, 1))))[:2] == ["e0/a/1", "e0/b/0"]
    assert leading(browse_index(make_epoch({})), np.zeros(0, bool), "spread").tolist() == []


def test_the_mean_before_is_that_of_the_last_epoch_that_drew_the_example():
    epochs = [make_epoch({"a": [1, 0]}, 0), make_epoch({"b": [1, 1]}, 1)]
    now = make_epoch({"a": [1, 1], "b": [0, 0], "c": [0, 1]}, 2)
    found = means_before(now, epochs)
    assert found[:2].tolist() == [0.5, 1] and math.isnan(found[2])


@pytest.mark.slow
@pytest.mark.proof
def test_the_columns_take_few_bytes_a_rollout_and_hostile_ids_can_be_packed():
    index = browse_index(make_epoch({f"q{i}": [0, 1, 1, 0, 1, 0, 1, 1] for i in range(500)}))
    columns = packed(index, [str(example) for example in index.examples])
    assert sum(map(len, columns)) < 40 * len(index)
    index = browse_index(make_epoch({text: [0, 1] for text in HOSTILE}))
    blob, offsets = packed(index, list(index.examples))[2:4]
    ends = np.frombuffer(offsets, "<u4")
    texts = [blob[start:stop].decode() for start, stop in pairwise(ends)]
    assert texts == [text.encode("utf-8", "backslashreplace").decode() for text in HOSTILE]


def test_an_epoch_without_rollouts_has_an_empty_index():
    index = browse_index(make_epoch({}))
    assert len(index) == 0 and group_order(index, matching(index, BrowseFilter()), "length").tolist() == []
