"""Control characters in what others wrote reach neither the terminal nor a log handler; damaged runs hide no others."""

from __future__ import annotations

import io
import logging
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from factories import make_epoch, make_trajectory
from hypothesis import given
from hypothesis import strategies as st

import finetune_nb as ft
from finetune_nb.cli import demo, output
from finetune_nb.cli.main import main
from finetune_nb.errors import ConfigError, StoreError
from finetune_nb.redaction import redacting_logger
from finetune_nb.store.runs import runs
from finetune_nb.testing import FakeAdapter, sums
from finetune_nb.text import plain
from finetune_nb.types import RolloutFailure
from finetune_nb.views.summary import run_text

HOSTILE = "\x1b]0;renamed\x07\x1b[2J\x9b31m\x08\r\u202egnp.exe\u2066\x7f\ud800"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


async def solve(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with one run that can be read."""
    folder = tmp_path_factory.mktemp("whole")
    run = ft.Run(solve, lambda item: 1.0, sums(2), generations=2, output_dir=folder, name="run", adapter=FakeAdapter())
    ft.run_sync(run.next_epoch())
    run.close()
    return run.folder


def sql(folder, statement, *values):
    with closing(sqlite3.connect(folder / "run.db")) as database, database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute(statement, values)


DAMAGE = {
    "the file is cut off": lambda folder: (folder / "run.db").write_bytes((folder / "run.db").read_bytes()[:5000]),
    "the file is empty": lambda folder: (folder / "run.db").write_bytes(b""),
    "it is no database": lambda folder: (folder / "run.db").write_bytes(random.Random(0).randbytes(9000)),
    "it is a folder": lambda folder: ((folder / "run.db").unlink(), (folder / "run.db").mkdir()),
    "it is a dangling link": lambda folder: (
        (folder / "run.db").unlink(),
        (folder / "run.db").symlink_to(folder / "nowhere"),
    ),
    "a table is gone": lambda folder: sql(folder, "DROP TABLE epochs"),
    "the id is no id": lambda folder: sql(folder, "UPDATE run SET id = ?", HOSTILE[:5]),
    "an epoch's record is no JSON": lambda folder: sql(folder, "UPDATE epochs SET record = '{'"),
    "an epoch's record is binary": lambda folder: sql(folder, "UPDATE epochs SET record = ?", b"\xff\xfe"),
    "the parent's epoch is a text": lambda folder: sql(folder, "UPDATE run SET parent = 'p', parent_epoch = 'x'"),
    "the date is beyond all dates": lambda folder: sql(folder, "UPDATE run SET created_at = 1e300"),
    "it was made by a newer release": lambda folder: sql(folder, "PRAGMA user_version = 999"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_runs_beside_a_damaged_one_are_listed_with_what_is_wrong(damage, whole, tmp_path, capsys):
    for name in ("before", "damaged", "later"):
        shutil.copytree(whole, tmp_path / name)
    DAMAGE[damage](tmp_path / "damaged")
    code = main(["runs", str(tmp_path)])
    said = capsys.readouterr()
    assert "before" in said.out and "later" in said.out and "Traceback" not in said.err
    table = runs(tmp_path).set_index("run")
    assert table.loc["before", "epochs"] == table.loc["later", "epochs"] == 1
    if isinstance(table.loc["damaged", "error"], str):
        assert code == 1 and "damaged cannot be read: " in said.err
    else:  # it can be read, and one value is missing
        assert code == 0 and damage == "the date is beyond all dates"


def test_a_directory_of_damaged_runs_alone_is_told_without_a_table_of_nothing(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "torn")
    (tmp_path / "torn" / "run.db").write_bytes(b"torn")
    assert main(["runs", str(tmp_path)]) == 1
    assert "torn" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("column", ["state", "parent"])
def test_the_runs_command_shows_control_characters_as_symbols(column, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "received")
    value = HOSTILE.replace("\ud800", "") + "\nfaked line"
    sql(tmp_path / "received", f"UPDATE run SET {column} = ?, parent_epoch = 0", value)
    (tmp_path / "torn\x1b[2J").mkdir()
    (tmp_path / "torn\x1b[2J" / "run.db").write_bytes(b"torn")
    command = [sys.executable, "-m", "finetune_nb", "runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert not CONTROL.search(said) and "␛" in said
    assert not [line for line in said.splitlines() if line.startswith("faked line")]


@pytest.mark.parametrize("command", [["demo"], ["lab", "--no-open", "."], ["runs", "."]])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(HOSTILE), 1),
        (ValueError(HOSTILE), 1),
        (RecursionError(HOSTILE), 1),
        (OSError(5, HOSTILE), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_command_ends_with_one_plain_message_and_a_documented_code(command, error, code, monkeypatch, capsys):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(demo, "run_demo", fail)
    monkeypatch.setattr(demo, "notebooks_folder", fail)
    monkeypatch.setattr("finetune_nb.store.runs.runs", fail)
    assert main(command) == code
    said = capsys.readouterr().err
    assert said.startswith("finetune-nb: ") and not CONTROL.search(said)


def test_the_traceback_of_an_unexpected_error_is_shown_on_request(monkeypatch, tmp_path):
    def fail(*args):
        raise LookupError("odd")

    monkeypatch.setattr("finetune_nb.store.runs.runs", fail)
    with pytest.raises(LookupError, match="odd"):
        main(["--traceback", "runs", str(tmp_path)])


def test_hostile_arguments_are_shown_as_symbols(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["runs", "a", HOSTILE])
    assert ended.value.code == 2 and not CONTROL.search(capsys.readouterr().err)


def test_a_terminal_that_knows_ascii_alone_gets_escapes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    output.say("é \x1b[2J\ttab\nline")
    assert stream.buffer.getvalue() == b"\\xe9 \\u241b[2J\ttab\nline\n"


def test_colours_of_a_notebooks_traceback_are_left_out():
    assert output.without_colours("\x1b[0;31mValueError\x1b[0m: no") == "ValueError: no"


@given(st.text())
def test_no_text_that_is_logged_brings_a_control_character_to_a_handler(text):
    records = []
    logger = redacting_logger("finetune_nb.tests_of_plain_output")
    handler = logging.StreamHandler(io.StringIO())
    handler.emit = lambda record: records.append(logging.Formatter().format(record))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        try:
            raise ValueError(text + HOSTILE)
        except ValueError:
            logger.warning("%s: %s\n\ttab", text, HOSTILE, exc_info=True, stack_info=True)
    finally:
        logger.removeHandler(handler)
    (said,) = records
    assert not CONTROL.search(said) and "\n\ttab" in said


@given(st.text())
def test_records_errors_and_summaries_print_no_control_character(text):
    text += HOSTILE
    trajectory = make_trajectory(1.0, example=text, generation=text)
    epoch = make_epoch(
        [[1.0, 0.0]],
        failures=[RolloutFailure(text, 0, text)],
        job="failed",
        message=text,
        scores={text: 1.0},
        validation_error=text,
    )
    nothing = make_epoch([[1.0]], job=None, reason=text)
    shown = [repr(trajectory), repr(trajectory.episode[0]), repr(epoch), repr(nothing), repr(epoch.collection)]
    shown += [repr(epoch.collection.failures[0]), repr(epoch.validations[0]), str(StoreError(text))]
    shown.append(run_text(name=text, state=text, epochs=[epoch, nothing], error=text, folder=text, model=text))
    for each in shown:
        assert not CONTROL.search(each)


def test_line_breaks_and_tabs_stay():
    assert plain("a\tb\nc\r\nd") == "a\tb\nc\nd"
