"""An epoch that cannot be stored as it is, is stored with less and says so; the next one is not held up by it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from factories import make_epoch

import finetune_nb as ft
from finetune_nb.engine.run_writer import RunWriter
from finetune_nb.store.store import RunStore
from finetune_nb.testing import FakeAdapter


@pytest.fixture
def writer(tmp_path):
    with RunStore.create(tmp_path / "run", "run", {}) as store:
        yield RunWriter(store)


def unusable(epoch, what):
    """The epoch with numbers of its Trainer's that do not belong together."""
    selection, statistics = epoch.selection, epoch.statistics
    if what == "groups that are not there":
        return replace(epoch, selection=replace(selection, kept=np.array([0, 99])))
    if what == "too few reasons":
        return replace(epoch, selection=replace(selection, reasons=selection.reasons[:1]))
    if what == "reasons that are not known":
        return replace(epoch, selection=replace(selection, reasons=np.full(2, 77, np.int8)))
    return replace(epoch, statistics=replace(statistics, rewards=statistics.rewards[:1]))


@pytest.mark.parametrize(
    "what", ["groups that are not there", "too few reasons", "reasons that are not known", "too few rewards"]
)
def test_numbers_that_do_not_belong_together_are_worked_out_again(writer, tmp_path, caplog, what):
    epoch = make_epoch([[1.0, 0.0], [0.5, 0.0]])
    writer._store(unusable(epoch, what), {"index": 0})
    writer._store(make_epoch([[1.0, 0.0]], index=1), {"index": 1})
    found = RunStore.open(tmp_path / "run").epochs
    assert [each.index for each in found] == [0, 1]
    assert found[0].statistics.rewards.tolist() == [1.0, 0.0, 0.5, 0.0] and found[0].selection.inferred
    assert len(found[0].collection.trajectories) == 2
    assert "epoch 0" in caplog.text and "worked out again" in caplog.text


def test_a_state_that_json_does_not_know_is_stored_as_text_and_named(writer, tmp_path, caplog):
    writer._store(make_epoch([[1.0, 0.0]]), {"policy_version": b"\xff", "live": {"lr": 0.5}})
    assert RunStore.open(tmp_path / "run").state() == {"policy_version": "b'\\xff'", "live": {"lr": 0.5}}
    assert "policy_version" in caplog.text


class Silent:
    def __repr__(self):
        raise SystemExit


ODD = {
    "a digest": hashlib.sha256(b"weights").digest(),
    "a set": {b"\xff"},
    "an array": np.arange(3),
    "a long number": 10**5000,
    "half a character": "\ud800",
    "no text": Silent(),
    "another type": 1j,
}


@pytest.mark.parametrize("name", ODD)
async def test_a_backend_may_report_anything(make_run, tmp_path, name):
    class Reporting(FakeAdapter):
        async def submit(self, trajectories):
            ref = await super().submit(trajectories)
            return ref.model_copy(update={"metadata": {**(ref.metadata or {}), "odd": ODD[name]}})

        async def status(self, ref):
            status = await super().status(ref)
            update = {"metadata": {"odd": ODD[name], "metrics": {"loss": 0.5, "odd": ODD[name]}}, "message": ODD[name]}
            return status.model_copy(update=update)

    run = make_run(name="run", adapter=Reporting())
    for _ in range(3):
        await run.next_epoch()
    run.close()
    found = ft.Run.open(tmp_path / "run")
    assert len(found) == 3 and found[2].train_metrics["loss"] == 0.5
    assert len(found.epochs()) == 3 and len(found.trajectories()) == 72


@pytest.mark.parametrize("name", ODD)
async def test_an_agent_and_its_rewards_may_leave_anything_in_a_record(make_run, tmp_path, name):
    async def solve(item, llm):
        await llm.chat([{"role": "user", "content": "2+2", "odd": ODD[name]}])
        if item.id == "sum-0":
            raise ValueError(ODD[name])
        return "4"

    run = make_run(name="run", workflow=solve, generations=2)
    for _ in range(2):
        await run.next_epoch()
    run.close()
    found = ft.Run.open(tmp_path / "run")
    assert [len(epoch.collection.trajectories) for epoch in found] == [5, 5]
    assert [len(epoch.collection.failures) for epoch in found] == [2, 2]
