"""A setting of the curriculum means the same, however it is set: by slider, in code, as a keyword."""

from __future__ import annotations

import ipywidgets
import pytest

import finetune_nb as ft
from finetune_nb.notebook.panel_inputs import Inputs
from finetune_nb.testing import FakeAdapter

CHANGES = [{"percentile": 0.7}, {"min_reward_diff": 0.3}, {"sort_ascending": True}, {"schedule": "manual"}]


def by_code(run, changes):
    run.curriculum = changes
    return run.curriculum


def by_slider(run, changes):
    inputs = Inputs(run._settings, lambda name, said: None)
    for name, value in changes.items():
        next(each.widget for each in inputs.curriculum if each.name == name).value = value
    run._settings.apply_draft()
    return run.curriculum


def by_slider_at_once(run, changes):
    run._settings.at_once = True
    return by_slider(run, changes)


def by_keyword(run, changes):
    return run.preview(**changes).settings


def by_fork(run, changes):
    fork = run.fork(curriculum=changes, adapter=FakeAdapter())
    try:
        return fork.curriculum
    finally:
        fork.close()


@pytest.fixture
def run(make_run, request):
    run = make_run(curriculum=request.param)
    ft.run_sync(run.next_epoch())
    return run


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes)))
@pytest.mark.parametrize("run", [None, {}], indirect=True, ids=["off", "on"])
def test_every_way_leads_to_the_same_settings(run, changes):
    found = {way.__name__: way(run, changes) for way in (by_keyword, by_fork)}
    before = run.curriculum
    for way in (by_code, by_slider, by_slider_at_once):
        run.curriculum = before
        found[way.__name__] = way(run, changes)
    assert len(set(found.values())) == 1, found
    settings = found["by_code"]
    assert settings.enabled
    assert settings.schedule == ("manual" if {"percentile", "schedule"} & changes.keys() else "automatic")


@pytest.mark.parametrize("run", [None], indirect=True)
def test_a_percentile_that_is_dragged_while_the_curriculum_is_off_decides_the_next_selection(run):
    assert len(run[0].selection.kept) == run[0].metrics.groups
    by_slider(run, {"percentile": 0.5})
    epoch = ft.run_sync(run.next_epoch())
    assert (epoch.curriculum.enabled, epoch.curriculum.percentile, epoch.curriculum.schedule) == (True, 0.5, "manual")
    assert len(epoch.selection.kept) < epoch.metrics.groups_with_spread


@pytest.mark.parametrize("run", [None], indirect=True)
def test_a_draft_switches_the_curriculum_on_where_one_sees_it_and_may_switch_it_off_again(run):
    inputs = Inputs(run._settings, lambda name, said: None)
    widgets: dict[str, ipywidgets.Widget] = {each.name: each.widget for each in inputs.curriculum}
    widgets["percentile"].value = 0.5
    assert widgets["enabled"].value is True and widgets["schedule"].value == "manual"
    assert not run.curriculum.enabled
    widgets["enabled"].value = False
    widgets["percentile"].value = 0.6  # with the curriculum off it would have no effect
    assert widgets["enabled"].value is True
    widgets["enabled"].value = False
    assert run._settings.drafted.enabled is False
    run._settings.apply_draft()
    assert (run.curriculum.enabled, run.curriculum.percentile) == (False, 0.6)


def test_settings_that_are_handed_over_whole_stay_as_they_are():
    off = ft.CurriculumSettings(percentile=0.4)
    assert ft.CurriculumSettings(enabled=True).steered(off) is off
    assert off.steered({}) == off
    assert off.steered({"percentile": 0.2, "enabled": False}).enabled is False
