"""While an epoch runs, the garbage collector visits what is new, and loses nothing of what was there before."""

import gc
import time
import weakref

import pytest

from finetune_nb.engine import garbage
from finetune_nb.engine.garbage import older_objects_set_aside


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self):
        self.itself = self


def cycle():
    """Makes one, and something that says whether it is still there."""
    return weakref.ref(Cycle())


def set_aside():
    return gc.get_freeze_count() > garbage.IMMORTAL


@pytest.fixture(autouse=True)
def as_python_starts(monkeypatch):
    gc.unfreeze()
    monkeypatch.setattr(garbage, "_due", time.monotonic() + 1000)
    yield
    gc.unfreeze()
    gc.enable()


def test_garbage_of_an_epoch_is_gone_when_it_ends():
    with older_objects_set_aside():
        made = cycle()
    assert made() is None


@pytest.mark.slow
@pytest.mark.proof
def test_older_garbage_waits_until_the_epoch_has_ended():
    gc.disable()
    older = cycle()
    gc.enable()
    with older_objects_set_aside():
        gc.collect()
        assert older() is not None
    assert not set_aside()
    gc.collect()
    assert older() is None


@pytest.mark.slow
@pytest.mark.proof
def test_older_garbage_is_collected_before_an_epoch_now_and_then(monkeypatch):
    monkeypatch.setattr(garbage, "_due", time.monotonic())
    gc.disable()
    older = cycle()
    gc.enable()
    began = time.monotonic()
    with older_objects_set_aside():
        assert older() is None
    took = time.monotonic() - began
    assert 0 < garbage._due - time.monotonic() < took / garbage.PART_OF_TIME


def test_several_epochs_at_once_are_one():
    first, second = older_objects_set_aside(), older_objects_set_aside()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set_aside()
    second.__exit__(None, None, None)
    assert not set_aside()


def test_it_ends_with_an_epoch_that_fails():
    with pytest.raises(ValueError), older_objects_set_aside():
        raise ValueError
    assert not set_aside()


def test_what_somebody_else_has_set_aside_stays_so():
    gc.freeze()
    with older_objects_set_aside():
        pass
    assert set_aside()


def test_collector_that_is_off_stays_off():
    gc.disable()
    with older_objects_set_aside():
        assert not set_aside() and not gc.isenabled()
    assert not gc.isenabled()


@pytest.mark.slow
@pytest.mark.proof
async def test_an_epoch_of_a_run_sets_aside_what_was_there(make_run):
    found = []

    def right(item):
        found.append(set_aside())
        return 1.0

    await make_run(reward=right).next_epoch()
    assert found and all(found)
    assert not set_aside()
