"""The engine thread: work on it goes on, is cancelled and ends as told, and never holds up the process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums
from finetune_nb.threads import EngineThread


@pytest.fixture
def engine():
    thread = EngineThread("test-engine")
    yield thread
    thread.close()


async def name_of_thread():
    return threading.current_thread().name


def script(code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs code in a Python of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


# ── the thread ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_coroutines_of_many_threads_run_on_one_daemon_thread(engine):
    names, daemons = [], []

    async def work(n):
        await asyncio.sleep(0.001)
        names.append(threading.current_thread().name)
        daemons.append(threading.current_thread().daemon)
        return n

    def submit(n):
        return engine.submit(work(n)).result(timeout=5)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(submit, range(200))) == list(range(200))
    assert set(names) == {"test-engine"}
    assert all(daemons)
    assert sum(thread.name == "test-engine" for thread in threading.enumerate()) == 1


async def test_run_awaits_from_another_loop_and_leaves_that_loop_free(engine):
    ticks = 0

    async def slow():
        await asyncio.sleep(0.1)
        return await name_of_thread()

    task = asyncio.create_task(engine.run(slow()))
    while not task.done():
        await asyncio.sleep(0.005)
        ticks += 1
    assert task.result() == "test-engine"
    assert ticks > 5


async def test_run_raises_what_the_coroutine_raised(engine):
    async def fail():
        raise LookupError("not here")

    with pytest.raises(LookupError, match="not here"):
        await engine.run(fail())


async def test_cancelling_run_cancels_the_coroutine_there_and_waits_for_its_end(engine):
    started, ended = threading.Event(), threading.Event()

    async def work():
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)  # cleaning up takes a while
            ended.set()

    task = asyncio.create_task(engine.run(work()))
    await asyncio.to_thread(started.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


@pytest.mark.slow
@pytest.mark.proof
async def test_cancelling_run_does_not_wait_for_ever_for_what_will_not_end(engine):
    started = threading.Event()

    async def stubborn():
        started.set()
        for _ in range(300):
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass

    task = asyncio.create_task(engine.run(stubborn()))
    await asyncio.to_thread(started.wait, 5)
    before = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - before < 2.5  # `stubborn` would take 3 s


async def test_a_coroutine_that_is_cancelled_before_it_began_is_cancelled(engine):
    begun, held, block = threading.Event(), threading.Event(), threading.Event()

    async def occupy():
        held.set()
        block.wait(5)  # holds the loop, so that nothing else begins

    async def work():
        begun.set()

    engine.submit(occupy())
    await asyncio.to_thread(held.wait, 5)
    task = asyncio.create_task(engine.run(work()))
    await asyncio.sleep(0.05)
    task.cancel()
    asyncio.get_running_loop().call_later(0.05, block.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not begun.is_set()


def test_close_ends_the_thread_and_cancels_what_is_pending(engine):
    states = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            states.append("cleaned up")

    futures = [engine.submit(work()) for _ in range(3)]
    assert engine.submit(name_of_thread()).result(timeout=5) == "test-engine"
    before = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - before < 5
    for future in futures:
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(timeout=1)
    assert states == ["cleaned up"] * 3
    assert "test-engine" not in [thread.name for thread in threading.enumerate()]


async def test_who_waits_is_told_when_the_thread_is_closed_meanwhile(engine):
    task = asyncio.create_task(engine.run(asyncio.sleep(60)))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(engine.close)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)


def test_a_thread_that_hangs_does_not_hold_up_close(engine):
    release = threading.Event()

    async def hang():
        release.wait(20)

    engine.submit(hang())
    time.sleep(0.05)
    before = time.monotonic()
    engine.close()
    assert time.monotonic() - before < 5
    release.set()


# ── run_sync ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_sync_gives_the_result_to_plain_code():
    async def add(a, b):
        await asyncio.sleep(0.01)
        return a + b

    assert ft.run_sync(add(1, 2)) == 3


async def test_run_sync_works_inside_a_running_loop():
    here = threading.current_thread().name
    assert ft.run_sync(name_of_thread()) not in (here, "MainThread")


@pytest.mark.parametrize("error", [ValueError("bad"), TimeoutError("mine"), ft.RolloutTimeout("slow"), SystemError()])
@pytest.mark.parametrize("seconds", [0, 0.15])  # at once, and after more than one slice of waiting
def test_run_sync_propagates_the_coroutines_own_error(error, seconds):
    async def fail():
        await asyncio.sleep(seconds)
        raise error

    with pytest.raises(type(error)) as caught:
        ft.run_sync(fail())
    assert (type(caught.value), caught.value.args) == (type(error), error.args)


def test_run_sync_of_a_coroutine_that_was_cancelled_says_so():
    async def cancelled():
        raise asyncio.CancelledError

    with pytest.raises(concurrent.futures.CancelledError):
        ft.run_sync(cancelled())


def test_run_sync_inside_run_sync_is_an_error_that_says_what_to_do():
    async def inner():
        return 1

    async def outer():
        return ft.run_sync(inner())

    with pytest.raises(RuntimeError, match="use await there"):
        ft.run_sync(outer())
    assert ft.run_sync(inner()) == 1


def test_run_sync_of_several_threads_at_once():
    async def work(n):
        await asyncio.sleep(0.05)
        return n

    before = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: ft.run_sync(work(n)), range(8))) == list(range(8))
    assert time.monotonic() - before < 5


def test_interrupting_run_sync_cancels_the_coroutine():
    done = script(
        """
        import asyncio, signal, _thread, threading, time
        import finetune_nb as ft
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
        ended = threading.Event()
        async def work():
            threading.Timer(0.3, _thread.interrupt_main).start()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
        try:
            ft.run_sync(work())
        except KeyboardInterrupt:
            print("interrupted", ended.wait(2))
        """
    )
    assert done.stdout.strip() == "interrupted True"


# ── a run on it ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_after_an_aborted_epoch_the_next_one_can_begin_at_once(tmp_path):
    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: str(seed % 2)), delay=30)
    run = ft.Run(
        lambda question, llm: llm.chat([{"role": "user", "content": question}]).content,
        lambda item: float(item.output_obj == "1"),
        sums(4),
        adapter=adapter,
        generations=2,
        output_dir=tmp_path,
    )
    task = asyncio.create_task(run.next_epoch())
    while not adapter.submitted:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    adapter.delay = 0
    assert (await run.next_epoch()).job.status == "completed"
    await asyncio.to_thread(run.close)


@pytest.mark.slow
@pytest.mark.proof
async def test_a_run_that_nobody_holds_any_more_is_closed(tmp_path, caplog):
    gc.collect()
    caplog.clear()  # what is said of tasks that another test left behind

    class Trainer(ft.EpochTrainer):
        ended = threading.Event()

        async def cleanup(self):
            self.ended.set()

    builder = ScriptedBuilder(lambda epoch: {"a": [0, 1]})
    options = {"builder": builder, "adapter": FakeAdapter(), "output_dir": tmp_path}
    run = ft.Run(**options, trainer=Trainer(ft.TrainerConfig()), name="old")
    epoch = await run.next_epoch()
    assert not Trainer.ended.is_set()
    del run
    for _ in range(100):  # on a busy machine its thread may still be on its way out of the epoch
        gc.collect()
        if await asyncio.to_thread(Trainer.ended.wait, 0.1):
            break
    assert Trainer.ended.is_set()
    for _ in range(100):
        if not any(thread.name.startswith("ft-old") for thread in threading.enumerate()):
            break
        await asyncio.sleep(0.02)
    assert [t.name for t in threading.enumerate() if t.name.startswith("ft-old")] == []
    assert epoch.metrics.trajectories == 2  # its records stay
    assert "destroyed" not in caplog.text


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("way", ["background thread", "cancelled task"])
def test_a_process_that_leaves_a_run_open_with_a_hanging_workflow_ends(way, tmp_path):
    code = f"""
        import asyncio, threading, time
        import finetune_nb as ft
        from finetune_nb.testing import FakeAdapter, sums
        hanging = threading.Event()
        def hang(question):
            hanging.set()
            time.sleep(600)
        run = ft.Run(hang, lambda item: 1.0, sums(2), adapter=FakeAdapter(), output_dir={str(tmp_path)!r})
        async def main():
            task = asyncio.create_task(run.next_epoch())
            await asyncio.to_thread(hanging.wait, 10)
        if {way!r} == "cancelled task":
            asyncio.run(main())
        else:
            threading.Thread(target=lambda: ft.run_sync(run.next_epoch()), daemon=True).start()
            hanging.wait(10)
        print(time.time(), flush=True)
    """
    done = script(code)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert ended - float(done.stdout) < 30  # the workflow hangs for 600 s


# ── asyncio.run in somebody's cells ──────────────────────────────────────────────────────────────────────────────────

NESTED = """
    import asyncio
    import finetune_nb as ft
    async def inner():
        await asyncio.sleep(0)
        return "inner ran"
    async def outer():
        coroutine = inner()
        try:
            return asyncio.run(coroutine)
        except RuntimeError as error:
            coroutine.close()
            return str(error)
    {opt_in}
    print(asyncio.run(outer()))
"""


def test_importing_alone_does_not_let_asyncio_run_be_nested():
    done = script(NESTED.format(opt_in="ft.Run, ft.run_sync, ft.enable_nested_asyncio"))
    assert "cannot be called from a running event loop" in done.stdout


def test_enable_nested_asyncio_lets_asyncio_run_be_nested():
    pytest.importorskip("nest_asyncio")
    done = script(NESTED.format(opt_in="ft.enable_nested_asyncio(); ft.enable_nested_asyncio()"))
    assert done.stdout.strip() == "inner ran", done.stderr


@pytest.mark.slow
@pytest.mark.proof
def test_a_run_works_where_asyncio_is_nested(tmp_path):
    pytest.importorskip("nest_asyncio")
    done = script(
        f"""
        import asyncio
        import finetune_nb as ft
        from finetune_nb.testing import FakeAdapter, ScriptedBuilder
        ft.enable_nested_asyncio()
        builder = ScriptedBuilder(lambda epoch: {{"a": [0, 1]}})
        async def cell():
            run = ft.Run(builder=builder, adapter=FakeAdapter(), output_dir={str(tmp_path)!r})
            return asyncio.run(run.next_epoch()).job.status.value
        print(asyncio.run(cell()))
        """
    )
    assert done.stdout.strip() == "completed", done.stderr
