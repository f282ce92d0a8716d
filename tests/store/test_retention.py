"""Which checkpoints stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_nb.errors import ConfigError
from finetune_nb.store.checkpoints import to_keep


def test_newest_best_and_pinned_epochs_stay():
    assert to_keep(range(10), last=2, best=4, pinned={1, 6}) == {1, 4, 6, 8, 9}


def test_order_and_repetition_of_the_epochs_do_not_matter():
    assert to_keep([7, 3, 9, 9, 0], last=2, best=None, pinned=()) == {7, 9}


def test_epochs_without_a_checkpoint_cannot_stay():
    assert to_keep([2, 3], last=1, best=0, pinned=[1, 2]) == {2, 3}
    assert to_keep([], last=3, best=0, pinned=[1]) == set()


def test_epoch_zero_can_be_the_best():
    assert to_keep([0, 1, 2], last=1, best=0, pinned=()) == {0, 2}


def test_none_stay_for_being_new_where_none_are_asked_for():
    assert to_keep([1, 2, 3], last=0, best=None, pinned=[2]) == {2}


def test_negative_number_of_newest_is_refused():
    with pytest.raises(ConfigError, match="is -1; expected 0 or more"):
        to_keep([1], last=-1, best=None, pinned=())


@given(st.lists(st.integers(0, 30)), st.integers(0, 5), st.none() | st.integers(0, 30), st.sets(st.integers(0, 30)))
def test_keeping_again_what_was_kept_removes_nothing_more(epochs, last, best, pinned):
    kept = to_keep(epochs, last, best, pinned)
    assert kept <= set(epochs)
    assert to_keep(sorted(kept), last, best, pinned) == kept
    for epoch in set(epochs) - kept:
        assert epoch != best and epoch not in pinned and sum(k > epoch for k in kept) >= last
