"""Full disks, damaged and hostile folders, strange texts and secrets, at the level of a Run: nothing recorded is lost, what is
wrong is said, and nothing outside the folder is touched.
"""

import asyncio
import errno
import os
import sqlite3
from contextlib import closing, suppress

import pandas as pd
import pytest
from detached import Weights
from small_agents import guess, right

import finetune_nb as ft
from finetune_nb import frames
from finetune_nb.errors import StoreError
from finetune_nb.redaction import remember_secret
from finetune_nb.store import folder as run_folder
from finetune_nb.store.store import RunStore
from finetune_nb.testing import sums


@pytest.fixture
def make_run(tmp_path, closing):
    def make(name="run", resume="auto", workflow=guess, reward=right, rows=None, **options):
        settings = {"generations": 2, "output_dir": tmp_path, "adapter": Weights(), **options}
        return closing(ft.Run(workflow, reward, rows or sums(3), name=name, resume=resume, **settings))

    return make


async def three_epochs(make_run, tmp_path):
    run = make_run()
    for _ in range(3):
        await run.next_epoch()
    await asyncio.to_thread(run.close)
    return tmp_path / "run"


# ── full disks ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
async def test_a_disk_that_fills_up_costs_no_epoch(make_run, tmp_path, monkeypatch, call):
    run = make_run()
    await run.next_epoch()
    real, failing = getattr(os, call), []

    def full(*args, **kwargs):
        if failing and (call != "open" or args[1] & os.O_WRONLY):
            failing.append(call)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(run_folder.os, call, full)
    failing.append("from here")
    for _ in range(2):
        with suppress(StoreError):  # an epoch that cannot begin says so, and what is in memory stays there
            await run.next_epoch()
    reached = len(failing) > 1
    kept = len(run)
    failing.clear()
    await run.next_epoch()
    assert len(run) == kept + 1 >= 3
    await asyncio.to_thread(run.close)
    found = ft.Run.open(tmp_path / "run")
    assert [epoch.index for epoch in found] == list(range(kept + 1))
    assert len(found.trajectories()) == 6 * (kept + 1)
    assert reached or call == "write"  # only the log is written so


@pytest.mark.slow
@pytest.mark.proof
async def test_a_database_that_cannot_grow_costs_no_epoch(make_run, tmp_path, caplog):
    run = make_run()
    await run.next_epoch()
    db = run._driver.writer.store._db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    seen = 1
    for _ in range(4):
        with suppress(StoreError):
            await run.next_epoch()
            seen += 1
    assert "full" in caplog.text
    db.execute("PRAGMA max_page_count = 1000000")
    await run.next_epoch()
    assert len(run) == seen + 1
    await asyncio.to_thread(run.close)
    assert len(ft.Run.open(tmp_path / "run")) == seen + 1


# ── damaged folders ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_damaged_file_costs_its_own_trajectories_and_says_so(make_run, tmp_path):
    folder = await three_epochs(make_run, tmp_path)
    path = folder / "trajectories" / "epoch-000001.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    run = ft.Run.open(folder)
    assert len(run.epochs()) == len(run) == 3
    assert run.plot_rewards().axes and len(run.groups()) == 9
    assert "epoch 1" in repr(run[1])
    assert len(frames.trajectories([run[0], run[2]])) == 12
    with pytest.raises(StoreError, match="epoch-000001.parquet.*The trajectories of epoch 1 are lost"):
        run.trajectories()
    resumed = make_run()
    assert (await resumed.next_epoch()).index == 3


@pytest.mark.parametrize("share", [0.3, 0.95])
async def test_a_truncated_database_is_a_clear_error_and_stays_as_it_is(make_run, tmp_path, share):
    path = await three_epochs(make_run, tmp_path) / "run.db"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    for attempt in (lambda: ft.Run.open(tmp_path / "run").records, make_run):
        with pytest.raises(StoreError, match=r"run\.db"):
            attempt()
    assert path.stat().st_size == int(len(whole) * share)
    assert ft.runs(tmp_path).error.str.contains("run.db").all()


async def test_a_run_of_a_newer_schema_is_left_alone(make_run, tmp_path):
    path = await three_epochs(make_run, tmp_path) / "run.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
        db.commit()
    for attempt in (lambda: ft.Run.open(tmp_path / "run"), make_run):
        with pytest.raises(StoreError, match="Update finetune_nb"):
            attempt()


# ── strange texts ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_lone_surrogates_and_nul_come_back_as_they_were(make_run, tmp_path):
    rows = [{"id": f"q\0{i}\ud800", "question": f"{i}+1 \ud83d\0", "answer": "\udfff\0"} for i in range(3)]

    async def strange(question, llm, item):
        reply = await llm.chat([{"role": "user", "content": question.split()[0]}])
        if item.id.startswith("q\x002"):
            raise ValueError("half \ud800 and nothing \0")
        return reply.content

    run = make_run(workflow=strange, reward=lambda item: float(len(item.output_obj)), rows=rows)
    await run.next_epoch()
    live = [run.trajectories(), run.groups(), run.epochs()]
    (failed,) = {failure.error for failure in run[0].collection.failures}
    await asyncio.to_thread(run.close)
    found = ft.Run.open(tmp_path / "run")
    for before, after in zip(live, [found.trajectories(), found.groups(), found.epochs()], strict=True):
        pd.testing.assert_frame_equal(after, before)
    assert {failure.error for failure in found[0].collection.failures} == {failed}
    assert "\ud800" in failed and found[0].statistics.example_ids[0] == "q\x000\ud800"
    assert found._repr_html_() and found[0]._repr_html_()


# ── paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["../out", "a/b", "..", ".", "/tmp/out", "-x", "", "a\0b", "x" * 101])
async def test_a_name_that_leads_elsewhere_is_refused(make_run, tmp_path, name):
    for resume in ("auto", "never"):
        with pytest.raises(ft.ConfigError, match="run name"):
            make_run(name=name, resume=resume)
    assert list(tmp_path.iterdir()) == []


async def test_a_config_that_points_elsewhere_is_not_followed(make_run, tmp_path):
    folder = await three_epochs(make_run, tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    config = folder / "config.yml"
    text = config.read_text()
    assert str(tmp_path) in text
    config.write_text(text.replace(str(tmp_path), str(outside)))
    with closing(sqlite3.connect(folder / "run.db")) as db:
        db.execute("UPDATE epochs SET state = json_set(state, '$.checkpoint', '../../outside')")
        db.commit()
    run = ft.Run.open(folder, workflow=guess, reward=right, dataset=sums(3), trust=True)
    assert run.folder == folder
    with pytest.raises((StoreError, ft.RunError)):
        run.fork(adapter=Weights(), name="../outside/x")
    with pytest.raises(ft.FinetuneError):
        await run.next_epoch()
    await asyncio.to_thread(run.close)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("place", ["trajectories", "checkpoints", "training_metrics.jsonl", "log.jsonl", "lock"])
async def test_a_link_in_the_folder_is_not_written_through(make_run, tmp_path, place):
    folder = await three_epochs(make_run, tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    kept = outside / "kept"
    kept.write_text("mine")
    path = folder / place
    if path.is_dir():
        for inside in path.iterdir():
            os.rename(inside, outside / inside.name)
        path.rmdir()
        path.symlink_to(outside)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(kept)
    before = sorted(p.name for p in outside.iterdir())
    run = make_run()
    for work in (run.next_epoch(), asyncio.to_thread(run.close)):
        with suppress(StoreError):
            await work
    assert kept.read_text() == "mine"
    assert sorted(p.name for p in outside.iterdir()) == before


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def everything_in(folder):
    """All that a run has written down, as text."""
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            yield path, pd.read_parquet(path).to_json(default_handler=str)
        elif path.suffix == ".db":
            with closing(sqlite3.connect(path)) as db:
                yield path, "\n".join(db.iterdump())
        if path.is_file():
            yield path, path.read_bytes().decode("latin-1")


async def test_after_a_run_with_secrets_a_search_over_its_folder_finds_none(make_run, tmp_path):
    secret = "sk-hunter2-0123456789"
    remember_secret(secret)
    tries = []

    async def leaky(question, llm):
        tries.append(question)
        if len(tries) % 3 == 0:
            raise PermissionError(f"401: key {secret} was refused")
        reply = await llm.chat([{"role": "system", "content": f"use {secret}"}, {"role": "user", "content": question}])
        return f"{reply.content} {secret}"

    def reward(item):
        if item.output_obj.startswith("1"):
            raise ValueError(f"cannot score {item.output_obj}")
        return float(len(item.output_obj))

    adapter = Weights()
    adapter.policy.script = lambda messages, seed: f"{seed % 20} {secret}"
    adapter.message = f"the backend was told {secret}"
    run = make_run(workflow=leaky, reward=reward, adapter=adapter, generations=6)
    for _ in range(2):
        await run.next_epoch()
    run.archive()
    found = [path for path, text in everything_in(tmp_path) if "hunter2" in text]
    assert found == []
    assert RunStore.open(tmp_path / "archive" / "run").epochs


class WithLLM(ft.FunctionBaseConfig, name="function_that_names_its_llm"):
    llm: str = "policy"


async def test_secrets_of_a_config_are_not_in_the_folder_not_even_of_an_epoch_that_was_cut_off(
    tmp_path, monkeypatch, closing
):
    literal, variable = "sk-literal-hunter2", "sk-variable-hunter2"
    monkeypatch.setenv("JUDGE_TOKEN", variable)

    async def leaky(question, llm, item):
        await llm.chat([{"role": "user", "content": question}, {"role": "system", "content": f"{literal} {variable}"}])
        if item.id == "sum-1":
            raise PermissionError(f"401: {variable}")
        return f"{literal} {variable}"

    made = closing(ft.Run(leaky, right, sums(6), adapter=Weights(), generations=2, output_dir=tmp_path, name="run"))
    judge = {"_type": "openai", "model_name": "m", "base_url": "http://127.0.0.1:9", "api_key": literal}
    other = {**judge, "api_key": "${JUDGE_TOKEN}"}
    made.config.workflow = WithLLM()
    made.config.llms |= ft.load_config({"llms": {"judge": judge, "other": other}}).llms
    await made.next_epoch()

    made._driver.writer.store.begin_epoch(1, 0.0, None)
    made._driver.writer.store.add_rollouts(1, made[0].collection, whole=True)
    begun = RunStore.open(made.folder).partial().collection
    rollouts = begun.model_dump_json() + repr(begun.failures)
    texts = [*(text for _, text in everything_in(made.folder)), rollouts, repr(made), made._repr_html_()]
    assert [text[:80] for text in texts if "hunter2" in text] == []
    assert "***" in rollouts and len(begun.failures) == 2
