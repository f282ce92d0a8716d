"""LiveSettings: changes from many threads are neither lost nor reordered, and each is applied at one selection."""

from __future__ import annotations

import math
import random
import threading
from dataclasses import replace

import pytest
from changes import START, in_threads, rate, replayed

from finetune_nb.engine.live_settings import LiveSettings
from finetune_nb.errors import ConfigError

pytestmark = pytest.mark.usefixtures("threads_take_turns_often")


# ── many threads ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_change_of_four_threads_is_lost_and_the_journal_tells_them_in_order():
    controls = LiveSettings(START)
    counted = ("expansion_interval", "min_reward_diff")

    def count(field):
        def work():
            for n in range(2, 1002):
                controls.change({field: n}, source=field)
                assert getattr(controls.curriculum, field) == n  # nobody else changes this one

        return work

    def percentiles(seed):
        rng = random.Random(seed)

        def work():
            for _ in range(1000):
                controls.change({"percentile": rng.uniform(0.01, 1)}, source=f"thread {seed}")

        return work

    in_threads(*map(count, counted), percentiles(1), percentiles(2))
    journal = controls.journal
    assert replayed(journal) == controls.curriculum
    assert [c.new for c in journal if c.field == "expansion_interval"] == list(range(2, 1002))
    assert [c.new for c in journal if c.field == "min_reward_diff"] == list(range(2, 1002))
    assert sum(c.field == "percentile" for c in journal) == 2000
    assert {c.source for c in journal if c.field == "percentile"} == {"thread 1", "thread 2"}
    assert controls.applied == START  # nobody has applied anything


def test_selections_during_changes_see_whole_settings_and_each_change_at_most_once():
    controls, done, seen = LiveSettings(START), threading.Event(), []

    def pairs(seed):
        rng = random.Random(seed)

        def work():
            for _ in range(1500):
                share = rng.uniform(0.01, 1)
                controls.change({"percentile": share, "increment_percentile": share})

        return work

    def apply():
        while not done.is_set() or controls.curriculum is not controls.applied:
            settings, _ = controls.apply(len(seen))
            seen.append(settings)

    applying = threading.Thread(target=apply)
    applying.start()
    in_threads(pairs(1), pairs(2), pairs(3))
    done.set()
    applying.join(timeout=30)
    journal = controls.journal
    assert replayed(journal) == controls.applied == seen[-1]
    assert all(s.percentile == s.increment_percentile for s in seen if s != START)
    epochs = [change.epoch for change in journal if change.epoch is not None]
    assert epochs == sorted(epochs)
    assert len({(c.epoch, c.field) for c in journal if c.epoch is not None}) == len(epochs)
    for change in journal:
        if change.epoch is not None:
            assert getattr(seen[change.epoch], change.field) == change.new


def test_random_calls_from_four_threads_leave_a_consistent_mailbox():
    controls, epoch, epoch_lock = LiveSettings(START), [0], threading.Lock()

    def steer(seed):
        rng = random.Random(seed)
        calls = (
            lambda: controls.change({"sort_ascending": rng.random() < 0.5}),
            lambda: controls.change({"min_reward_diff": rng.random()}),
            lambda: controls.change({"random_subsample": rng.choice([None, 0.25, 0.5])}),
            lambda: controls.change(replace(controls.curriculum, expansion_interval=rng.randint(1, 9))),
            lambda: refused(controls, rng),
            lambda: (controls.journal, controls.applied, controls.curriculum),
            apply,
        )

        def work():
            for _ in range(1000):
                rng.choice(calls)()

        return work

    def apply():
        with epoch_lock:  # one engine at a time, as in a run
            controls.apply(epoch[0])
            epoch[0] += 1

    in_threads(*map(steer, range(4)))
    controls.apply(epoch[0])
    assert replayed(controls.journal) == controls.applied == controls.curriculum
    assert [c.time for c in controls.journal] == sorted(c.time for c in controls.journal)
    assert all(c.field != "percentile" for c in controls.journal)


def refused(controls, rng):
    with pytest.raises(ConfigError):
        controls.change({"percentile": rng.choice([0, 1.5, -1, math.nan, "much"]), "min_reward_diff": 0.9})


# ── draft, pending, applied ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_is_pending_until_the_next_selection():
    controls = LiveSettings(START)
    asked = controls.change({"min_reward_diff": 0.4}, source="panel")
    assert controls.curriculum == asked == replace(START, min_reward_diff=0.4)
    assert controls.applied == START
    (change,) = controls.journal
    assert (change.source, change.field, change.old, change.new, change.epoch) == (
        "panel",
        "min_reward_diff",
        0.1,
        0.4,
        None,
    )
    assert controls.apply(7) == (asked, False)
    assert controls.applied == controls.curriculum == asked
    assert controls.journal[0].epoch == 7
    controls.apply(8)
    assert controls.journal[0].epoch == 7  # the first one that used it


def test_a_change_that_was_overtaken_before_a_selection_is_used_by_none():
    controls = LiveSettings(START)
    for value in (0.2, 0.3, 0.4):
        controls.change({"min_reward_diff": value})
    controls.apply(3)
    assert [(c.new, c.epoch) for c in controls.journal] == [(0.2, None), (0.3, None), (0.4, 3)]


def test_a_change_to_what_is_there_already_is_not_journaled():
    controls = LiveSettings(START)
    controls.change({"enabled": True})
    controls.change(START)
    assert controls.journal == ()
    assert controls.apply(0) == (START, False)


def test_a_refused_change_leaves_everything_as_it_was():
    controls = LiveSettings(START)
    controls.change({"min_reward_diff": 0.4})
    before = (controls.applied, controls.curriculum, controls.journal)
    for wrong in ({"percentile": 0}, {"min_reward_diff": 0.5, "schedule": "sometimes"}, {"percentil": 0.5}):
        with pytest.raises(ConfigError):
            controls.change(wrong)
    assert (controls.applied, controls.curriculum, controls.journal) == before


def test_the_schedule_is_told_when_it_goes_on_from_elsewhere():
    controls = LiveSettings(START)
    controls.change({"percentile": 0.5})
    assert controls.apply(0)[1] is False  # now manual: nothing goes on
    controls.change({"schedule": "automatic"})
    assert controls.apply(1)[1] is True
    assert controls.apply(2)[1] is False
    controls.change({"percentile": 0.8, "schedule": "automatic"})
    assert controls.apply(3) == (replace(START, percentile=0.8), True)


def test_a_percentile_that_the_schedule_moved_is_applied_and_no_change_of_anybody():
    controls = LiveSettings(START)
    controls.apply(0)
    controls.note_percentile(0.5)
    assert controls.applied.percentile == controls.curriculum.percentile == 0.5
    assert controls.journal == ()


def test_what_the_schedule_moves_meanwhile_also_moves_what_is_pending_but_not_a_percentile_that_was_asked_for():
    controls = LiveSettings(START)
    controls.change({"min_reward_diff": 0.4})
    controls.note_percentile(0.5)
    assert (controls.curriculum.percentile, controls.curriculum.min_reward_diff) == (0.5, 0.4)
    controls.change({"percentile": 0.9})
    controls.note_percentile(0.7)
    assert (controls.applied.percentile, controls.curriculum.percentile) == (0.7, 0.9)


def test_the_journal_that_was_read_does_not_change_any_more():
    controls = LiveSettings(START)
    controls.change({"min_reward_diff": 0.4})
    read = controls.journal
    controls.apply(0)
    controls.change({"min_reward_diff": 0.5})
    assert [change.epoch for change in read] == [None]


# ── the draft ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_draft_changes_nothing_until_it_is_asked_for():
    controls = LiveSettings(START, [rate()])
    assert controls.draft_changes({"percentile": 0.5}).percentile == 0.5
    controls.draft_changes({"adapter.learning_rate": "0.002"})
    assert controls.draft == {"percentile": 0.5, "schedule": "manual", "adapter.learning_rate": 0.002}
    assert controls.curriculum == START and not controls.journal and controls.live_fields[0].value == 0.001
    assert controls.apply_draft() == controls.curriculum
    assert (controls.curriculum.percentile, controls.curriculum.schedule) == (0.5, "manual")
    assert {change.source for change in controls.journal} == {"panel"} and len(controls.journal) == 3
    assert controls.draft == {} and controls.drafted == controls.curriculum


def test_a_draft_can_be_dropped_and_what_is_as_it_was_is_no_draft():
    controls = LiveSettings(START)
    controls.draft_changes({"min_reward_diff": 0.5})
    controls.drop_draft()
    assert controls.apply_draft() == START and not controls.journal
    controls.draft_changes({"min_reward_diff": 0.5})
    controls.draft_changes({"min_reward_diff": START.min_reward_diff})
    assert controls.draft == {}
    controls.draft_changes({"min_reward_diff": 0.5})
    controls.change({"min_reward_diff": 0.5})  # by code, meanwhile
    assert controls.draft == {}


def test_a_draft_of_a_percentile_keeps_its_schedule():
    controls = LiveSettings(START)
    controls.draft_changes({"percentile": 0.6})
    assert controls.drafted.schedule == "manual"
    controls.draft_changes({"schedule": "automatic"})
    assert (controls.drafted.percentile, controls.drafted.schedule) == (0.6, "automatic")
    controls.apply_draft()
    assert controls.apply(0) == (replace(START, percentile=0.6), True)


def test_a_draft_that_does_not_fit_is_refused_and_the_rest_of_it_stays():
    controls = LiveSettings(START, [rate()])
    controls.draft_changes({"percentile": 0.5})
    for wrong in ({"percentile": 2.0}, {"adapter.learning_rate": "fast"}, {"adapter.rate": 1}, {"percent": 1}):
        with pytest.raises(ConfigError):
            controls.draft_changes(wrong)
    assert controls.drafted.percentile == 0.5


def test_at_once_asks_for_what_is_tried_out():
    controls = LiveSettings(START)
    controls.at_once = True
    controls.draft_changes({"percentile": 0.5})
    assert controls.draft == {} and controls.curriculum.percentile == 0.5
