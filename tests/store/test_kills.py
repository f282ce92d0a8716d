"""Killed at any point, a run goes on with nothing lost and nothing twice, as if it had never been killed."""

import asyncio
import json
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import killed
import pytest
from detached import Detached
from killed import record_of

import finetune_nb as ft
from finetune_nb.store.store import RunStore

TOUCHING_AN_EPOCH = [
    "begin",
    "rollout",
    "collected",
    "submit",
    "submitted",
    "job",
    "waited",
    "validated",
    "log",
    "checkpoint",
    "file",
    "rename",
    "append",
    "prune",
]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """The record of a run that was left in peace."""
    folder = tmp_path_factory.mktemp("straight")

    async def run():
        whole = killed.make(folder, "local")
        while len(whole) < killed.EPOCHS:
            if len(whole) == 2:
                whole.curriculum = {"percentile": 0.6}
            await whole.next_epoch()
        await asyncio.to_thread(whole.close)

    asyncio.run(run())
    return record_of(folder / "run")


def check(folder):
    """The folder is whole, and what was told of is in it."""
    told = [int(line) for line in (folder / "told").read_text().split()] if (folder / "told").exists() else []
    assert sorted(set(told)) == sorted(told), "an epoch was told of twice"
    if not RunStore.exists(folder / "run"):
        assert not told
        return
    store = RunStore.open(folder / "run")
    assert [epoch.index for epoch in store.epochs] == list(range(len(store.epochs)))
    assert len(store.epochs) >= len(told)
    assert all(sum(map(len, epoch.collection.trajectories)) == 24 for epoch in store.epochs)
    store.partial()
    with closing(sqlite3.connect(f"file:{folder / 'run' / 'run.db'}?mode=ro", uri=True)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def check_whole(folder, straight):
    assert record_of(folder / "run") == straight
    for log in ("training_metrics", "trajectory_builder_run"):
        lines = (folder / "run" / f"{log}.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(killed.EPOCHS)), log
    lines = (folder / "run" / "validation_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 2, 4]
    journal = [(c.field, c.new, c.epoch) for c in RunStore.open(folder / "run").journal()]
    assert journal == [("percentile", 0.6, 2), ("schedule", "manual", 2)]
    assert not [path for path in (folder / "run").rglob(".*") if path.is_file()]


def go_through(killer, tmp_path, straight, tasks, whole=check_whole, **options):
    """Kills a run again and again, resumes it each time, and begins another once it is complete. Returns how many kills
    there were, and at which points. whole(folder, straight) checks a complete one; options are the killer's."""
    kills, reached, number = 0, set(), 0
    folder = tmp_path / "0"
    folder.mkdir()
    for task in tasks:
        ended = killer(folder=folder, **options, **task)
        assert ended["killed"] or ended["code"] == 0
        check(folder)
        if ended["killed"]:
            kills += 1
            reached.add(task.get("point", "any time"))
        else:
            whole(folder, straight)
            shutil.rmtree(folder)
            number += 1
            folder = tmp_path / str(number)
            folder.mkdir()
    ended = killer(folder=folder, **options, after=120)
    assert ended == {"killed": False, "code": 0}
    whole(folder, straight)
    return kills, reached


@pytest.mark.slow
def test_killed_once_in_every_phase_of_an_epoch(killer, tmp_path, never_killed):
    tasks = [{"point": "create", "when": when, "nth": 1} for when in ("before", "after")]
    tasks += [
        {"point": point, "when": when, "nth": 1 + (n + (when == "after")) % 2}
        for n, point in enumerate(TOUCHING_AN_EPOCH)
        for when in ("before", "after")
    ]
    kills, reached = go_through(killer, tmp_path, never_killed, tasks)
    assert kills >= 20
    assert reached >= {"create", *TOUCHING_AN_EPOCH} - {"validated", "prune"}


@pytest.mark.slow
def test_killed_at_sixty_random_points(killer, tmp_path, never_killed):
    rng = random.Random(5)
    tasks = []
    for n in range(90):
        if n % 3 == 0:
            tasks.append({"after": rng.uniform(0.01, 0.25)})
        else:
            point = rng.choice([*TOUCHING_AN_EPOCH, "create", "forget", "close"])
            nth = rng.randint(1, 40) if point == "rollout" else rng.randint(1, 2)
            tasks.append({"point": point, "when": rng.choice(["before", "after"]), "nth": nth})
    kills, reached = go_through(killer, tmp_path, never_killed, tasks)
    print(f"{kills} kills at {len(reached)} points")
    assert kills >= 60


# ── forks, archive, deletion ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    ("act", "point", "when"),
    [
        ("fork", "copy", "before"),
        ("fork", "copy", "after"),
        ("fork", "create", "before"),
        ("fork", "create", "after"),
        ("archive", "move", "before"),
        ("archive", "move", "after"),
        ("delete", "move", "before"),
        ("delete", "move", "after"),
        ("delete", "remove", "before"),
    ],
)
def test_what_is_done_with_a_run_is_done_or_not(killer, tmp_path, never_killed, act, point, when):
    killer(folder=tmp_path, after=120)
    ended = killer(folder=tmp_path, act=act, point=point, when=when, nth=1)
    assert ended["killed"]
    here, away = ft.runs(tmp_path), ft.runs(tmp_path, archived=True)
    assert here.error.isna().all() or act == "fork"
    if act == "fork":
        whole = here[here.error.isna()].run.tolist()
        assert whole == ["run"]  # it became a run at the very last
        assert killer(folder=tmp_path, act="fork", after=60)["code"] == 0
        assert len(ft.Run.open(tmp_path / "run")) == killed.EPOCHS
    elif act == "archive":
        assert [*here.run, *away.run] == ["run"]
        assert record_of((tmp_path if len(here) else tmp_path / "archive") / "run") == never_killed
    else:
        assert here.run.tolist() == (["run"] if (point, when) == ("move", "before") else [])
        if len(here):
            assert record_of(tmp_path / "run") == never_killed


# ── jobs that outlive the process ────────────────────────────────────────────────────────────────────────────────────


def jobs_of(folder):
    return [json.loads(path.read_text())["trajectories"] for path in sorted((folder / "backend").glob("*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "when"),
    [
        pytest.param("submitted", "after", marks=pytest.mark.proof),
        ("job", "before"),
        ("job", "after"),
        ("waited", "after"),
        ("log", "after"),
    ],
)
def test_a_job_that_outlives_its_process_is_asked_for_and_not_submitted_again(
    killer, tmp_path, never_killed, point, when
):
    for _ in range(3):
        ended = killer(folder=tmp_path, backend="detached", point=point, when=when, nth=2)
        assert ended["killed"]
        check(tmp_path)
    assert killer(folder=tmp_path, backend="detached", after=120)["code"] == 0
    found = record_of(tmp_path / "run")
    kept = [sum(1 for e in found if e["kept"])]
    assert [len(jobs_of(tmp_path))] == kept
    assert [{**e, "versions": None} for e in found] == [{**e, "versions": None} for e in never_killed]
    assert [e["versions"] for e in found] == [e["versions"] for e in never_killed]
    lines = (tmp_path / "run" / "training_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(killed.EPOCHS))
    assert all(epoch.seconds["rollouts"] > 0 for epoch in RunStore.open(tmp_path / "run").epochs)


def interrupted(killer, tmp_path):
    assert killer(folder=tmp_path, backend="detached", point="job", when="before", nth=1)["killed"]
    run = killed.make(tmp_path, "detached")
    assert len(run) == 0 and run.partial.metrics.trajectories == 24
    assert run.partial.selection.kept.size
    return run, run._driver.components.ready("trainer_adapter", "adapter")


async def test_a_job_that_failed_meanwhile_is_the_failed_job_of_its_epoch(killer, tmp_path):
    run, _ = interrupted(killer, tmp_path)
    path = tmp_path / "backend" / "000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "failed": True}))
    with pytest.raises(ft.JobFailed) as caught:
        await run.next_epoch()
    assert caught.value.epoch.index == 0 and len(run) == 1
    assert (await run.next_epoch()).index == 1
    await asyncio.to_thread(run.close)


async def test_a_job_that_is_gone_is_said_and_its_epoch_runs_anew(killer, tmp_path, caplog):
    run, adapter = interrupted(killer, tmp_path)
    (tmp_path / "backend" / "000.json").unlink()
    assert (await run.next_epoch()).index == 0
    assert "is run again" in caplog.text and "there is no job '000'" in caplog.text
    assert len(adapter.jobs()) == 1
    await asyncio.to_thread(run.close)


async def test_a_backend_that_cannot_be_reached_is_asked_again_and_gets_nothing_twice(killer, tmp_path):
    run, adapter = interrupted(killer, tmp_path)
    adapter.reachable = False
    for _ in range(2):
        with pytest.raises(ft.BackendError, match="does not answer"):
            await run.next_epoch()
    adapter.reachable = True
    assert (await run.next_epoch()).index == 0
    assert len(adapter.jobs()) == len(jobs_of(tmp_path)) == 1
    await asyncio.to_thread(run.close)


def test_a_change_that_was_pending_when_the_process_died_is_pending_again(killer, tmp_path):
    run = killed.make(tmp_path, "local")

    async def first():
        await run.next_epoch()
        run.curriculum = {"percentile": 0.9}
        await asyncio.to_thread(run.close)

    asyncio.run(first())
    again = killed.make(tmp_path, "local")
    assert again.curriculum.percentile == 0.9 and again._settings.applied.percentile == 0.3
    again.curriculum = {"random_subsample": 0.5}

    async def second():
        epoch = await again.next_epoch()
        assert (epoch.curriculum.percentile, epoch.curriculum.random_subsample) == (0.9, 0.5)
        await asyncio.to_thread(again.close)

    asyncio.run(second())
    journal = [(c.field, c.epoch) for c in RunStore.open(tmp_path / "run").journal()]
    assert journal == [("percentile", 1), ("schedule", 1), ("random_subsample", 1)]


async def test_a_process_killed_before_its_job_was_known_says_so(killer, tmp_path, caplog):
    assert killer(folder=tmp_path, backend="detached", point="submit", when="after", nth=1)["killed"]
    run = killed.make(tmp_path, "detached")
    await run.next_epoch()
    assert "may have been handed over" in caplog.text
    await asyncio.to_thread(run.close)


def test_adapters_of_these_tests_are_what_they_say():
    assert Detached.finds_jobs_again and not killed.Weights.finds_jobs_again
    assert Path(killed.__file__).exists()
