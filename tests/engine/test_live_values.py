"""`run.live` is a mapping: whatever one does to it takes effect, or says why it does not."""

from __future__ import annotations

import copy
import json

import pytest

import finetune_nb as ft

RATE, TEMPERATURE = "builder.num_generations", "llm.temperature"


def test_setting_an_item_takes_effect_and_is_in_the_journal(make_run):
    run = make_run()
    run.live[RATE] = 2
    assert run.live[RATE] == 2
    assert [(change.field, change.old, change.new, change.source) for change in run.changes] == [(RATE, 4, 2, "code")]
    assert ft.run_sync(run.next_epoch()).metrics.trajectories == 12
    assert [change.epoch for change in run.changes] == [0]


def _ior(run):
    run.live |= {TEMPERATURE: 0.5, RATE: 3}


WRITES = {
    "update": lambda run: run.live.update({TEMPERATURE: 0.5, RATE: 3}),
    "update with pairs": lambda run: run.live.update([(TEMPERATURE, 0.5), (RATE, 3)]),
    "|=": _ior,
    "assignment": lambda run: setattr(run, "live", {TEMPERATURE: 0.5, RATE: 3}),
    "|= on a name": lambda run: run.live.__ior__({TEMPERATURE: 0.5, RATE: 3}),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_several_values_are_set_in_every_way_that_a_mapping_knows(make_run, write):
    run = make_run()
    write(run)
    assert (run.live[TEMPERATURE], run.live[RATE]) == (0.5, 3)
    assert sorted(change.field for change in run.changes) == [RATE, TEMPERATURE]


@pytest.mark.parametrize("write", ["update", "__ior__"])
@pytest.mark.parametrize("wrong", [{"llm.temperatur": 1}, {TEMPERATURE: "hot"}, {RATE: 0}, {"percentile": 0.5}])
def test_of_several_values_all_are_set_or_none(make_run, write, wrong):
    run = make_run()
    before = dict(run.live)
    with pytest.raises(ft.ConfigError):
        getattr(run.live, write)({"llm.max_tokens": 2, **wrong})
    assert run.live == before and not run.changes


REFUSED = {
    "del": lambda live: live.__delitem__(RATE),
    "pop": lambda live: live.pop(RATE),
    "pop with a default": lambda live: live.pop(RATE, None),
    "popitem": lambda live: live.popitem(),
    "clear": lambda live: live.clear(),
}


@pytest.mark.parametrize("remove", REFUSED.values(), ids=REFUSED)
def test_a_setting_cannot_be_removed_and_the_error_says_what_to_do(make_run, remove):
    run = make_run()
    before = dict(run.live)
    with pytest.raises(ft.ConfigError, match=r"removed\. Set another value"):
        remove(run.live)
    assert run.live == before and not run.changes


MISSPELT = {
    "get": lambda live: live["llm.temperatur"],
    "set": lambda live: live.__setitem__("llm.temperatur", 1.0),
    "del": lambda live: live.__delitem__("llm.temperatur"),
    "pop": lambda live: live.pop("llm.temperatur", None),
    "setdefault": lambda live: live.setdefault("llm.temperatur", 1.0),
    "update": lambda live: live.update({"llm.temperatur": 1.0}),
    "update by name": lambda live: live.update(**{"llm.temperatur": 1.0}),
    "|=": lambda live: live.__ior__({"llm.temperatur": 1.0}),
}


@pytest.mark.parametrize("use", MISSPELT.values(), ids=MISSPELT)
def test_a_misspelt_name_is_an_error_with_a_suggestion(make_run, use):
    run = make_run()
    with pytest.raises(ft.ConfigError, match=r"^'llm\.temperatur' cannot .*Did you mean 'llm\.temperature'"):
        use(run.live)
    assert not run.changes


def test_a_setting_of_the_curriculum_says_where_it_is_set(make_run):
    with pytest.raises(ft.ConfigError, match=r"run\.curriculum = \{'percentile'"):
        make_run().live["percentile"] = 0.5


def test_it_reads_like_a_dict_and_a_copy_is_one(make_run):
    run = make_run()
    live = run.live
    assert RATE in live and "llm.temperatur" not in live and live.get("llm.temperatur", 7) == 7
    assert live.setdefault(RATE, 9) == 4 and live[RATE] == 4
    assert repr(live) == repr(dict(live)) and len(live) == len(run.live_fields)
    assert (live | {RATE: 9})[RATE] == ({RATE: 9} | live | {RATE: 9})[RATE] == 9 and live[RATE] == 4
    for copied in (live.copy(), copy.copy(live), copy.deepcopy(live)):
        assert type(copied) is dict and copied == live
    assert json.dumps(dict(live))
    run.live[RATE] = 2
    assert live[RATE] == 2  # it is current, however long it is held


def test_a_run_that_is_closed_refuses_what_would_have_no_effect(make_run):
    run = make_run()
    ft.run_sync(run.next_epoch())
    run.close()
    with pytest.raises(ft.RunError, match="closed"):
        run.live[RATE] = 2
    with pytest.raises(ft.RunError, match="closed"):
        run.curriculum = {"percentile": 0.5}
    assert not run.changes
