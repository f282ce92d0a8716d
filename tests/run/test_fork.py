"""A run can branch off, be put away, be deleted, and be followed from elsewhere."""

import asyncio
import json
import os
import shutil
import threading
import time

import pytest
from detached import Detached, Weights
from small_agents import guess, right

import finetune_nb as ft
from finetune_nb.engine.observer import TrainerObserver
from finetune_nb.errors import StoreError
from finetune_nb.store.folder import WriteLock
from finetune_nb.store.runs import delete_run
from finetune_nb.store.store import RunStore
from finetune_nb.testing import sums


@pytest.fixture
def make_run(tmp_path, closing):
    def make(name="first", adapter=None, **options):
        settings = {"generations": 4, "output_dir": tmp_path, "curriculum": dict(expansion_interval=2), **options}
        return closing(ft.Run(guess, right, sums(6), adapter=adapter or Weights(), name=name, **settings))

    return make


async def epochs(run, count):
    for _ in range(count):
        await run.next_epoch()
    return run


def rewards_of(run):
    return {epoch.index: epoch.statistics.rewards.tolist() for epoch in run.records}


# ── forks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fork_goes_on_behind_an_epoch_with_its_weights_and_the_same_examples(make_run, tmp_path):
    run = await epochs(make_run(), 5)
    async with run.fork(epoch=2, adapter=Weights()) as again:
        assert (len(again), again.folder) == (0, tmp_path / "first-fork")
        await epochs(again, 2)
        assert [epoch.index for epoch in again.records] == [3, 4]
        assert [epoch.policy_versions for epoch in again.records] == [(3, 4), (4, 5)]
        assert [epoch.curriculum for epoch in again.records] == [epoch.curriculum for epoch in run.records[3:]]
        assert rewards_of(again) == {index: run_rewards for index, run_rewards in rewards_of(run).items() if index > 2}
        found = ft.compare([run, again])
        assert (found.differences[0].mean, found.differences[0].pairs) == (0.0, 12)
    assert len(run) == 5


async def test_a_fork_with_another_percentile_selects_by_it_and_says_so_in_its_journal(make_run):
    run = await epochs(make_run(), 3)
    async with run.fork(epoch=0, curriculum=dict(percentile=0.9), adapter=Weights(), name="more") as more:
        assert (more.id, more.curriculum.percentile, more.curriculum.schedule) == ("more", 0.9, "manual")
        epoch = await more.next_epoch()
        assert epoch.curriculum.percentile == 0.9
        assert len(epoch.selection.kept) > len(run[1].selection.kept)
        journal = more.journal()[["source", "field", "old", "new", "epoch"]].values.tolist()
        assert journal == [["fork", "percentile", 0.3, 0.9, 1], ["fork", "schedule", "automatic", "manual", 1]]
        assert str(more.journal().time.dtype).endswith("UTC]")
    assert run.curriculum.schedule == "automatic" and run.journal().empty
    assert list(run.journal().columns) == ["time", "source", "field", "old", "new", "epoch"]


async def test_a_fork_knows_its_parent_also_from_disk_and_can_be_gone_on_with(make_run, tmp_path):
    run = await epochs(make_run(), 2)
    again = run.fork(adapter=Weights())
    await again.next_epoch()
    await asyncio.to_thread(again.close)
    table = ft.runs(tmp_path).set_index("run")
    assert (table.parent["first-fork"], table.parent_epoch["first-fork"]) == ("first", 1)
    opened = ft.Run.open(tmp_path / "first-fork")
    assert (len(opened), opened[2].index, opened[-1].index) == (1, 2, 2)
    resumed = make_run("first-fork", resume="auto")
    assert (await resumed.next_epoch()).index == 3
    assert resumed[3].policy_versions == (3, 4)


async def test_epochs_are_found_by_their_number_also_in_a_fork(make_run):
    run = await epochs(make_run(), 4)
    async with run.fork(epoch=1, adapter=Weights()) as again:
        await epochs(again, 3)
        assert [epoch.index for epoch in again] == [2, 3, 4]
        assert [epoch.index for epoch in again[2:4]] == [2, 3]
        assert [epoch.index for epoch in again[-2:]] == [3, 4]
        with pytest.raises(IndexError, match="epochs 2 to 4"):
            again[1]
        with pytest.raises(IndexError):
            again[5]


async def test_a_fork_shares_nothing_that_is_written(make_run):
    run = await epochs(make_run(), 3)
    await asyncio.to_thread(run.close)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    async with run.fork(epoch=1, adapter=Weights(), training=None) as again:
        await epochs(again, 2)
        (again.folder / "checkpoints" / "epoch-000001" / "version").write_text("99")
    after = {path: path.read_bytes() for path in before}
    assert after == before
    assert again.config is not run.config
    assert again.config.finetuning.run_configuration.config_file is again.config
    assert run.config.finetuning.run_configuration.config_file is run.config
    inodes = {path.stat().st_ino for path in run.folder.rglob("*") if path.is_file()}
    assert not inodes & {path.stat().st_ino for path in again.folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.proof
async def test_a_fork_of_the_embedded_model_trains_other_settings_on_the_same_weights(tmp_path):
    pytest.importorskip("torch")
    options = {"output_dir": tmp_path, "generations": 2, "sampling": {"max_tokens": 4}, "deterministic": True}

    async def attempt(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    async with ft.Run(attempt, lambda item: float(len(str(item.output_obj))), sums(4), name="a", **options) as run:
        await epochs(run, 2)
        async with run.fork(epoch=0) as same, run.fork(epoch=0, training={"learning_rate": 1e-5}, name="slow") as slow:
            await epochs(same, 1)
            await epochs(slow, 1)
            assert same[1].statistics.rewards.tolist() == run[1].statistics.rewards.tolist()
            assert same[1].train_metrics["loss"] == run[1].train_metrics["loss"]
            assert slow[1].statistics.rewards.tolist() == run[1].statistics.rewards.tolist()
            assert slow.config.trainer_adapters["adapter"].learning_rate == 1e-5
            assert run.config.trainer_adapters["adapter"].learning_rate == 5e-4
        with pytest.raises(ft.ConfigError, match="learning_rat"):
            run.fork(training={"learning_rat": 1})


async def test_what_cannot_be_forked_says_why_and_leaves_no_folder(make_run, tmp_path):
    run = make_run()
    with pytest.raises(ft.RunError, match="no epoch to continue from"):
        run.fork(adapter=Weights())
    await epochs(run, 2)
    with pytest.raises(ft.RunError, match="has the epochs 0 to 1"):
        run.fork(epoch=7, adapter=Weights())
    with pytest.raises(ft.ConfigError, match=r"fork\(adapter=...\)"):
        run.fork()
    with pytest.raises(ft.ConfigError, match="percentil"):
        run.fork(curriculum=dict(percentil=0.5), adapter=Weights())
    with pytest.raises(ft.ConfigError, match="run name"):
        run.fork(name="../out", adapter=Weights())
    shutil.rmtree(run.folder / "checkpoints" / "epoch-000000")
    with pytest.raises(ft.RunError, match="of epochs 1. Fork from one of these"):
        run.fork(epoch=0, adapter=Weights())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]


async def test_the_checkpoint_that_a_fork_began_with_is_kept(make_run):
    run = make_run()
    run.config.run.keep_checkpoints = 1
    await epochs(run, 1)
    run.fork(epoch=0, adapter=Weights()).close()
    await epochs(run, 3)
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["epoch-000000", "epoch-000003"]
    run.close()
    resumed = make_run(resume="auto")
    resumed.config.run.keep_checkpoints = 1
    await resumed.next_epoch()
    assert (run.folder / "checkpoints" / "epoch-000000").exists()


async def test_small_checkpoints_are_all_kept_and_their_size_is_shown(make_run):
    run = make_run()
    assert str(run.folder) in run._repr_html_()
    await epochs(run, 5)
    assert len(list((run.folder / "checkpoints").iterdir())) == 5
    assert "of which 5 checkpoints 0.0 MB" in run._repr_html_()


async def test_an_epoch_that_died_in_its_training_shows_what_was_chosen(make_run, monkeypatch):
    monkeypatch.setattr("finetune_nb.engine.run_writer.WORTH_KEEPING_SECONDS", 0.0)
    run = make_run(adapter=Weights(delay=60))
    task = asyncio.create_task(run.next_epoch())
    while run.partial is None or run.partial.selection.inferred or not len(run.partial.selection.kept):
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    partial = run.partial
    assert set(map(str, partial.selection.left_out())) <= {"no_reward_spread", "beyond_percentile"}
    assert partial.statistics.counts.sum() == 24 and partial.reason.endswith("its job is out")


async def test_how_a_job_stands_is_in_the_folder_while_it_runs_and_is_written_when_it_changes(
    make_run, tmp_path, monkeypatch
):
    backend = Detached(tmp_path / "backend", seconds=0.1)
    told, real = [], RunStore.record_status

    def record_status(store, index, status):
        real(store, index, status)
        told.append((index, str(status.status), str(RunStore.open(store.folder).partial().status.status)))

    monkeypatch.setattr(RunStore, "record_status", record_status)
    await epochs(make_run(adapter=backend), 2)
    assert told == [(index, status, status) for index in range(2) for status in ("running", "completed")]


async def test_a_link_in_a_checkpoint_is_not_followed(make_run, tmp_path):
    run = await epochs(make_run(), 1)
    secret = tmp_path / "secret"
    secret.write_text("1")
    version = run.folder / "checkpoints" / "epoch-000000" / "version"
    version.unlink()
    version.symlink_to(secret)
    with pytest.raises(StoreError, match="symbolic link"):
        run.fork(adapter=Weights())
    assert not (tmp_path / "first-fork").exists()


async def test_fewer_checkpoints_than_epochs_still_resume_after_an_orderly_end(make_run):
    run = make_run()
    run.config.run.checkpoint_every = 3
    await epochs(run, 3)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["epoch-000000"]
    with pytest.raises(ft.RunError, match="of epochs 0"):
        run.fork(epoch=1, adapter=Weights())
    await asyncio.to_thread(run.close)
    resumed = make_run(resume="auto")
    assert (await resumed.next_epoch()).policy_versions == (3, 4)


# ── put away, deleted ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_archived_run_is_out_of_the_way_and_can_still_be_opened(make_run, tmp_path):
    run = await epochs(make_run(), 2)
    await epochs(make_run("second"), 1)
    shown = run.trajectories()
    place = await asyncio.to_thread(run.archive)
    assert place == tmp_path / "archive" / "first"
    assert ft.runs(tmp_path).run.tolist() == ["second"]
    away = ft.runs(tmp_path, archived=True)
    assert (away.run.tolist(), away.state.tolist()) == (["first"], ["archived"])
    assert run.trajectories().equals(shown)
    assert ft.Run.open(place).trajectories().equals(shown)
    again = await epochs(make_run("first"), 1)
    assert again.folder == tmp_path / "first"
    assert (await asyncio.to_thread(again.archive, False)).name == "first-2"
    assert not (tmp_path / "archive" / "first-2" / "checkpoints").exists()


async def test_a_deleted_run_is_gone_and_nothing_else(make_run, tmp_path):
    run, other = await epochs(make_run(), 1), await epochs(make_run("second"), 1)
    await asyncio.to_thread(run.delete)
    assert [path.name for path in tmp_path.iterdir()] == ["second"]
    await other.next_epoch()
    with pytest.raises(StoreError):
        run.delete()


async def test_a_run_that_somebody_writes_is_neither_deleted_nor_moved(make_run, tmp_path):
    run = await epochs(make_run(), 1)
    with pytest.raises(StoreError, match=f"being written by process {os.getpid()}"):
        delete_run(run.folder)
    assert (tmp_path / "first" / "run.db").exists()
    await run.next_epoch()


# ── following ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_writes_a_run_is_said_and_is_free_when_it_ends(make_run, tmp_path):
    run = await epochs(make_run(), 1)
    await asyncio.to_thread(run.close)
    opened = ft.Run.open(tmp_path / "first")
    assert (opened.writer, opened.state) == (None, "ready")
    lock = WriteLock(opened.folder)
    assert opened.writer.startswith(f"process {os.getpid()} on ")
    assert opened.writer in repr(opened) and opened.writer in opened._repr_html_()
    lock.release()
    assert opened.writer is None


async def test_a_run_whose_process_died_in_an_epoch_is_interrupted(make_run, tmp_path):
    run = await epochs(make_run(), 1)
    await asyncio.to_thread(run.close)
    with RunStore.open(run.folder, write=True) as store:
        store.set_state("running")
        store.begin_epoch(1, 0.0, 1)
        assert ft.runs(tmp_path).state.tolist() == ["running"]
    assert ft.runs(tmp_path).state.tolist() == ["interrupted"]
    assert ft.Run.open(run.folder).state == "interrupted"


async def test_settings_that_another_kernel_changed_meanwhile_are_taken_over(make_run, tmp_path):
    first = await epochs(make_run(), 1)
    await asyncio.to_thread(first.close)
    here = make_run(resume="auto")
    there = make_run("first", resume="auto")
    there.curriculum = dict(percentile=0.8)
    await there.next_epoch()
    await asyncio.to_thread(there.close)
    here.refresh()
    assert (len(here), here.curriculum.percentile) == (2, 0.8)
    assert (await here.next_epoch()).curriculum.percentile == 0.8


# ── an epoch that did not finish ────────────────────────────────────────────────────────────────────────────


async def test_an_aborted_epoch_can_be_looked_at(make_run, tmp_path):
    waiting = asyncio.Event()

    async def slow(question, llm):
        reply = (await llm.chat([{"role": "user", "content": question}])).content
        if question == sums(6)[5]["question"]:
            waiting.set()
            await asyncio.sleep(60)
        return reply

    run = ft.Run(slow, right, sums(6), adapter=Weights(), generations=2, output_dir=tmp_path, name="first")
    assert run.partial is None
    task = asyncio.create_task(run.next_epoch())
    while not waiting.is_set() or run.progress.done < 10:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(200):
        if run.partial is not None and run.partial.metrics.trajectories:
            break
        await asyncio.sleep(0.02)
    partial = run.partial
    assert (partial.index, partial.metrics.trajectories) == (0, 10)
    assert set(partial.selection.left_out()) == {"undecided"}
    assert "did not finish" in partial.reason
    assert "not scored" in partial.collection.trajectories[0][0].metadata["reward_error"]
    frame = run.trajectories(partial=True)
    assert len(frame) == 10 and frame.reward.isna().all()
    assert run.trajectories().empty
    assert partial._repr_html_() and repr(partial)
    await asyncio.to_thread(run.close)
    assert ft.Run.open(tmp_path / "first").partial.metrics.trajectories == 10


async def test_rollouts_go_into_the_folder_while_others_are_still_running(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_nb.engine.observer.KEEP_EVERY", 0.05)
    seen = []

    async def one_waits(question, llm):
        reply = (await llm.chat([{"role": "user", "content": question}])).content
        if question == sums(6)[5]["question"]:
            while not seen:
                await asyncio.sleep(0.01)
        return reply

    run = ft.Run(one_waits, right, sums(6), adapter=Weights(), generations=2, output_dir=tmp_path, name="first")
    task = asyncio.create_task(run.next_epoch())
    looking = None
    while not seen:
        await asyncio.sleep(0.02)
        if RunStore.exists(tmp_path / "first"):
            looking = RunStore.open(tmp_path / "first").partial()
            if looking and sum(map(len, looking.collection.trajectories)) == 10:
                seen.append(looking)
    epoch = await task
    assert epoch.metrics.trajectories == 12
    assert run.partial is None
    await asyncio.to_thread(run.close)


async def test_an_epoch_that_is_run_again_stands_in_the_logs_once(make_run, tmp_path, monkeypatch):
    run = await epochs(make_run(validation=sums(3, seed=9), validation_interval=1), 1)
    with monkeypatch.context() as patch:
        patch.setattr(TrainerObserver, "record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await run.next_epoch()
    assert run.state == "failed"
    await run.next_epoch()
    for log in ("training_metrics", "validation_metrics", "trajectory_builder_first"):
        lines = (run.folder / f"{log}.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0, 1], log


async def test_an_abort_while_an_epoch_is_recorded_leaves_it_recorded(make_run, monkeypatch):
    run = await epochs(make_run(), 1)
    begun, append = threading.Event(), RunStore.append

    def slowly(*args):
        begun.set()
        time.sleep(0.3)
        return append(*args)

    monkeypatch.setattr(RunStore, "append", slowly)
    task = asyncio.create_task(run.next_epoch())
    await asyncio.to_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while run.state == "running":
        await asyncio.sleep(0.01)
    assert len(run) == 2 and run.partial is None
    assert (await run.next_epoch()).index == 2
