"""An epoch that has ended makes room for the next one."""

import collections
import gc
import weakref

import pytest

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedBuilder


@pytest.mark.slow
@pytest.mark.proof
def test_no_trajectory_of_an_ended_epoch_is_alive_while_the_next_one_is_collected(tmp_path):
    held, alive = [], []

    class Builder(ScriptedBuilder):
        async def finalize(self, run_id, meta=None):
            gc.unfreeze()  # what was there before the epoch is set aside
            gc.collect()
            alive.append([trajectory() is not None for trajectory in held])
            collection = await super().finalize(run_id, meta)
            held.append(weakref.ref(collection.trajectories[0][0]))
            return collection

    adapter = FakeAdapter()
    adapter.submitted = collections.deque(maxlen=0)  # type: ignore[assignment]  # the fake itself keeps what it is given
    builder = Builder(lambda epoch: {"q0": [0, 1], "q1": [1, 0]})
    run = ft.Run(adapter=adapter, builder=builder, curriculum={}, output_dir=tmp_path)
    for _ in range(3):
        ft.run_sync(run.next_epoch())
    run.close()
    assert alive == [[], [False], [False, False]]
