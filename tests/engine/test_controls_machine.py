"""LiveSettings and the table of states under orders of calls that nobody thought of: hypothesis makes them up, four threads call
at the same time, and a small model says what must have come of it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace

import hypothesis.strategies as st
import pytest
from changes import START, in_threads, rate, replayed
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from finetune_nb.engine.live_settings import LiveSettings
from finetune_nb.engine.state import ACTIVE, MOVES, RunState, State
from finetune_nb.errors import ConfigError, RunError

pytestmark = pytest.mark.usefixtures("threads_take_turns_often")

FIELDS = {
    "percentile": st.sampled_from([0.1, 0.3, 0.5, 1.0]),
    "min_reward_diff": st.sampled_from([0.0, 0.1, 0.4]),
    "expansion_interval": st.integers(1, 4),
    "sort_ascending": st.booleans(),
    "random_subsample": st.sampled_from([None, 0.25, 0.5]),
    "schedule": st.sampled_from(["automatic", "manual"]),
    "adapter.learning_rate": st.sampled_from([0.001, 0.002, 0.003]),
}
CHANGES = st.fixed_dictionaries({}, optional=FIELDS).filter(bool)
WRONG = st.sampled_from([{"percentile": 2.0}, {"percent": 0.5}, {"adapter.learning_rate": "fast"}, {"adapter.rate": 1}])
OPEN = [move for move in MOVES if move != "close"]
QUICK = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


class Mailbox(RuleBasedStateMachine):
    """One thread at a time: what is asked for, tried out and applied is what the model says."""

    def __init__(self):
        super().__init__()
        self.controls = LiveSettings(START, [rate()])
        self.asked, self.applied, self.rate, self.draft, self.epoch = START, START, 0.001, {}, 0

    def _ask(self, changes):
        curriculum = {name: value for name, value in changes.items() if "." not in name}
        self.asked = self.asked.updated(curriculum) if curriculum else self.asked
        self.rate = changes.get("adapter.learning_rate", self.rate)

    @rule(changes=CHANGES)
    def change(self, changes):
        self._ask(changes)
        assert self.controls.change(changes) == self.asked

    @rule(changes=CHANGES)
    def draft_changes(self, changes):
        news = {**self.draft, **changes}
        if "percentile" in changes and "schedule" not in changes:
            news["schedule"] = "manual"
        drafted = self.controls.draft_changes(changes)
        if self.controls.at_once:
            self._ask(changes)
        else:
            self.draft = news
            assert drafted == self.controls.drafted

    @rule(at_once=st.booleans())
    def switch(self, at_once):
        self.controls.at_once = at_once

    @rule()
    def apply_draft(self):
        draft, before = self.controls.draft, self.controls.drafted
        self._ask(draft)
        assert self.controls.apply_draft() == before == self.asked
        self.draft = {}

    @rule()
    def drop_draft(self):
        self.controls.drop_draft()
        self.draft = {}

    @rule(wrong=WRONG, way=st.sampled_from(["change", "draft_changes"]))
    def refuse(self, wrong, way):
        with pytest.raises(ConfigError):
            getattr(self.controls, way)({"min_reward_diff": 0.9, **wrong})

    @rule()
    def select(self):
        settings_, _ = self.controls.apply(self.epoch)
        assert settings_ == self.asked
        self.applied = self.asked
        self.epoch += 1

    @rule()
    def train(self):
        for name, value in self.controls.take_live("training", self.epoch).items():
            assert (name, value) == ("adapter.learning_rate", self.rate)

    @rule(percentile=st.sampled_from([0.3, 0.5, 0.7]))
    def the_schedule_moves(self, percentile):
        before = self.applied.percentile
        self.controls.note_percentile(percentile)
        self.applied = replace(self.applied, percentile=percentile)
        if self.asked.percentile == before:
            self.asked = replace(self.asked, percentile=percentile)

    @invariant()
    def it_is_what_the_model_says(self):
        controls = self.controls
        assert (controls.curriculum, controls.applied) == (self.asked, self.applied)
        assert controls.live_fields[0].value == self.rate
        assert set(controls.draft) <= set(self.draft) | {"schedule"}
        assert all(change.old != change.new for change in controls.journal)
        assert {change.field for change in controls.waiting} <= {c.field for c in controls.journal if c.epoch is None}


class TogetherAtTheMailbox(RuleBasedStateMachine):
    """Four threads at the same time, each with calls of its own: the journal has every one, in an order that explains the
    end, and a selection never sees half of a change."""

    def __init__(self):
        super().__init__()
        self.controls, self.epoch = LiveSettings(START, [rate()]), 0

    @rule(scripts=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=3, max_size=3))
    def four_at_once(self, scripts):
        seen, counted = [], {"expansion_interval": 0, "min_reward_diff": 0, "increment_percentile": 0}
        before = len(self.controls.journal)

        def steering(name, script):
            def work():
                for step in script:
                    value = step / 50 if name == "increment_percentile" else step
                    was = getattr(self.controls.curriculum, name)  # nobody else changes this one
                    self.controls.change({name: value, "percentile": step / 50}, source=name)
                    counted[name] += was != value
                    assert getattr(self.controls.curriculum, name) == value
                    self.controls.draft_changes(
                        {"sort_ascending": bool(step % 2), "adapter.learning_rate": step / 1000}
                    )
                    self.controls.apply_draft(source=name)

            return work

        def selecting():
            for _ in range(8):
                settings_, _ = self.controls.apply(self.epoch)
                self.controls.take_live("training", self.epoch)
                seen.append(settings_)
                self.epoch += 1

        in_threads(selecting, *(steering(name, script) for name, script in zip(counted, scripts, strict=True)))
        news = self.controls.journal[before:]
        for name, many in counted.items():
            assert sum(change.field == name for change in news) == many  # none is lost, none told twice
        assert all(isinstance(each.percentile, float) for each in seen)

    @invariant()
    def the_journal_explains_what_is_asked_for(self):
        controls = self.controls
        curriculum = tuple(change for change in controls.journal if "." not in change.field)
        assert replayed(curriculum) == controls.curriculum
        rates = [0.001, *(change.new for change in controls.journal if "." in change.field)]
        assert rates[-1] == controls.live_fields[0].value
        assert [c.old for c in controls.journal if "." in c.field] == rates[:-1]
        assert [c.time for c in controls.journal] == sorted(c.time for c in controls.journal)
        used = [(c.epoch, c.field) for c in controls.journal if c.epoch is not None]
        assert len(set(used)) == len(used)


class Table(RuleBasedStateMachine):
    """The states: the table is all there is, also for four threads that ask at the same time."""

    def __init__(self):
        super().__init__()
        self.standing = RunState()

    @rule(move=st.sampled_from([*MOVES]))
    def ask(self, move):
        before = self.standing.state
        if before in MOVES[move]:
            assert self.standing.transition(move) == MOVES[move][before]
        else:
            with pytest.raises(RunError, match=f"cannot {move}: the run is {before}"):
                self.standing.transition(move)
            assert self.standing.state is before

    @rule(scripts=st.lists(st.lists(st.sampled_from(OPEN), max_size=8), min_size=4, max_size=4))
    def ask_together(self, scripts):
        """What begins has ended before anything else begins, whoever asks for what in between."""
        made, before = [], self.standing.active

        def asking(script):
            def work():
                for move in script:
                    with suppress(RunError):
                        self.standing.transition(move)
                        made.append(move)
                    self.standing.wait(0)

            return work

        in_threads(*map(asking, scripts))
        begun, ended = made.count("begin"), made.count("ended") + made.count("failed")
        if self.standing.state is not State.CLOSED:  # there, whatever still ends is legal
            assert begun - ended == self.standing.active - before

    @rule(threads=st.integers(2, 4))
    def only_one_begins(self, threads):
        begun = []

        def begin():
            with suppress(RunError):
                begun.append(self.standing.transition("begin"))

        could = self.standing.state in MOVES["begin"]
        in_threads(*[begin] * threads)
        assert len(begun) == could

    @rule()
    def whoever_waits_is_let_go_when_it_ends(self):
        if self.standing.state in ACTIVE:
            in_threads(
                lambda: self.standing.wait(20),
                lambda: self.standing.wait(20),
                lambda: self.standing.transition("ended"),
            )
        assert self.standing.wait(0) and not self.standing.active

    @rule(error=st.booleans())
    def it_fails(self, error):
        if self.standing.state in ACTIVE:
            self.standing.transition("failed", error=ValueError("x") if error else None)
            assert self.standing.state is State.FAILED and (self.standing.error is not None) >= error


def test_every_field_of_the_curriculum_can_be_asked_for():
    assert {name for name in FIELDS if "." not in name} <= {field.name for field in fields(START)}


TestMailbox, TestTogether, TestTable = Mailbox.TestCase, TogetherAtTheMailbox.TestCase, Table.TestCase
for case in (TestMailbox, TestTable):
    case.settings = QUICK
TestTogether.settings = settings(QUICK, max_examples=8, stateful_step_count=5)
