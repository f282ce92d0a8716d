"""A run whose last weights were not saved goes back to the last epoch whose were; nothing recorded is lost or counted twice."""

import asyncio
import json
import shutil
import sqlite3
from contextlib import closing as closed

import killed
import pandas as pd
import pytest
from detached import Weights
from killed import record_of
from small_agents import guess, right

import finetune_nb as ft
from finetune_nb.store import checkpoints as rewind
from finetune_nb.store.store import RunStore
from finetune_nb.testing import sums


@pytest.fixture
def make_run(tmp_path, closing):
    def make(name="run", resume="auto", **options):
        settings = {"generations": 4, "output_dir": tmp_path, "curriculum": dict(expansion_interval=2), **options}
        return closing(ft.Run(guess, right, sums(6), adapter=Weights(), name=name, resume=resume, **settings))

    return make


async def left(make_run, tmp_path, epochs=5, weights_of=(0, 2), change_at=None):
    """A run whose process ended when only those epochs' weights were on the disk. Returns what it had recorded."""
    run = make_run()
    for index in range(epochs):
        if index == change_at:
            run.curriculum = {"percentile": 0.6}
        await run.next_epoch()
    await asyncio.to_thread(run.close)
    for index in set(range(epochs)) - set(weights_of):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"epoch-{index:06d}")
    return record_of(tmp_path / "run")


async def test_a_run_goes_on_behind_its_newest_weights_and_the_epochs_since_are_put_away_whole(
    make_run, tmp_path, caplog
):
    before = await left(make_run, tmp_path)
    run = make_run()
    assert len(run) == 5
    epoch = await run.next_epoch()
    assert (epoch.index, epoch.policy_versions) == (3, (3, 4))
    assert "epochs 3 to 4 are run again" in caplog.text and "archive" in caplog.text
    assert [e.index for e in run.records] == [0, 1, 2, 3] and run.next_index == 4
    await run.next_epoch()
    await asyncio.to_thread(run.close)
    assert record_of(tmp_path / "run") == before  # a repeat is equal here, so counting anything twice would show
    away = tmp_path / "archive" / "run-until-4"
    assert record_of(away) == before
    assert len(ft.Run.open(away).trajectories()) == 5 * 24
    table = ft.runs(tmp_path, archived=True)
    assert (table.run.tolist(), table.state.tolist(), table.epochs.tolist()) == (["run-until-4"], ["archived"], [5])
    (event,) = RunStore.open(tmp_path / "run").events("went_back")
    assert (event["behind"], event["last"], event["folder"]) == (2, 4, str(away))


async def test_logs_and_files_have_each_epoch_once_and_the_archive_has_those_before(make_run, tmp_path):
    await left(make_run, tmp_path)
    run = make_run()
    await run.next_epoch()
    for folder, count in ((tmp_path / "run", 4), (tmp_path / "archive" / "run-until-4", 5)):
        lines = (folder / "training_metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(count))
        assert len(pd.read_parquet(folder / "trajectories")) == 24 * count
    await run.next_epoch()
    assert len(ft.Run.open(tmp_path / "archive" / "run-until-4").trajectories()) == 5 * 24  # not written through


async def test_looking_and_chatting_take_nothing_out(make_run, tmp_path, caplog):
    before = await left(make_run, tmp_path)
    run = make_run()
    await run.chat("1+1")
    assert "Resuming from the weights after epoch 2" in caplog.text
    assert run._driver.adapter.policy.version == 3
    await asyncio.to_thread(run.close)
    assert record_of(tmp_path / "run") == before
    assert not (tmp_path / "archive").exists()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["epoch-000000", "epoch-000002"]


async def test_changes_made_since_are_pending_again(make_run, tmp_path):
    await left(make_run, tmp_path, change_at=4)
    run = make_run()
    assert run.curriculum.percentile == 0.6
    epoch = await run.next_epoch()
    assert (epoch.index, epoch.curriculum.percentile) == (3, 0.6)
    await asyncio.to_thread(run.close)
    journal = [(c.field, c.new, c.epoch) for c in RunStore.open(tmp_path / "run").journal()]
    assert journal == [("percentile", 0.6, 3), ("schedule", "manual", 3)]


async def test_another_process_that_follows_sees_the_run_go_back(make_run, tmp_path):
    await left(make_run, tmp_path)
    follower = RunStore.open(tmp_path / "run")
    assert len(follower.epochs) == 5
    await make_run().next_epoch()
    follower.refresh()
    assert [epoch.index for epoch in follower.epochs] == [0, 1, 2, 3]


async def test_a_fork_without_weights_of_its_own_goes_back_to_its_start(make_run, tmp_path):
    parent = make_run("parent")
    for _ in range(2):
        await parent.next_epoch()
    branch = parent.fork(epoch=1, name="branch", adapter=Weights())
    for _ in range(2):
        await branch.next_epoch()
    await asyncio.to_thread(branch.close)
    for index in (2, 3):
        shutil.rmtree(tmp_path / "branch" / "checkpoints" / f"epoch-{index:06d}")
    again = make_run("branch")
    epoch = await again.next_epoch()
    assert (epoch.index, epoch.policy_versions) == (2, (2, 3))
    assert len(ft.Run.open(tmp_path / "archive" / "branch-until-3")) == 2


async def test_without_any_weights_it_says_so_and_stays_as_it_is(make_run, tmp_path):
    before = await left(make_run, tmp_path, weights_of=())
    run = make_run()
    with pytest.raises(ft.RunError, match=r"none of its weights are kept .*start anew"):
        await run.next_epoch()
    assert record_of(tmp_path / "run") == before


@pytest.mark.parametrize("broken", ["copy_database", "_share"])
async def test_what_cannot_be_put_away_is_not_taken_out(make_run, tmp_path, monkeypatch, broken):
    before = await left(make_run, tmp_path)
    run = make_run()

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunStore if broken == "copy_database" else rewind, broken, full)
        with pytest.raises(OSError, match="No space left"):
            await run.next_epoch()
    assert record_of(tmp_path / "run") == before
    assert (await run.next_epoch()).index == 3
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["run-until-4"]


async def test_a_copy_is_made_where_files_cannot_have_two_names(make_run, tmp_path, monkeypatch):
    before = await left(make_run, tmp_path)

    def no_links(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(rewind.os, "link", no_links)
    await make_run().next_epoch()
    assert record_of(tmp_path / "archive" / "run-until-4") == before


@pytest.mark.slow
def test_killed_with_few_checkpoints_and_while_going_back(killer, tmp_path):
    def every_third(**task):
        return killer(folder=tmp_path, every=3, **task)

    (tmp_path / "straight").mkdir()
    assert killer(folder=tmp_path / "straight", every=3, after=120) == {"killed": False, "code": 0}
    straight = record_of(tmp_path / "straight" / "run")
    kills = [("append", "after", 3), ("job", "after", 5)]  # in an epoch whose predecessors have no weights
    kills += [(point, when, 1) for point in ("share", "move", "forget", "rewind") for when in ("before", "after")]
    for point, when, nth in kills:
        assert every_third(point=point, when=when, nth=nth)["killed"], (point, when)
        longest = 0
        for folder in [tmp_path / "run", *(tmp_path / "archive").glob("[!.]*")]:
            with closed(sqlite3.connect(f"file:{folder / 'run.db'}?mode=ro", uri=True)) as db:
                assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            found = record_of(folder)
            assert found == straight[: len(found)]
            longest = max(longest, len(found))
        assert longest > max(map(int, (tmp_path / "told").read_text().split()))
    assert every_third(after=120) == {"killed": False, "code": 0}
    assert record_of(tmp_path / "run") == straight
    for log in ("training_metrics", "trajectory_builder_run"):
        lines = (tmp_path / "run" / f"{log}.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(killed.EPOCHS))
    assert not list((tmp_path / "run").rglob(".*"))
    assert not list((tmp_path / "archive").glob(".*"))
