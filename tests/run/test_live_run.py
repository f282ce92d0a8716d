"""A run in the background: started, paused, stopped, aborted, waited for and steered; interrupts; tripwires."""

import asyncio
import dataclasses
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from detached import Weights
from hypothesis import given, settings
from hypothesis import strategies as st
from small_agents import guess, right

import finetune_nb as ft
from finetune_nb.engine.state import ACTIVE, MOVES, RunState
from finetune_nb.errors import RunError
from finetune_nb.testing import sums
from finetune_nb.tripwires import (
    entropy_below,
    length_explains_reward,
    replies_cut,
    spread_below,
    tripped,
    validation_falls,
)

SUPPORT = Path(__file__).parents[1] / "support"


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
    standing = RunState()
    for move in moves:
        before = standing.state
        if before in MOVES[move]:
            assert standing.transition(move) is MOVES[move][before] is standing.state
        else:
            with pytest.raises(RunError, match=f"the run is {before}"):
                standing.transition(move)
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


def test_nothing_validates_beside_a_running_epoch(make_run):
    run = make_run()
    run.start(epochs=50)
    with pytest.raises(RunError, match="the run is running"):
        ft.run_sync(run.validate())
    run.stop()
    run.wait()


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
    assert time.monotonic() - began < 5, "seconds; 0.1 to 1.2 on an idle machine"
    until(lambda: run.state == "ready")
    assert len(run) == 0
    assert run.partial.metrics.trajectories >= 20


def test_an_abort_right_after_the_start_ends_the_run_too(make_run):
    run = make_run()
    for _ in range(20):
        run.start(epochs=5)
        run.abort()
        until(lambda: run.state == "ready")
    before = len(run)  # on a busy machine an epoch may have finished before it was aborted
    run.start(epochs=1)
    run.wait()
    assert len(run) == before + 1


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
    run = make_run(curriculum=dict(initial_percentile=0.3, expansion_interval=1000))
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


def test_tripwires_of_entropy_length_and_cut_replies_say_what_they_found():
    from factories import make_epoch

    epoch = make_epoch([[1.0, 0.0]] * 4)  # 8 rollouts

    def with_metrics(**metrics):
        return [dataclasses.replace(epoch, metrics=dataclasses.replace(epoch.metrics, **metrics))]

    low = with_metrics(mean_entropy=0.02)
    assert tripped([entropy_below(0.05)], low) == "the policy's entropy is 0.02 nats a token, less than 0.05"
    assert tripped([entropy_below(0.02)], low) is None
    assert tripped([entropy_below(9)], [epoch]) is None  # none was recorded
    longer = with_metrics(length_correlation=0.9)
    assert "explains 81% of what rewards differ by" in tripped([length_explains_reward(0.8)], longer)
    assert "(longer is better)" in tripped([length_explains_reward(0.8)], longer)
    assert "(shorter is better)" in tripped([length_explains_reward(0.8)], with_metrics(length_correlation=-0.9))
    assert tripped([length_explains_reward(0.82)], longer) is None
    assert tripped([length_explains_reward(0.1)], [epoch]) is None  # too few lengths differ
    cut = with_metrics(replies_cut=2)
    assert tripped([replies_cut(0.2)], cut) == "2 of 8 replies were cut at the token limit; more than 20 %"
    assert tripped([replies_cut(0.25)], cut) is None
    assert tripped([replies_cut(0)], with_metrics(replies_cut=None)) is None  # an older record


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        *((entropy_below, wrong) for wrong in (0, -1, float("nan"), "0.1", True, None)),
        *((length_explains_reward, wrong) for wrong in (0, 1.5, float("nan"), "0.1", None)),
        *((replies_cut, wrong) for wrong in (-0.1, 1, float("nan"), "0.1", None)),
    ],
)
def test_a_tripwire_refuses_what_is_no_limit(make, wrong):
    with pytest.raises(ft.ConfigError, match=f"{make.__name__}: .* is {wrong!r}; expected a number"):
        make(wrong)


# ── interrupts, in a script ──────────────────────────────────────────────────────────────────────────────────────────

SCRIPT = textwrap.dedent(
    """
    import asyncio, sys, time
    sys.path.insert(0, {support!r})
    import finetune_nb as ft
    from finetune_nb.testing import sums
    from small_agents import guess, right
    from detached import Weights

    async def slow(question, llm):
        if run.progress.done == 0:
            print("ready", flush=True)
        await asyncio.sleep(0.2)
        return await guess(question, llm)

    run = ft.Run(slow, right, sums(6), adapter=Weights(), output_dir={folder!r}, name="live", max_concurrency=4)

    async def loop():
        while True:
            print("epoch", (await run.next_epoch()).index, flush=True)

    try:
        {body}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    while run.state == "aborting":  # whoever waits is let go after a second, on a machine that is busy
        time.sleep(0.05)
    print(run.state, len(run), run.partial is not None, flush=True)
    """
)
BODIES = {
    "wait": "run.start(epochs=50); run.wait()",
    "wait_async": "run.start(epochs=50); asyncio.run(run.wait_async())",
    "next_epoch": "asyncio.run(loop())",
}


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("mode", BODIES)
def test_the_first_interrupt_ends_behind_the_epoch_the_second_at_once(tmp_path, mode, presses):
    script = SCRIPT.format(support=str(SUPPORT), folder=str(tmp_path), body=BODIES[mode])
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    said = next(line for line in process.stderr if "interrupt again to abort" in line)  # now it has arrived
    if presses == 2:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    lines = out.splitlines()
    assert said and "Traceback" not in err
    if presses == 1:
        assert lines[-1] == "ready 1 False"
        assert ("interrupted" in lines) == (mode == "next_epoch")
    else:
        assert lines[-1] == "ready 0 True" and "interrupted" in lines


# ── what hangs for ever ──────────────────────────────────────────────────────────────────────────────────────────────

HANGING = textwrap.dedent(
    """
    import asyncio, sys, threading, time
    sys.path.insert(0, {support!r})
    import finetune_nb as ft
    from finetune_nb.testing import sums
    from small_agents import right
    from detached import Weights

    waits = threading.Event()

    def tell():
        waits.wait()
        print("hangs", flush=True)

    async def sleeps(question, llm):
        tell()
        await asyncio.Event().wait()

    async def will_not_be_canceled(question, llm):
        tell()
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                pass

    def in_a_thread(question, llm):
        tell()
        threading.Event().wait()

    async def blocks_the_loop(question, llm):
        tell()
        while True:
            time.sleep(1)

    run = ft.Run({workflow}, right, sums(1), adapter=Weights(), generations=1, output_dir={folder!r}, name="hanging")
    run.start(epochs=2)
    threading.Timer(0.5, waits.set).start()  # the interrupt is for the wait, not for what comes before it
    try:
        run.wait()
    except KeyboardInterrupt:
        print("left", run.state, flush=True)
    """
)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("workflow", ["sleeps", "will_not_be_canceled", "in_a_thread", "blocks_the_loop"])
def test_a_workflow_that_hangs_for_ever_holds_neither_stop_nor_abort_nor_the_end_of_the_interpreter(tmp_path, workflow):
    script = HANGING.format(support=str(SUPPORT), folder=str(tmp_path), workflow=workflow)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    assert any("interrupt again to abort" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    assert process.stdout.readline() in ("left ready\n", "left aborting\n")
    left = time.monotonic()
    process.communicate(timeout=60)
    print(f"{workflow}: the wait was left after {left - pressed:.1f} s, the exit took {time.monotonic() - left:.1f} s")
    assert process.returncode == 0


def test_a_run_that_hangs_is_stopped_aborted_and_closed_from_code_at_once(make_run):
    hangs, free = threading.Event(), threading.Event()

    def hang(question, llm):
        hangs.set()
        free.wait()

    run = make_run(hang)
    run.start(epochs=2)
    assert hangs.wait(10)
    began = time.monotonic()
    run.stop()
    assert run.wait(timeout=0.05).state == "stopping"
    run.abort()
    run.wait()
    run.close()
    took = time.monotonic() - began
    free.set()
    assert took < 6, "seconds; 1 to 2 on an idle machine"


# ── from everywhere ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["workflow", "workflow in a thread", "reward", "tripwire"])
def test_what_the_run_runs_may_steer_it_and_is_told_not_to_wait_for_it(make_run, kind):
    errors, first = (
        [],
        threading.Lock(),
    )  # rewards of several rollouts are asked for at once, in threads: one of them steers

    def ask():
        if not first.acquire(blocking=False):
            return
        for call in (run.wait, run.close, lambda: run.save_model("nowhere"), run.start, run.resume):
            try:
                call()
            except RunError as error:
                errors.append(str(error))
        run.curriculum = {"min_reward_diff": 0.2}
        run.stop()

    async def asking(question, llm):
        if not first.locked():
            ask()
            with pytest.raises(RunError):
                await run.wait_async()
            with pytest.raises(RunError):
                await run.next_epoch()
        return await guess(question, llm)

    def asking_in_a_thread(question, llm):
        ask()
        return llm.chat([{"role": "user", "content": question}]).content

    workflow = {"workflow": asking, "workflow in a thread": asking_in_a_thread}.get(kind, guess)
    run = make_run(workflow, max_concurrency=1)
    if kind == "reward":
        run = make_run(guess, evaluators={"asks": lambda item: ask() or 1.0}, max_concurrency=1)
    if kind == "tripwire":
        run.tripwires += [lambda epoch: ask()]
    run.start(epochs=5)
    run.wait()
    assert len(run) == 1 and run.curriculum.min_reward_diff == 0.2
    assert [("would wait" in error) for error in errors] == [True, True, True, False, False]


@pytest.mark.slow
@pytest.mark.proof
def test_a_thousand_calls_from_four_threads_lose_no_change_and_lock_nothing_up(make_run):
    """Every call that a person, a widget or another thread can make; the run goes on after all of them."""
    run = make_run(curriculum=dict(initial_percentile=0.3))
    asked, unexpected = [], []

    def steer(seed):
        import random

        rng = random.Random(seed)
        calls = [
            lambda: run.start(epochs=3),
            run.pause,
            run.resume,
            run.stop,
            run.abort,
            lambda: run.wait(timeout=0.001),
            lambda: setattr(run, "live", {"llm.temperature": rng.uniform(0.1, 2)}),
            lambda: (run.state, run.notice, run.error, run.progress, len(run), repr(run), run.partial),
            lambda: run.journal(),
        ]
        for n in range(250):
            try:
                if n % 5 == 0:
                    asked.append(value := round(rng.uniform(0.01, 1), 6))
                    run.curriculum = {"percentile": value}
                else:
                    rng.choice(calls)()
            except RunError:
                pass
            except Exception as error:  # asyncio's, sqlite3's
                unexpected.append(error)

    threads = [threading.Thread(target=steer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and unexpected == []
    if run.state in ("pausing", "paused"):
        run.resume()
    until(lambda: run.state in ("ready", "failed"), 60)
    count = len(run)
    run.start(epochs=1)
    run.wait()
    assert len(run) == count + 1
    told = [change.new for change in run.changes if change.field == "percentile"]
    assert sorted(told) == sorted(asked)
    assert told[-1] == run[-1].curriculum.percentile
    assert [change.new for change in run._settings.journal] == [change.new for change in run.changes]
