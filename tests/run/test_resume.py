"""A run outlives its process: what is on disk can be looked at and gone on with, as if nothing had happened."""

import asyncio
import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
from detached import Weights
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.errors import StoreError
from finetune_nb.examples import calculator
from finetune_nb.store.store import RunStore
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def make_run(tmp_path, closing):
    def make(name="kept", resume="auto", **options):
        adapter = FakeAdapter(policy=ScriptedPolicy(coin))
        settings = {"generations": 4, "output_dir": tmp_path, "curriculum": dict(expansion_interval=2), **options}
        return closing(ft.Run(guess, right, sums(6), adapter=adapter, name=name, resume=resume, **settings))

    return make


def rewards_of(run):
    return [epoch.statistics.rewards.tolist() for epoch in run.records]


async def test_a_run_opened_from_disk_shows_what_the_run_itself_showed(make_run, tmp_path):
    run = make_run(validation=sums(3, seed=9))
    for _ in range(3):
        await run.next_epoch()
    shown = [run.trajectories(), run.groups(), run.epochs()]
    run.close()
    opened = ft.Run.open(tmp_path / "kept")
    assert opened.id == "kept"
    for before, after in zip(shown, [opened.trajectories(), opened.groups(), opened.epochs()], strict=True):
        assert after.equals(before)
    assert opened.plot_rewards().axes
    assert "kept" in opened._repr_html_()
    assert "reward" in repr(opened[1])
    assert opened[0].collection.trajectories[0][0]._repr_html_()


async def test_looking_changes_nothing_in_the_folder(make_run, tmp_path):
    run = make_run()
    await run.next_epoch()
    run.close()

    def files():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted((tmp_path / "kept").rglob("*"))}

    before = files()
    opened = ft.Run.open(tmp_path / "kept")
    opened.trajectories(), repr(opened)
    opened.close()
    assert files() == before


async def test_weights_that_a_backend_still_holds_are_not_loaded_but_saved(tmp_path, closing):
    def make(adapter, every):
        run = ft.Run(
            guess, right, sums(6), generations=4, output_dir=tmp_path, adapter=adapter, name="kept", resume="auto"
        )
        run.config.run.checkpoint_every = every
        return closing(run)

    class Holding(Weights):
        async def holds_weights(self, version, job):
            self.asked, self.policy.version = (version, job), version
            return True

    first = make(Weights(), 0)
    for _ in range(2):
        await first.next_epoch()
    version = first[-1].policy_versions[1]
    first.close()
    holding = Holding()
    second = make(holding, 1)
    await second.rollout(0)
    assert holding.asked == (version, None)
    second.close()
    assert (tmp_path / "kept" / "checkpoints" / "epoch-000001").is_dir()
    third = make(Weights(), 1)
    assert (await third.next_epoch()).policy_versions[0] == version


async def test_restart_and_run_all_goes_on_as_if_never_stopped(make_run):
    straight = make_run("straight")
    for _ in range(5):
        await straight.next_epoch()
    first = make_run()
    for _ in range(2):
        await first.next_epoch()
    first.close()
    second = make_run()
    assert len(second) == 2
    for _ in range(3):
        await second.next_epoch()
    assert rewards_of(second) == rewards_of(straight)
    assert [e.curriculum for e in second.records] == [e.curriculum for e in straight.records]
    assert [e.index for e in second.records] == list(range(5))


async def test_without_resume_a_new_run_begins(make_run):
    first = make_run()
    await first.next_epoch()
    first.close()
    again = make_run(resume="never")
    assert (again.id, len(again)) == ("kept-2", 0)


async def test_resume_wants_a_name_and_a_known_word(make_run):
    with pytest.raises(ft.ConfigError, match="give it one"):
        make_run(name=None)
    with pytest.raises(ft.ConfigError, match="'never' or 'auto'"):
        make_run(resume="always")


async def test_a_manual_percentile_and_its_journal_survive(make_run, tmp_path):
    first = make_run()
    await first.next_epoch()
    first.curriculum = dict(percentile=0.7)
    await first.next_epoch()
    first.close()
    second = make_run()
    assert (second.curriculum.schedule, second.curriculum.percentile) == ("manual", 0.7)
    second.curriculum = dict(schedule="automatic")
    await second.next_epoch()
    second.close()
    journal = RunStore.open(tmp_path / "kept").journal()
    assert [(c.field, c.new, c.epoch) for c in journal] == [
        ("percentile", 0.7, 1),
        ("schedule", "manual", 1),
        ("schedule", "automatic", 2),
    ]


async def test_opening_a_run_that_lives_here_gives_the_live_one(make_run, tmp_path):
    run = make_run()
    await run.next_epoch()
    assert ft.Run.open(tmp_path / "kept") is run
    run.close()
    assert ft.Run.open(tmp_path / "kept") is not run


async def test_an_opened_run_goes_on_when_its_functions_are_passed_again(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(sums(6)))
    options = {"name": "a", "output_dir": tmp_path, "training": {"learning_rate": 1e-3}, "generations": 2}
    pytest.importorskip("torch")
    run = ft.Run(guess, right, tmp_path / "train.json", sampling={"max_tokens": 4}, deterministic=True, **options)
    await run.next_epoch()
    await asyncio.to_thread(run.close)
    looking = ft.Run.open(tmp_path / "a")
    with pytest.raises(ft.ConfigError, match="Pass it again"):
        await looking.next_epoch()
    async with ft.Run.open(tmp_path / "a", workflow=guess, reward=right) as again:
        assert (await again.next_epoch()).index == 1
    assert ft.Run.open(tmp_path / "a") is looking and len(looking) == 2


async def test_a_run_of_strange_components_can_be_read_and_says_why_it_cannot_go_on(make_run, tmp_path):
    run = make_run()
    await run.next_epoch()
    run.close()
    config = tmp_path / "kept" / "config.yml"
    config.write_text(config.read_text().replace("epoch_trainer", "their_trainer"))
    opened = ft.Run.open(tmp_path / "kept")
    assert len(opened.trajectories()) == 24
    with pytest.raises(ft.RunError, match="their_trainer"):
        await opened.next_epoch()


async def test_a_folder_without_a_run_is_a_clear_error(tmp_path):
    with pytest.raises(StoreError, match="run.db"):
        ft.Run.open(tmp_path)


async def test_a_folder_that_was_moved_is_the_same_run(make_run, tmp_path):
    run = make_run()
    await run.next_epoch()
    run.close()
    (tmp_path / "kept").rename(tmp_path / "elsewhere")
    opened = ft.Run.open(tmp_path / "elsewhere")
    assert len(opened.trajectories()) == 24


async def test_a_folder_that_the_first_schema_wrote_is_read_as_it_is_and_gone_on_with(make_run, tmp_path):
    with zipfile.ZipFile(Path(__file__).parents[1] / "data" / "run_of_schema_1.zip") as file:
        file.extractall(tmp_path)

    def version():
        with contextlib.closing(sqlite3.connect(tmp_path / "old" / "run.db")) as db:
            return db.execute("PRAGMA user_version").fetchone()[0]

    found = ft.Run.open(tmp_path / "old")
    assert len(found.trajectories()) == 3 * 24 and found.partial is None and found.plot_rewards().axes
    assert [(c.field, c.new, c.epoch) for c in found.changes] == [("percentile", 0.6, 2), ("schedule", "manual", 2)]
    assert version() == 1
    options = {"validation": sums(3, seed=9), "validation_interval": 2}
    again = make_run("old", **options)
    assert again.curriculum.percentile == 0.6
    assert (await again.next_epoch()).index == 3
    again.close()
    assert version() == 3
    straight = make_run("new", **options)
    for index in range(4):
        if index == 2:
            straight.curriculum = {"percentile": 0.6}
        await straight.next_epoch()
    assert ft.Run.open(tmp_path / "old") is found
    assert rewards_of(found) == rewards_of(straight)


async def test_an_epoch_that_cannot_be_stored_is_kept_and_stored_later(make_run, tmp_path, caplog, monkeypatch):
    run = make_run()
    await run.next_epoch()
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "append", lambda *_: (_ for _ in ()).throw(StoreError("the disk is full")))
        epoch = await run.next_epoch()
    assert epoch.metrics.trajectories == 24
    assert "not stored" in caplog.text
    await run.next_epoch()
    run.close()
    assert len(ft.Run.open(tmp_path / "kept")) == 3


async def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_rollout(make_run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = make_run(output_dir=tmp_path / "file")
    with pytest.raises(StoreError):
        await run.next_epoch()
    assert len(run) == 0


async def test_the_runs_of_a_directory_are_a_table_newest_first_and_a_damaged_one_stays_in_it(make_run, tmp_path):
    assert ft.runs(tmp_path).empty
    for name in ("first", "second"):
        run = make_run(name)
        await run.next_epoch()
        run.close()
    await make_run("second").next_epoch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.db").write_bytes(b"no database")
    (tmp_path / "no run").mkdir()
    table = ft.runs(tmp_path)
    assert table.run.tolist() == ["second", "first", "broken"]
    assert table.epochs.tolist()[:2] == [2, 1]
    assert table.state.tolist()[:2] == ["ready", "closed"]
    assert (table["size"][:2] > 1_000).all()
    assert table.last_reward.notna().tolist() == [True, True, False]
    assert "database" in table.error[2]


# ── other processes ──────────────────────────────────────────────────────────────────────────────────────────────────

SCRIPT = textwrap.dedent(
    """
    import asyncio, sys
    sys.path.insert(0, {support!r})
    import finetune_nb as ft
    from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
    from small_agents import coin, guess, right

    async def main():
        adapter = FakeAdapter(policy=ScriptedPolicy(coin), delay=0.01)
        run = ft.Run(guess, right, sums(6), adapter=adapter, name="kept", resume="auto", output_dir={folder!r},
                     generations=4, curriculum=dict(expansion_interval=2))
        print("ready", flush=True)
        while len(run) < {epochs}:
            print((await run.next_epoch()).index, flush=True)
        run.close()

    asyncio.run(main())
    """
)


def start(tmp_path, epochs):
    script = SCRIPT.format(support=str(SUPPORT), folder=str(tmp_path), epochs=epochs)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.proof
async def test_two_processes_do_not_write_one_run(make_run, tmp_path):
    process = start(tmp_path, 10_000)
    try:
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "0\n"
        run = make_run()
        assert len(run) >= 1  # to look at, it is open to all
        with pytest.raises(StoreError, match=str(process.pid)):
            await run.next_epoch()
        seen = len(run)
        process.stdout.readline()
        run.refresh()
        assert len(run) > seen
    finally:
        process.kill()
        process.wait()
    count = len(RunStore.open(tmp_path / "kept").epochs)
    assert (await make_run().next_epoch()).index == count  # the lock of a dead process is free


@pytest.mark.slow
def test_the_demo_killed_and_resumed_gives_the_same_rewards_as_never_killed(tmp_path):
    pytest.importorskip("torch")
    script = textwrap.dedent(
        """
        import asyncio, sys
        import finetune_nb as ft
        async def main():
            run = ft.Run.from_config({config!r}, name=sys.argv[1], resume="auto", finetuning__output_dir={folder!r})
            while len(run) < 5:
                print((await run.next_epoch()).index, flush=True)
            run.close()
        asyncio.run(main())
        """
    ).format(config=str(calculator.CONFIG), folder=str(tmp_path))

    def begin(name):
        return subprocess.Popen([sys.executable, "-c", script, name], stdout=subprocess.PIPE, text=True)

    straight = begin("straight")
    straight.communicate(timeout=300)
    assert straight.returncode == 0
    rng = random.Random(1)
    for _ in range(3):
        process = begin("killed")
        process.stdout.readline()  # an epoch more each time
        time.sleep(rng.uniform(0.0, 2.5))
        process.kill()
        process.wait()
        found = ft.Run.open(tmp_path / "killed")
        assert [epoch.index for epoch in found.records] == list(range(len(found)))
        assert len(found.trajectories()) == 320 * len(found)
    process = begin("killed")
    process.communicate(timeout=300)
    assert process.returncode == 0
    a, b = ft.Run.open(tmp_path / "straight"), ft.Run.open(tmp_path / "killed")
    assert rewards_of(a) == rewards_of(b)
    assert [e.train_metrics["loss"] for e in a.records] == [e.train_metrics["loss"] for e in b.records]
