"""Whatever code of a user's raises or returns, wherever a run calls it: the run lives, says what happened, and the next
epoch is recorded."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import finetune_nb as ft
from finetune_nb.rollouts.trajectory_builder import EvalTrajectoryBuilder, EvalTrajectoryBuilderConfig
from finetune_nb.testing import FakeAdapter, sums
from finetune_nb.training.trainer import EpochTrainer, EpochTrainerConfig


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Exiting(Exception):
    def __str__(self):
        sys.exit("no text")


class Odd(BaseException):
    """As pytest's own Failed and Skipped: an outcome that is no Exception."""


class Shy:
    """A value that can be neither shown, compared, counted nor converted."""

    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __bool__ = __float__ = __hash__ = __len__ = __repr__  # type: ignore[assignment]

    def __eq__(self, other):
        raise RuntimeError("no comparison")


def raises(make: Callable[[], BaseException]) -> Callable[[], Any]:
    def act():
        raise make()

    return act


def chained() -> BaseException:
    error = ValueError("outer")
    error.__cause__ = error.__context__ = error
    return error


KINDS: dict[str, Callable[[], Any]] = {
    "ValueError": raises(lambda: ValueError("no idea")),
    "an error without text": raises(Speechless),
    "an error that exits": raises(Exiting),
    "its own cause": raises(chained),
    "SystemExit": raises(lambda: SystemExit(2)),
    "sys.exit with a text": lambda: sys.exit("no grader for this row"),
    "KeyboardInterrupt": raises(KeyboardInterrupt),
    "CancelledError": raises(asyncio.CancelledError),
    "GeneratorExit": raises(GeneratorExit),
    "StopIteration": raises(StopIteration),
    "StopAsyncIteration": raises(StopAsyncIteration),
    "a BaseException": raises(Odd),
    "pytest.fail": lambda: pytest.fail("not good enough"),
    "a BaseExceptionGroup": raises(lambda: BaseExceptionGroup("two", [SystemExit(1), ValueError("x")])),
    "an ExceptionGroup": raises(lambda: ExceptionGroup("two", [TypeError("y"), ValueError("x")])),
    "TimeoutError": raises(TimeoutError),
    "MemoryError": raises(MemoryError),
    "RecursionError": raises(RecursionError),
    "AssertionError": raises(AssertionError),
    "surrogates": raises(lambda: ValueError("\udcff\x00\x1b[31m")),
    "a shy value": Shy,
    "an exception": lambda: ValueError("returned"),
    "bytes": lambda: b"\xff\x00",
    "a generator": lambda: (i for i in range(3)),
    "a type": lambda: dict,
    "a nested list": lambda: [[[{"a": {1, 2}}]]],
    "infinity": lambda: float("inf"),
    "a huge integer": lambda: 10**400,
}
EVERY_PLACE = ("SystemExit", "CancelledError", "a shy value")
"""The kinds that the fast suite tries."""


class Hostile:
    """Makes the parts of a run, of which one misbehaves as long as `active`."""

    def __init__(self, place: str, act: Callable[[], Any]) -> None:
        self.place, self.act, self.active = place, act, True
        self.asked = 0

    def at(self, place: str, otherwise: Any) -> Any:
        if place == self.place and self.active:
            self.asked += 1
            return self.act()
        return otherwise() if callable(otherwise) else otherwise

    def parts(self) -> dict[str, Any]:
        hostile = self

        async def workflow(question, llm):
            reply = (await llm.chat([{"role": "user", "content": question}])).content
            if hostile.place == "a task that cancels itself" and hostile.active:
                hostile.asked += 1
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
            return hostile.at("workflow, async", reply)

        def blocking_workflow(question, llm):
            reply = llm.chat([{"role": "user", "content": question}]).content
            return hostile.at("workflow, sync", reply)

        async def reward(item):
            return hostile.at("reward, async", 1.0)

        def blocking_reward(item):
            return hostile.at("reward, sync", float(len(item.id)))

        class Evaluator:
            async def evaluate(self, eval_input):
                scored = [
                    ft.EvalOutputItem(id=item.id, score=1.0, reasoning={}, error=None)
                    for item in eval_input.eval_input_items
                ]
                return hostile.at("evaluator", lambda: ft.EvalOutput(average_score=1.0, eval_output_items=scored))

        class Builder(EvalTrajectoryBuilder):
            async def start_run(self, run_id, meta=None):
                await super().start_run(run_id, meta)
                hostile.at("builder.start_run", None)

            async def run_eval(self):
                output = await super().run_eval()
                hostile.at("builder.run_eval", None)
                return output

            async def finalize(self, run_id, meta=None):
                collection = await super().finalize(run_id, meta)
                return hostile.at("builder.finalize", lambda: collection)

            async def compute_reward(self, output_item, meta=None):
                return hostile.at("builder.compute_reward", 1.0)

            def log_progress(self, run_id, metrics, output_dir=None):
                hostile.at("builder.log_progress", None)

        class Adapter(FakeAdapter):
            async def submit(self, trajectories):
                ref = await super().submit(trajectories)
                return hostile.at("adapter.submit", lambda: ref)

            async def wait_until_complete(self, ref, poll_interval=10.0):
                status = await super().wait_until_complete(ref, poll_interval)
                return hostile.at("adapter.wait_until_complete", lambda: status)

            async def save_checkpoint(self, directory):
                hostile.at("adapter.save_checkpoint", None)

            def log_progress(self, ref, metrics, output_dir=None):
                hostile.at("adapter.log_progress", None)

        class Trainer(EpochTrainer):
            def apply_curriculum_learning(self, trajectory_collection, epoch):
                selected = super().apply_curriculum_learning(trajectory_collection, epoch)
                return hostile.at("trainer.apply_curriculum_learning", lambda: selected)

        place = hostile.place
        return {
            "workflow": blocking_workflow if place == "workflow, sync" else workflow,
            "reward": {"reward, async": reward, "evaluator": Evaluator()}.get(place, blocking_reward),
            "builder": Builder(EvalTrajectoryBuilderConfig(num_generations=2)),
            "adapter": Adapter(),
            "trainer": Trainer(EpochTrainerConfig()),
        }

    def tripwire(self, epoch):
        return self.at("tripwire", None)

    def begin(self, run_id, config):
        self.at("sink.begin", None)

    def log(self, epoch, metrics):
        self.at("sink.log", None)

    def end(self):
        self.at("sink.end", None)


PLACES = [
    "workflow, async",
    "workflow, sync",
    "a task that cancels itself",
    "reward, async",
    "reward, sync",
    "evaluator",
    "builder.start_run",
    "builder.run_eval",
    "builder.finalize",
    "builder.compute_reward",
    "builder.log_progress",
    "adapter.submit",
    "adapter.wait_until_complete",
    "adapter.save_checkpoint",
    "adapter.log_progress",
    "trainer.apply_curriculum_learning",
    "tripwire",
    "sink.begin",
    "sink.log",
]


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def survives(place: str, kind: str, folder) -> str:
    """Runs two epochs, of which the first meets the hostile code; returns what the run said of it."""
    hostile = Hostile(place, KINDS[kind])
    name = f"{PLACES.index(place)}-{list(KINDS).index(kind)}"
    run = ft.Run(dataset=sums(2), output_dir=folder, name=name, item_timeout=5, **hostile.parts())
    run.tripwires.append(hostile.tripwire)
    run.sinks.append(hostile)
    said = []
    try:
        run.start(1)
        until(lambda: run.state != "running")
        if run.state == "paused":  # by a tripwire that raised
            said.append(str(run.notice))
            run.resume()
        try:
            run.wait(20)
        except Exception as error:
            said.append(f"{type(error).__name__}: {_text(error)}")
        assert run.state not in ("running", "stopping", "aborting"), f"{place}, {kind}: it is still {run.state}"
        before = len(run)

        if place.startswith("sink"):  # it has a thread of its own
            until(lambda: hostile.asked)
        hostile.active = False
        ft.run_sync(asyncio.wait_for(run.next_epoch(), 20))
        assert len(run) == before + 1, f"{place}, {kind}: the next epoch is not recorded"
        said += [str(run.notice or ""), *run.log_lines()]
        said += [str(error) for error in run.trajectories().error.dropna()]
    finally:
        run.close()
    assert len(ft.Run.open(folder / name)) == before + 1
    assert hostile.asked, f"{place} was never asked"
    return " ".join(said)


def _text(error: BaseException) -> str:
    with contextlib.suppress(BaseException):
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("kind", EVERY_PLACE)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_survives_whatever_user_code_raises_or_returns(place, kind, tmp_path):
    survives(place, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_kind_of_exception_and_value_is_survived(place, tmp_path):
    for kind in KINDS:
        survives(place, kind, tmp_path)


def test_what_was_raised_is_said_where_people_look(tmp_path):
    assert "SystemExit: 2" in survives("workflow, async", "SystemExit", tmp_path)
    assert "no grader for this row" in survives("builder.finalize", "sys.exit with a text", tmp_path)
    assert "cancelled from inside" in survives("a task that cancels itself", "ValueError", tmp_path)
    assert "tripwire tripwire" in survives("tripwire", "a BaseException", tmp_path)
    assert "not good enough" in survives("adapter.submit", "pytest.fail", tmp_path)
