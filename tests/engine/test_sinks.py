"""Metrics sinks: what they are told, and that none of them can hold a run up."""

from __future__ import annotations

import json
import math
import threading
import time
from types import SimpleNamespace

import pytest
from factories import make_epoch

import finetune_nb as ft
from finetune_nb.config import CurriculumSettings
from finetune_nb.engine.sinks import JsonlSink, MetricsSink, SinkDispatcher, WandbSink, metrics_of
from finetune_nb.testing import FakeAdapter, ScriptedBuilder


class Tracker:
    """A module with wandb's shape, as far as it goes: init returns a run with log and finish."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []

    def init(self, project=None, name=None, config=None, **options):
        run = SimpleNamespace(project=project, name=name, config=config, options=options, logged=[], finished=0)
        run.log = lambda metrics, step=None: run.logged.append((step, metrics))
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        self.runs.append(run)
        return run


class Broken:
    """A sink that fails at everything it is told of."""

    def __init__(self, where: str = "log") -> None:
        self.where = where

    def begin(self, run_id, config):
        self._fail("begin")

    def log(self, epoch, metrics):
        self._fail("log")

    def end(self):
        self._fail("end")

    def _fail(self, where):
        if where == self.where:
            raise OSError("no route to the tracker")


def run_with(tmp_path, *sinks, **options):
    builder = ScriptedBuilder(lambda epoch: {"a": [1.0, 0.0], "b": [1.0, 1.0]})
    return ft.Run(builder=builder, adapter=FakeAdapter(), sinks=sinks, name="sums", output_dir=tmp_path, **options)


async def test_a_tracker_of_wandbs_shape_sees_every_epoch_in_order_and_the_end(tmp_path):
    tracker = Tracker()
    async with run_with(tmp_path, WandbSink(tracker, project="p", resume="allow")) as run:
        for _ in range(3):
            await run.next_epoch()
    (seen,) = tracker.runs
    assert (seen.project, seen.name, seen.options, seen.finished) == ("p", "sums", {"resume": "allow"}, 1)
    assert [step for step, _ in seen.logged] == [0, 1, 2]
    assert seen.logged[0][1]["reward/mean"] == 0.75
    assert seen.logged[0][1]["train/loss"] == 0.0
    assert seen.config["finetuning"]["enabled"] is True


async def test_a_run_of_a_tracker_that_was_begun_elsewhere_is_taken_as_it_is(tmp_path):
    tracker = Tracker()
    begun = tracker.init("mine")
    async with run_with(tmp_path) as run:
        await run.next_epoch()
        run.sinks.append(WandbSink(begun))
        await run.next_epoch()
    assert [step for step, _ in begun.logged] == [1]  # it came late
    assert len(tracker.runs) == begun.finished == 1


async def test_jsonl_lines_say_whose_they_are(tmp_path):
    path = tmp_path / "all.jsonl"
    async with run_with(tmp_path, JsonlSink(path)) as run:
        await run.next_epoch()
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["run"], line["epoch"], line["groups/with_spread"]) == ("sums", 0, 1)


@pytest.mark.parametrize("where", ["begin", "log", "end"])
async def test_a_failing_sink_is_a_warning_and_no_failed_epoch(where, tmp_path, caplog):
    tracker = Tracker()
    async with run_with(tmp_path, Broken(where), WandbSink(tracker)) as run:
        for _ in range(3):
            await run.next_epoch()
        assert len(run) == 3 and run.error is None
    assert len(tracker.runs[0].logged) == 3
    (said,) = [record.getMessage() for record in caplog.records if "Broken" in record.getMessage()]  # once, not thrice
    assert "no route to the tracker" in said and "the run continues" in said
    if where != "end":
        assert any("no route to the tracker" in str(event) for event in ft.Run.open(run.folder)._stored().events("log"))


def test_a_hanging_sink_holds_nothing_up_and_is_left_behind(caplog):
    released = threading.Event()
    slow = SimpleNamespace(begin=lambda *_: None, log=lambda *_: released.wait(30), end=lambda: None)
    outlets = SinkDispatcher([slow], "run", dict)
    started = time.monotonic()
    for index in range(3):
        outlets.recorded(make_epoch([[1, 0]], index))
    assert time.monotonic() - started < 5
    outlets.close(0.1)
    assert "abandoned" in caplog.text
    released.set()


def test_what_is_missing_is_left_out_and_never_zero():
    epoch = make_epoch([[None]], job=None, scores={"odd": math.inf})
    found = metrics_of(epoch)
    assert not {"reward/mean", "validation/reward", "curriculum/percentile", "score/odd"} & found.keys()
    assert found["groups/all"] == 1
    full = make_epoch([[1, 0]], settings=CurriculumSettings(True, 0.5), validation=0.25, train={"kl": 0.1})
    found = metrics_of(full)
    assert (found["validation/reward"], found["curriculum/percentile"], found["train/kl"]) == (0.25, 0.5, 0.1)


def test_a_tracker_of_another_shape_is_named():
    with pytest.raises(ft.ConfigError, match="found dict; expected a module with init"):
        WandbSink({})
    assert isinstance(WandbSink(Tracker()), MetricsSink) and isinstance(JsonlSink("x"), MetricsSink)
