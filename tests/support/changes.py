"""Changes of settings: many threads that make them at once, and where their journal leads."""

from __future__ import annotations

import threading
from dataclasses import fields

from finetune_nb.config import CurriculumSettings
from finetune_nb.engine.live_settings import LiveField
from finetune_nb.errors import ConfigError
from finetune_nb.types import Change

START = CurriculumSettings(enabled=True, percentile=0.3)


def in_threads(*works):
    """Runs the functions at the same time; raises what one of them raised."""
    errors, gate = [], threading.Barrier(len(works))

    def run(work):
        gate.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def replayed(journal: tuple[Change, ...], start: CurriculumSettings = START) -> CurriculumSettings:
    """Where the journal leads, step by step; every step must begin where the one before ended."""
    values = {field.name: getattr(start, field.name) for field in fields(start)}
    for change in journal:
        assert values[change.field] == change.old
        assert change.old != change.new
        values[change.field] = change.new
    return CurriculumSettings(**values)


def rate():
    """A live setting that takes numbers."""

    def check(value):
        try:
            return float(value)
        except ValueError as error:
            raise ConfigError("not a number") from error

    return LiveField("adapter.learning_rate", 0.001, "training", check=check)
