"""Errors that differ by an address, an id, a time or a number of bytes alone are one error, told once with its count."""

from __future__ import annotations

import itertools
import re
import uuid

import pytest
from factories import make_epoch
from hypothesis import given
from hypothesis import strategies as st

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, sums
from finetune_nb.text import kinds_of_errors, same_error, told_once
from finetune_nb.types import RolloutFailure

ONE_ERROR = {
    "an object's address": (
        "no session for <object object at 0x7f11a0>",
        "no session for <object object at 0x55d2bc90>",
    ),
    "a decimal address": ("no node 140234567890123", "no node 140298765432109"),
    "a UUID": (f"job {uuid.UUID(int=5)} is gone", f"job {uuid.UUID(int=2**120 + 77)} is gone"),
    "OpenAI's request id": (
        "APIError: server error (request ID req_a1b2c3d4e5f6) in your message",
        "APIError: server error (request ID req_0f9e8d7c6b5a) in your message",
    ),
    "a request id in JSON": ("{'error': 'x', 'request_id': 'a-7'}", "{'error': 'x', 'request_id': 'b-19'}"),
    "a request id after a colon": ("overloaded. Request ID: 20aXq7", "overloaded. Request ID: 91bYz2"),
    "another long id": ("no thread 01HV8Z3K9QWERTY23", "no thread 01HV9A7BCDEFGH456"),
    "a hexadecimal id": ("container 3f2a9b1c77de stopped", "container 90ab12cd34ef stopped"),
    "a number of bytes": (
        "IncompleteRead(123 bytes read, 456 more expected)",
        "IncompleteRead(9 bytes read, 71 more expected)",
    ),
    "a size": ("CUDA out of memory. Tried to allocate 20.00 MiB", "CUDA out of memory. Tried to allocate 1.50 GiB"),
    "seconds": ("timed out after 3.02 s", "timed out after 3.1 seconds"),
    "a waiting time": ("Rate limit. Please try again in 6m30s.", "Rate limit. Please try again in 20ms."),
    "seconds of seconds": ("gave up after 3.21 of 5 seconds", "gave up after 4.9 of 5 seconds"),
    "a time in brackets": ("no answer (read timeout=3.17)", "no answer (read timeout=29.5)"),
    "a date": ("at 2026-11-29T07:48:43.12Z: gone", "at 2026-12-01T17:08:03Z: gone"),
    "seconds since 1970": ("token expired at 1764402523.25", "token expired at 1764402999"),
    "a task": ("<Task pending name='Task-12'> was stopped", "<Task pending name='Task-345'> was stopped"),
    "a process": ("worker (pid 4711) died", "worker (pid 99) died"),
    "a temporary file": ("No such file: '/tmp/tmpab12cd_9/x'", "No such file: '/tmp/tmpzz9_y8x7/x'"),
}
TWO_ERRORS = {
    "a status": ("HTTP 429", "HTTP 500"),
    "a type": ("ValueError: no", "KeyError: no"),
    "a name": ("name 'x1' is not defined", "name 'x2' is not defined"),
    "a model": ("no model gpt-4o-mini", "no model gpt-5-mini"),
    "a count": ("expected 2 values, got 3", "expected 2 values, got 4"),
    "a port": ("no server at 127.0.0.1:8000", "no server at 127.0.0.1:8001"),
    "a word with a digit": ("no tool add2", "no tool add3"),
}


@pytest.mark.parametrize("what", ONE_ERROR)
def test_errors_that_differ_by_what_varies_alone_are_one(what):
    one, other = ONE_ERROR[what]
    assert kinds_of_errors([one, other, one]) == [(one, [0, 1, 2])]


@pytest.mark.parametrize("what", TWO_ERRORS)
def test_errors_that_differ_otherwise_are_two(what):
    one, other = TWO_ERRORS[what]
    assert kinds_of_errors([one, other, other]) == [(other, [1, 2]), (one, [0])]


@given(st.lists(st.text(), max_size=20))
def test_every_error_is_counted_once(errors):
    places = [place for _, places in kinds_of_errors(errors) for place in places]
    assert sorted(places) == list(range(len(errors)))


def test_the_beginning_of_a_long_error_is_compared():
    for piece in ("a1", "0x", "1-", "1,", "12:", "request_id ", "9 of ", "1h2", "f1", "-"):
        assert same_error(piece * 100_000) == same_error(piece * 50_000)


def test_several_kinds_are_told_with_their_counts():
    assert told_once([]) == ""
    assert told_once(["A at 0x1", "A at 0x2"]) == "the first: A at 0x1"
    assert told_once(["B", "A", "A"]) == "2 times A; once B"
    assert told_once("ABCDE", most=3) == "once A; once B; once C; and 2 other errors"


def test_the_card_of_an_epoch_tells_an_error_once_with_its_count():
    failures = [RolloutFailure(f"q{n}", 0, f"ValueError: no session for <object at {hex(7 + n)}>") for n in range(12)]
    failures.append(RolloutFailure("q13", 0, "KeyError: 'x'"))
    html = re.sub(
        r"<style.*?</style>|<[^>]+>", " ", make_epoch([[1.0, 0.0]], failures=failures)._repr_html_(), flags=re.S
    )
    assert html.count("no session for") == 1 and "12 × ValueError" in html and "1 × KeyError" in html


def test_the_reason_the_summary_and_the_log_tell_an_error_once(tmp_path):
    numbers = itertools.count()

    async def solve(question, llm):
        number = next(numbers)
        if number % 4 == 3:
            raise KeyError("other")
        raise ValueError(f"no session {uuid.uuid4()} for <object at {hex(10**9 + number)}>")

    run = ft.Run(solve, lambda item: 1.0, sums(4), generations=3, output_dir=tmp_path, adapter=FakeAdapter())
    try:
        epoch = ft.run_sync(run.next_epoch())
        assert epoch.reason.startswith("all 12 rollouts failed; 9 times ValueError: no session")
        for text in (epoch.reason, repr(epoch), repr(run)):
            assert text.count("no session") == 1
        for line in run.log_lines():
            assert line.count("no session") <= 1
    finally:
        run.close()
