"""A script that waits for a run gets a line for each epoch on standard error; a notebook does not."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import termios
import time

import pytest
from small_agents import coin

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedPolicy


def lines(captured):
    return [line for line in captured.err.splitlines() if line.startswith("epoch ")]


def test_wait_prints_each_epoch_once(make_run, capsys):
    run = make_run()
    run.start(3)
    assert run.wait(60) is run
    run.wait(60)
    captured = capsys.readouterr()
    assert lines(captured) == [repr(epoch) for epoch in run] and len(run) == 3
    assert not captured.out


def test_it_can_be_switched_off(make_run, capsys):
    run = make_run()
    run.start(2)
    run.wait(60, progress=False)
    assert not lines(capsys.readouterr())


async def test_wait_async_prints_them_too(make_run, capsys):
    run = make_run()
    run.start(2)
    await run.wait_async(60)
    assert lines(capsys.readouterr()) == [repr(epoch) for epoch in run]
    run.start(1)
    await run.wait_async(60, progress=False)
    assert not lines(capsys.readouterr())


def test_epochs_that_ended_before_the_wait_are_printed_but_none_from_before_the_start(make_run, capsys):
    run = make_run()
    ft.run_sync(run.next_epoch(progress=False))
    run.wait(60)
    assert not lines(capsys.readouterr())
    run.start(2)
    deadline = time.monotonic() + 30
    while len(run) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.wait(60)
    assert lines(capsys.readouterr()) == [repr(run[1]), repr(run[2])]


def test_a_run_that_fails_prints_the_epochs_before(make_run, capsys):
    calls = []

    def reward(item):
        calls.append(item)
        if len(calls) > 24:
            raise ValueError("no reference")
        return float(len(calls) % 2)

    run = make_run(reward=reward)
    run.start(3)
    with pytest.raises(ft.RunError, match="no reference"):
        run.wait(60)
    assert lines(capsys.readouterr()) == [repr(run[0]), repr(run[1])]


def test_a_notebook_gets_no_lines(make_run, capsys, monkeypatch):
    monkeypatch.setattr("finetune_nb.run.session.in_kernel", lambda: True)
    run = make_run()
    run.start(2)
    run.wait(60)
    assert not lines(capsys.readouterr())


class Closed:
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [None, Closed()], ids=["none", "closed"])
def test_a_script_without_standard_error_is_not_disturbed(make_run, monkeypatch, stream):
    run = make_run()
    run.start(2)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        run.wait(60)
    assert len(run) == 2


def test_an_epoch_that_is_awaited_is_a_line_too(make_run, capsys):
    run = make_run()
    epoch = ft.run_sync(run.next_epoch())
    captured = capsys.readouterr()
    assert lines(captured) == [repr(epoch)] and not captured.out


@pytest.mark.slow
@pytest.mark.proof
def test_a_pause_is_told_with_its_reason(make_run, capsys):
    run = make_run()
    run.tripwires.append(lambda epoch: "the reward is odd" if epoch.index == 0 else None)
    run.start(2)
    run.wait(2)
    assert (
        "paused after epoch 0" in (told := capsys.readouterr().err)
        and told.count("run.resume() continues the run") == 1
    )
    run.resume()
    run.wait(60)
    assert lines(capsys.readouterr()) == [repr(run[1])]


@pytest.mark.slow
@pytest.mark.proof
def test_in_a_terminal_a_bar_moves_and_the_lines_stay_above_it(make_run, monkeypatch):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        run = make_run(adapter=FakeAdapter(policy=ScriptedPolicy(coin), delay=0.7))
        run.start(2)
        run.wait(60)
        shown = b""
        while select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 65536)
    os.close(ours)
    text = shown.decode()
    assert "rollouts" in text and "%" in text and "\r" in text
    kept = [line.rpartition("\r")[2] for line in text.split("\r\n")]
    assert [line for line in kept if line.startswith("epoch ") and "groups teach" in line] == [
        repr(epoch) for epoch in run
    ]
