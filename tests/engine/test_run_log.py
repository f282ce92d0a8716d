"""What is logged while a run is at work stands in that run's log, and in no other's."""

import asyncio
import logging

import pytest
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.redaction import remember_secret
from finetune_nb.store.store import RunStore
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums


def make(name, tmp_path, workflow):
    adapter = FakeAdapter(policy=ScriptedPolicy(coin))
    return ft.Run(workflow, right, sums(3), adapter=adapter, name=name, generations=2, output_dir=tmp_path)


def texts(folder):
    return [event["text"] for event in RunStore.open(folder).events("log")]


async def test_each_run_has_its_own_log_and_it_names_no_secret(tmp_path, caplog):
    remember_secret("hunter2-secret")

    async def one(question, llm):
        raise ValueError("first: hunter2-secret")

    async def two(question, llm):
        await asyncio.sleep(0.01)
        return await asyncio.to_thread(lambda: 1 / 0)

    async with make("one", tmp_path, one) as first, make("two", tmp_path, two) as second:
        await asyncio.gather(first.next_epoch(), second.next_epoch())
    of_first, of_second = texts(tmp_path / "one"), texts(tmp_path / "two")
    assert any("ValueError: first: **********" in text for text in of_first)
    assert any("ZeroDivisionError" in text for text in of_second)
    assert not any("ZeroDivisionError" in text for text in of_first)
    assert not any("ValueError" in text for text in of_second)
    assert "hunter2" not in (tmp_path / "one" / "log.jsonl").read_text()


async def test_a_log_that_cannot_be_written_does_not_stop_an_epoch(tmp_path, monkeypatch, caplog):
    async def fails(question, llm):
        raise ValueError("no")

    monkeypatch.setattr(RunStore, "record_event", lambda *_, **__: (_ for _ in ()).throw(ft.StoreError("full")))
    async with make("one", tmp_path, fails) as run:
        assert (await run.next_epoch()).metrics.failures == 6
    assert "an event could not be stored" in caplog.text


async def test_errors_and_aborts_are_events(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeAdapter, "submit", lambda *_: 1 / 0)
    async with make("one", tmp_path, guess) as run:
        with pytest.raises(ZeroDivisionError):
            await run.next_epoch()
    (event,) = RunStore.open(tmp_path / "one").events("failed")
    assert event["error"] == "ZeroDivisionError: division by zero"
    assert logging.getLogger("finetune_nb").handlers


@pytest.mark.parametrize("length", [10, 30_000])
async def test_the_last_words_are_read_from_the_end(tmp_path, length):
    run = make("one", tmp_path, guess)
    await run.next_epoch()
    store = run._stored()
    for number in range(20):
        store.record_event("log", text=f"{number} {'é' * length}")
    with (run.folder / "log.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "kind": "cut')
    everything = store.events()
    assert store.events(last=5) == everything[-5:]
    assert store.events(last=10_000) == everything
    assert store.events(last=0) == []
    assert [line.split()[2] for line in run.log_lines(3)] == ["17", "18", "19"]
    run.close()
