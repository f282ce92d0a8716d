"""A run in the background: started, paused, stopped, aborted, waited for and steered; interrupts; tripwires."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from agents import guess, right
from detached import Weights
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune_nb as ft
from finetune_nb.errors import RunError
from finetune_nb.states import ACTIVE, MOVES, Standing
from finetune_nb.testing import sums
from finetune_nb.tripwires import spread_below, tripped, validation_falls


@pytest.fixture
def make_run(tmp_path, closing):
    def make(workflow=guess, **options):
        settings = {"generations": 4, "output_dir": tmp_path, "adapter": Weights(), "name": "live", **options}
        return closing(ft.Run(workflow, right, sums(6), **settings))

    return make


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=200, deadline=None)
@given(moves=st.lists(st.sampled_from(sorted(MOVES)), max_size=30))
def test_every_move_is_one_of_the_table_or_an_error_that_changes_nothing(moves):
    standing = Standing()
    for move in moves:
        before = standing.state
        if before in MOVES[move]:
            assert standing.move(move) is MOVES[move][before] is standing.state
        else:
            with pytest.raises(RunError, match=f"the run is {before}"):
                standing.move(move)
            assert standing.state is before
    assert standing.active == (standing.state in ACTIVE)


# ── start, pause, stop, abort ────────────────────────────────────────────────────────────────────────────────────────


def test_epochs_run_in_the_background_and_wait_waits_for_them(make_run):
    run = make_run()
    run.start(epochs=3)
    assert run.state == "running" and run.planned == 3
    assert run.wait() is run
    assert (len(run), run.state) == (3, "ready")
    run.start(epochs=2)
    run.wait()
    assert [epoch.index for epoch in run] == [0, 1, 2, 3, 4]


def test_what_is_planned_is_what_start_runs_by_itself(make_run):
    run = make_run(num_epochs=2)
    run.start()
    run.wait()
    assert len(run) == 2
    with pytest.raises(RunError, match=r"run\.start\(epochs=5\)"):
        run.start()


def test_calls_that_do_not_fit_are_clear_errors(make_run):
    run = make_run()
    for call in (run.pause, run.resume, run.stop, run.abort):
        with pytest.raises(RunError, match="the run is new"):
            call()
    run.start(epochs=50)
    with pytest.raises(RunError, match="the run is running"):
        run.start()
    with pytest.raises(RunError, match="the run is running"):
        ft.run_sync(run.next_epoch())
    with pytest.raises(RunError, match="Only a run that is paused"):
        run.resume()
    run.stop()
    run.stop()
    run.wait()
    run.close()
    with pytest.raises(RunError, match="closed"):
        run.start()


def test_a_paused_run_holds_still_and_goes_on_where_it_was(make_run):
    run = make_run()
    run.start(epochs=4)
    until(lambda: len(run) >= 1)
    run.pause()
    until(lambda: run.state == "paused")
    count, done = len(run), run.progress.done
    time.sleep(0.2)
    assert (len(run), run.progress.done, run.wait(timeout=0.05) is run) == (count, done, True)
    run.resume()
    run.wait()
    assert [epoch.index for epoch in run] == [0, 1, 2, 3]
    assert run.epochs().mean_reward.notna().all()


def test_a_pause_lets_rollouts_in_flight_end_and_no_other_begin(make_run):
    begun, free = [], threading.Event()

    async def slow(question, llm):
        begun.append(question)
        await asyncio.to_thread(free.wait)
        return await guess(question, llm)

    run = make_run(slow, max_concurrency=3)
    run.start(epochs=1)
    until(lambda: len(begun) == 3)
    run.pause()
    free.set()
    until(lambda: run.state == "paused" and run.progress.done == 3)
    time.sleep(0.1)
    assert len(begun) == 3
    run.resume()
    run.wait()
    assert len(begun) == 24 and len(run) == 1


def test_stop_ends_behind_the_epoch_also_out_of_a_pause(make_run):
    run = make_run()
    run.start(epochs=100)
    until(lambda: len(run) >= 2)
    run.stop()
    run.wait()
    count = len(run)
    assert 2 <= count < 100 and run.partial is None and run.notice is None
    run.start(epochs=100)
    run.pause()
    until(lambda: run.state == "paused")
    run.stop()
    run.wait()
    assert run.state == "ready" and len(run) <= count + 1


@pytest.mark.parametrize("hangs", ["async", "in a thread of its own"])
def test_an_abort_ends_at_once_and_keeps_what_was_collected(make_run, hangs):
    entered = threading.Event()
    last = sums(6)[5]["question"]

    async def hang(question, llm):
        reply = await guess(question, llm)
        if question == last:
            entered.set()
            await asyncio.sleep(60)
        return reply

    def hang_in_thread(question, llm):
        reply = llm.chat([{"role": "user", "content": question}]).content
        if question == last:
            entered.set()
            time.sleep(3)
        return reply

    run = make_run(hang if hangs == "async" else hang_in_thread)
    run.start(epochs=5)
    assert entered.wait(10)
    until(lambda: run.progress.done >= 20)
    began = time.monotonic()
    run.abort()
    run.wait()
    assert time.monotonic() - began < 2
    assert (run.state, len(run)) == ("ready", 0)
    assert run.partial.metrics.trajectories >= 20


async def test_an_abort_from_elsewhere_is_an_error_of_the_cell_that_waits(make_run):
    async def hang(question, llm):
        await asyncio.sleep(60)

    run = make_run(hang)
    task = asyncio.create_task(run.next_epoch())
    while run.state != "running" or not run.progress.total:
        await asyncio.sleep(0.01)
    run.abort()
    with pytest.raises(ft.EpochAborted, match="run.partial"):
        await task
    assert run.state == "ready"


def test_an_error_is_shown_raised_by_the_waits_and_no_end(make_run):
    adapter = Weights()
    run = make_run(adapter=adapter)
    real, adapter.submit = adapter.submit, lambda *_: 1 / 0
    run.start(epochs=3)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run.wait()
    assert run.state == "failed" and "ZeroDivisionError" in run.error and "ZeroDivisionError" in repr(run)
    assert any("failed" in line and "ZeroDivisionError" in line for line in run.log_lines())
    adapter.submit = real
    run.start(epochs=1)
    run.wait()
    assert (run.state, run.error) == ("ready", None)


async def test_waiting_in_a_cell_does_not_block_its_loop(make_run):
    run, ticks = make_run(), []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    run.start(epochs=3)
    assert await run.wait_async() is run
    ticking.cancel()
    assert len(run) == 3 and len(ticks) > 3


def test_closing_a_running_run_ends_it(make_run):
    run = make_run()
    run.start(epochs=1000)
    until(lambda: len(run) >= 1)
    run.close()
    assert run.state == "closed"
    assert len(ft.Run.open(run.folder)) >= 1


# ── steering ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_while_it_runs_is_used_by_the_next_selection_and_journaled(make_run):
    run = make_run(curriculum=dict(initial_percentile=0.3))
    run.start(epochs=200)
    until(lambda: len(run) >= 2)
    run.curriculum = {"percentile": 0.8}
    until(lambda: run.journal().epoch.notna().all())
    used = int(run.journal().epoch[0])
    until(lambda: len(run) > used)
    run.stop()
    run.wait()
    assert [run[used - 1].curriculum.percentile, run[used].curriculum.percentile] == [0.3, 0.8]


def test_a_setting_of_the_curriculum_switches_it_on(make_run):
    run = make_run()
    assert not run.curriculum.enabled
    run.curriculum = {"enabled": False, "percentile": 0.2}
    assert not run.curriculum.enabled
    run.curriculum = {"percentile": 0.4}
    ft.run_sync(run.next_epoch())
    assert run[0].curriculum.enabled and run[0].curriculum.percentile == 0.4
    assert len(run[0].selection.kept) < run[0].metrics.groups_with_spread


def test_live_fields_reach_the_components_at_their_safe_point_and_survive(make_run, tmp_path):
    run = make_run()
    assert run.live["builder.num_generations"] == 4 and run.live["llm.temperature"] == 1.0
    run.live = {"builder.num_generations": 2, "llm.max_tokens": 1}
    ft.run_sync(run.next_epoch())
    assert run[0].metrics.trajectories == 12
    assert {len(t.episode[-1].logprobs) for g in run[0].collection.trajectories for t in g} == {1}
    for wrong in (
        {"percentile": 0.5},
        {"builder.num_generations": 0},
        {"llm.temperatur": 1},
        {"llm.temperature": "hot"},
    ):
        with pytest.raises(ft.ConfigError):
            run.live = wrong
    run.close()
    again = make_run(resume="auto")
    assert again.live["builder.num_generations"] == 2 == ft.Run.open(run.folder).live["builder.num_generations"]
    ft.run_sync(again.next_epoch())
    assert again[1].metrics.trajectories == 12
    assert again.journal().field.tolist() == ["builder.num_generations", "llm.max_tokens"]


def test_a_tripwire_pauses_the_run_with_its_reason(make_run):
    run = make_run(validation=sums(3), validation_interval=1)
    run.tripwires += [lambda epoch: epoch.index == 1 and "the second epoch is enough"]
    run.start(epochs=5)
    until(lambda: run.state == "paused")
    assert len(run) == 2 and "the second epoch is enough" in run.notice
    run.resume()
    run.wait()
    assert len(run) == 5


def test_tripwires_say_what_they_found():
    from factories import make_epoch

    flat = make_epoch([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert "only 1 of 3 groups teach" in tripped([spread_below(0.5)], [flat])
    assert tripped([spread_below(0.3)], [flat]) is None
    falling = [make_epoch([[1.0, 0.0]], index=i, validation=v) for i, v in enumerate([0.9, 0.8, 0.7])]
    assert "fell 2 times" in tripped([validation_falls(2)], falling)
    assert tripped([validation_falls(3)], falling) is None
    assert "raised ZeroDivisionError" in tripped([lambda epoch: 1 / 0], falling)
    for wrong in (lambda: spread_below(0), lambda: validation_falls(0)):
        with pytest.raises(ft.ConfigError):
            wrong()


# ── interrupts, in a script ──────────────────────────────────────────────────────────────────────────────────────────

SCRIPT = textwrap.dedent(
    """
    import asyncio, sys
    sys.path.insert(0, {tests!r})
    import finetune_nb as ft
    from finetune_nb.testing import sums
    from agents import guess, right
    from detached import Weights

    async def slow(question, llm):
        await asyncio.sleep(0.2)
        return await guess(question, llm)

    run = ft.Run(slow, right, sums(6), adapter=Weights(), output_dir={folder!r}, name="live", max_concurrency=4)

    async def loop():
        while True:
            print("epoch", (await run.next_epoch()).index, flush=True)

    try:
        print("ready", flush=True)
        {body}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(run.state, len(run), run.partial is not None, flush=True)
    """
)
BODIES = {
    "wait": "run.start(epochs=50); run.wait()",
    "wait_async": "run.start(epochs=50); asyncio.run(run.wait_async())",
    "next_epoch": "asyncio.run(loop())",
}


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("mode", BODIES)
def test_the_first_interrupt_ends_behind_the_epoch_the_second_at_once(tmp_path, mode, presses):
    script = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(tmp_path), body=BODIES[mode])
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.0)
    began = time.monotonic()
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = process.communicate(timeout=30)
    lines = out.splitlines()
    assert "interrupt again to abort" in err
    if presses == 1:
        assert lines[-1] == "ready 1 False"
        assert ("interrupted" in lines) == (mode == "next_epoch")
    else:
        assert lines[-1] == "ready 0 True" and "interrupted" in lines
        assert time.monotonic() - began < 6
