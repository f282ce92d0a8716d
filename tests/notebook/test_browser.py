"""The kernel's side of the trajectory browser: what it answers, its traits, and what a cell shows without a front end."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref

import numpy as np
import pytest
from factories import make_epoch
from hostile import HOSTILE, text_of
from records import Views, failed, stored

from finetune_nb.errors import BackendError, ConfigError, RunError, StoreError
from finetune_nb.notebook import browser as browsers
from finetune_nb.notebook.browser import Browser


class Channel:
    """In place of the widget."""

    def __init__(self):
        self.told = []
        self.disposed = False

    def tell(self, content, buffers=()):
        self.told.append((content, list(buffers)))

    def dispose(self):
        self.disposed = True


class Folder(Views):
    """A run in a folder, for labels."""

    def __init__(self, folder, *records):
        super().__init__(*records)
        self.folder = folder


def two_epochs(tmp_path=None):
    epochs = [
        make_epoch({"a": [1, 0, None], "b": [0, 0]}, 0, failures=[failed("a", 7)]),
        make_epoch({"a": [1, 1, 1], "b": [0, 1], "c/d": [0, 1]}, 1),
    ]
    return Views(*epochs) if tmp_path is None else Folder(tmp_path / "run", *stored(tmp_path, *epochs))


def asked(browser, op, **arguments):
    """What the page is answered."""
    if browser._widget is None:
        browser._widget = Channel()
    browser._answer({"op": op, "id": 1, **arguments})
    content, buffers = browser._widget.told.pop()
    assert content.pop("id") == 1
    return content, buffers


def test_it_opens_at_the_newest_epoch_and_its_widest_group():
    browser = two_epochs().browse()
    assert (browser.epoch, browser.example, browser.generation) == (1, None, None)
    about, _ = asked(browser, "hello")
    assert (about["epoch"], about["group"], about["sort"]) == (1, None, "spread")
    assert [epoch[0] for epoch in about["epochs"]] == [0, 1]
    assert two_epochs().browse(epoch=-2).epoch == 0


def test_names_open_rollouts_groups_and_epochs():
    browser = two_epochs().browse()
    browser.open("e0/a/7")
    assert (browser.epoch, browser.example, browser.generation) == (0, "a", 7)
    browser.open("e1/c/d")
    assert (browser.epoch, browser.example, browser.generation) == (1, "c/d", None)
    browser.open("e0")
    assert (browser.epoch, browser.example) == (0, None)
    browser.filter = {"failed": True}
    browser.open("e0/a/7")
    assert browser.filter == {"failed": True}
    browser.open("e0/a/0")
    assert browser.filter == {}
    with pytest.raises(RunError, match="names no rollout"):
        browser.open("e0/a/5")
    with pytest.raises(IndexError):
        browser.open("e9/a/5")


def test_the_selection_is_what_is_listed_in_the_order_of_the_list():
    browser = two_epochs().browse(epoch=0, filter={"reward": (0, 0)})
    assert browser.selection.trajectory.tolist() == ["e0/a/1", "e0/b/0", "e0/b/1"]
    browser.filter = {"failed": True}
    assert browser.selection.trajectory.tolist() == ["e0/a/7"]
    browser.filter, browser.sort = {}, "mean"
    assert browser.selection.example.tolist()[:2] == ["b", "b"]


def test_text_expressions_and_conditions_narrow_the_selection_as_run_find_does(tmp_path):
    run = two_epochs(tmp_path)
    browser = run.browse(epoch=0)
    run.label("e0/b/1", "odd")
    for wanted, names in [
        ({"text": "TOO slow"}, ["e0/a/7"]),
        ({"text": "2+2", "reward": (1, 1)}, ["e0/a/0"]),
        ({"regex": r"2.2", "failed": False, "signal": "all_worst"}, ["e0/b/0", "e0/b/1"]),
        ({"where": "reward > 0.5 or 'odd' in labels"}, ["e0/a/0", "e0/b/1"]),
        ({"text": "nowhere"}, []),
    ]:
        browser.filter = wanted
        assert browser.selection.trajectory.tolist() == names
    for wanted in ({"regex": "("}, {"where": "reward >"}, {"text": "a", "regex": "b"}):
        with pytest.raises(ConfigError):
            browser.filter = wanted


def test_bad_input_is_refused_and_changes_nothing():
    browser = two_epochs().browse()
    for name, value, error in [
        ("filter", {"fail": True}, ConfigError),
        ("epoch", 5, IndexError),
        ("sort", "size", ConfigError),
        ("example", "zz", RunError),
    ]:
        before = getattr(browser, name)
        with pytest.raises(error):
            setattr(browser, name, value)
        assert getattr(browser, name) == before
    with pytest.raises(RunError, match="found example 'zz'"):
        two_epochs().browse(example="zz")


def test_what_a_person_opens_is_in_the_traits_and_is_not_told_back():
    browser = two_epochs().browse()
    asked(browser, "hello")
    seen = []
    browser.observe(lambda change: seen.append((change.name, change.new)), ["example", "generation"])
    asked(browser, "at", epoch=1, rollout=4)
    assert (browser.example, browser.generation) == ("b", 1) and ("example", "b") in seen
    asked(browser, "view", epoch=1, filter={"failed": False}, sort="mean")
    assert browser.filter == {"failed": False} and browser.sort == "mean"
    assert browser._widget.told == []
    browser.open("e0/b/0")
    assert {told[0]["event"] for told in browser._widget.told} == {"at"}
    assert browser._widget.told[-1][0]["group"] == 1


def test_the_index_the_view_and_a_body_can_be_asked_for():
    browser = two_epochs().browse()
    about, columns = asked(browser, "index", epoch=0)
    assert about["epoch"] == 0 and np.frombuffer(columns[0], "<u4").tolist() == [0, 4, 6]
    about, (order, matched, first) = asked(browser, "view", epoch=0, filter={"failed": True}, sort="spread")
    assert about == {"rollouts": 1, "version": None}
    assert np.frombuffer(order, "<u4").tolist() == [0] and sum(matched) == 1
    assert matched[np.frombuffer(first, "<u4")[0]] == 1
    about, _ = asked(browser, "body", epoch=0, row=5)
    assert about["error"] == "TimeoutError: too slow"
    assert asked(browser, "python", epoch=1, rollout=6)[0]["text"] == "run.show('e1/c/d/1')"
    assert asked(browser, "history", epoch=1, groups=[0, 2, 99])[0] == {
        "groups": [0, 2],
        "means": [[0.5, 1.0], [None, 0.5]],
    }
    assert '"reward": 1.0' in asked(browser, "raw", epoch=1, row=0)[0]["text"]


def test_whatever_a_page_says_the_kernel_answers_with_the_problem():
    browser = two_epochs().browse()
    for message, problem in [
        (dict(op="explode"), "does not know"),
        (dict(op=["body"]), "does not know"),
        (dict(op="body", epoch="1", row=0), "whole number"),
        (dict(op="body", epoch=1, row=99), "IndexError"),
        (dict(op="body", epoch=1, row=-1), "IndexError"),
        (dict(op="at", epoch=1, rollout=-1), "rollouts 0 to 6"),
        (dict(op="index", epoch=7), "found epoch 7"),
        (dict(op="view", epoch=1, filter={"x": 1}, sort="mean"), "no field 'x'"),
        (dict(op="label", epoch=1, rollout=0, tag="x", level="rollout"), "no run in"),
    ]:
        assert problem in asked(browser, message.pop("op"), **message)[0]["problem"]


def test_labels_are_written_seen_filtered_by_and_removed(tmp_path):
    run = two_epochs(tmp_path)
    browser, other = run.browse(epoch=0), run.browse(epoch=0)
    said, _ = asked(browser, "label", epoch=0, rollout=1, tag="hacked", score=0.5, note="look", level="rollout")
    (label,) = said["labels"]
    assert label[:5] == ["rollout", 1, "hacked", 0.5, "look"] and said["tags"] == ["hacked"]
    news, _ = asked(other, "news", stamp=asked(other, "hello")[0]["stamp"], change=0, epoch=0)
    assert news["labels"] == said["labels"] and "epochs" not in news
    assert asked(other, "news", stamp=asked(other, "hello")[0]["stamp"], change=news["change"], epoch=0)[0] == {}
    asked(browser, "label", epoch=0, rollout=4, tag="odd", level="group")
    browser.filter = {"label": "hacked"}
    assert browser.selection.trajectory.tolist() == ["e0/a/1"]
    browser.filter = {"label": "*"}
    assert browser.selection.trajectory.tolist() == ["e0/a/1", "e0/b/0", "e0/b/1"]
    assert run.labels().tag.tolist() == ["hacked", "odd"]
    said, _ = asked(browser, "label", epoch=0, rollout=0, tag="early", level="epoch")
    assert [each[:3] for each in said["labels"]][-1] == ["epoch", 0, "early"] and run.epochs().labels[0] == ("early",)
    browser.filter = {"label": "early"}
    assert len(browser.selection) == 6
    browser.filter = {"label": "*"}  # a label of the epoch is none of a rollout
    assert len(browser.selection) == 3
    assert run.groups(epoch=0).labels.tolist() == [(), ("odd",)]
    asked(browser, "label", epoch=0, rollout=0, tag="early", author=label[5], level="epoch", remove=True)
    left, _ = asked(browser, "label", epoch=0, rollout=1, tag="hacked", author=label[5], level="rollout", remove=True)
    assert [each[2] for each in left["labels"]] == ["odd"]


def test_a_search_goes_through_every_epoch_the_nearest_first():
    browser = two_epochs().browse()
    asked(browser, "search", text="2+2", epoch=1)
    browsers.threading.Event().wait(0.01)
    for thread in browsers.threading.enumerate():
        if thread.name == "ft-search":
            thread.join(10)
    told = [content for content, _ in browser._widget.told]
    assert [(each.get("epoch"), each.get("rollouts")) for each in told] == [(1, 7), (0, 5), (None, None)]
    assert told[-1]["done"]


def test_without_a_front_end_the_summary_is_all_that_is_shown():
    browser = two_epochs().browse(epoch=0)
    bundle = browser._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"} and browser._widget is None
    assert "epoch 0 of 2 epochs" in bundle["text/plain"]
    html = bundle["text/html"]
    said = text_of(html)
    assert "mean reward by epoch" in said and "teaches" in said and "browse(epoch=0)" in said
    assert "█▁○×" in said
    # A stored notebook loses style sheets, `var()`, ids and scripts before it is trusted.
    assert not re.search(r"<style|<script|<svg|var\(| id=| data-", html)
    empty = Views().browse()
    assert empty.epoch is None and "No epoch has ended yet" in empty._repr_mimebundle_()["text/html"]
    assert len(empty.selection) == 0


@pytest.mark.parametrize("text", HOSTILE)
def test_the_summary_escapes_every_text(text):
    run = Views(make_epoch({text: [1, 0]}, failures=[failed(text)]))
    run.id = text
    html = run.browse()._repr_mimebundle_()["text/html"]
    text_of(html)  # well-formed
    assert "<script>" not in html and "<img" not in html and "\u202e" not in html


def test_the_output_of_a_cell_has_no_widget_but_the_place_where_it_mounts(monkeypatch):
    monkeypatch.setattr(browsers, "has_frontend", lambda: True)
    browser = two_epochs().browse()
    bundle = browser._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert bundle["text/html"].startswith(f'<div data-ft-mount="{browser._widget.mount}">')
    assert browser._widget.model_id == browser._widget.mount
    monkeypatch.setenv("VSCODE_PID", "1")
    assert "application/vnd.jupyter.widget-view+json" in browser._repr_mimebundle_()
    browser.close()
    assert set(browser._repr_mimebundle_()) == {"text/plain", "text/html"}


@pytest.mark.slow
@pytest.mark.proof
def test_a_closed_browser_keeps_nothing_alive(monkeypatch):
    monkeypatch.setattr(browsers, "has_frontend", lambda: True)
    browser = two_epochs().browse()
    kept = weakref.ref(browser), weakref.ref(browser._widget)
    browser.close()
    del browser
    gc.collect()
    assert [each() for each in kept] == [None, None]


@pytest.mark.slow
@pytest.mark.proof
def test_a_run_that_can_train_is_not_kept_by_its_browser():
    class Trains(Views):
        pass

    run = two_epochs()
    run.__class__ = Trains
    browser = Browser(run)
    kept = weakref.ref(run)
    del run
    gc.collect()
    assert kept() is None
    assert asked(browser, "body", epoch=1, row=0)[0]["turns"]


# ── an epoch that has not ended ──────────────────────────────────────────────────────────────────────────────────────


class Running(Views):
    """A run in the middle of an epoch."""

    state = "running"

    def begins(self, epoch):
        self.partial = epoch

    def ends(self, epoch):
        self._records, self.partial = (*self._records, epoch), None


def sampled_so_far(rewards, index=1):
    return make_epoch(rewards, index, job=None)


def news(browser, count, seconds=10):
    """The epochs as the page hears of them, once there are so many; what is read meanwhile comes a question later."""
    until = time.monotonic() + seconds
    while len(found := asked(browser, "news", stamp="", change=0, epoch=0)[0]["epochs"]) != count:
        assert time.monotonic() < until, found
        time.sleep(0.01)
    return found


def test_what_a_running_epoch_has_so_far_is_listed_and_becomes_the_epoch_that_has_ended():
    run = Running(make_epoch({"a": [1, 0]}, 0))
    browser = run.browse()
    assert browser.epoch == 0 and news(browser, 1)[0][4] is None
    run.begins(sampled_so_far({"b": [None]}))
    running = news(browser, 2)[-1]
    assert running[:4] == [1, None, 1, 0] and isinstance(running[4], int)
    assert asked(browser, "news", stamp="", change=0, epoch=0)[0]["unfinished"] == "running"
    about, _ = asked(browser, "index", epoch=1)
    assert about["version"] == running[4] == asked(browser, "view", epoch=1, filter={}, sort="recorded")[0]["version"]
    assert browser.epoch == 0  # nobody is taken away from what they read
    browser.epoch = 1
    assert browser.selection.trajectory.tolist() == ["e1/b/0"]

    # The page still speaks of the first state, in which the rollout was the first of all.
    before = dict(epoch=1, rollout=0, version=running[4], example="b", generation=0)
    run.begins(sampled_so_far({"a": [None, None], "b": [None]}))
    until = time.monotonic() + 10
    while news(browser, 2)[-1][4] == running[4] and time.monotonic() < until:
        time.sleep(0.01)
    assert asked(browser, "python", **before)[0]["text"] == "run.show('e1/b/0')"
    asked(browser, "at", **before)
    assert (browser.epoch, browser.example, browser.generation) == (1, "b", 0)

    run.ends(make_epoch({"a": [1, 0], "b": [0.5]}, 1))
    assert news(browser, 2)[-1][:5] == [1, 0.5, 3, 0, None]
    assert asked(browser, "python", **before)[0]["text"] == "run.show('e1/b/0')"
    assert asked(browser, "body", **before)[0]["scores"] == {}
    assert asked(browser, "index", epoch=1)[0]["version"] is None
    gone = {**before, "example": "zz"}
    assert "not in it any more" in asked(browser, "body", **gone)[0]["problem"]


def test_the_first_epoch_is_shown_while_it_runs_and_cannot_be_labelled(tmp_path):
    run = Running()
    run.folder = tmp_path
    browser = run.browse()
    assert browser.epoch is None
    run.begins(sampled_so_far({"a": [None, 1.0]}, 0))
    browser = run.browse()
    assert browser.epoch == 0 and "epoch 0" in repr(browser) and "browse(epoch=0)" in browser._line()
    problem = asked(browser, "label", epoch=0, rollout=0, tag="x", level="rollout")[0]["problem"]
    assert "epoch 0 is not complete" in problem
    assert len(asked(browser, "hello")[0]["epochs"]) == 1
    browser.filter = {"text": "2+2"}
    assert len(browser.selection) == 2
    run.state, run.partial = "ready", None
    assert news(browser, 0) == []
    assert asked(browser, "hello")[0]["epoch"] is None


def test_an_epoch_does_not_vanish_between_its_last_rollout_and_its_record():
    run = Running(make_epoch({"a": [1, 0]}, 0))
    browser = run.browse()
    run.begins(sampled_so_far({"b": [None]}))
    news(browser, 2)
    run.partial = None  # the folder has it as an epoch, and the run has not said so yet
    assert len(news(browser, 2)) == 2
    run.ends(make_epoch({"b": [1]}, 1))
    assert news(browser, 2)[-1][4] is None


def test_an_unfinished_epoch_that_cannot_be_read_hides_no_other():
    class Damaged(Running):
        def partial_stamp(self):
            return "something"

        @property
        def partial(self):
            raise StoreError("damaged")

    browser = Damaged(make_epoch({"a": [1, 0]}, 0)).browse()
    assert len(news(browser, 1)) == 1


# ── what tokens have changed by ──────────────────────────────────────────────────────────────────────────────────────


class Trained(Views):
    """A run that knows its weights."""

    asked = 0

    def kept_weights(self):
        return [0, 1]

    def token_changes(self, trajectory, epoch=None):
        self.asked += 1
        if epoch == 0:
            raise BackendError("no ids\nwere recorded")
        return [[0.5 + trajectory.metadata["generation"]] for item in trajectory.episode if item.role == "assistant"]


def told_of_change(browser, *numbers):
    """What the page is told of the questions with these ids."""
    until = time.monotonic() + 10
    while True:
        found = {
            told["of"]: (told, *buffers) for told, buffers in browser._widget.told if told.get("event") == "change"
        }
        if found.keys() >= set(numbers):
            return [found[number] for number in numbers]
        assert time.monotonic() < until
        time.sleep(0.01)


def ask_change(browser, number, **arguments):
    browser._widget = browser._widget or Channel()
    browser._answer({"op": "change", "id": number, **arguments})
    assert {"id": number} in [content for content, _ in browser._widget.told]


def test_the_changes_of_a_rollout_are_told_later_and_computed_once():
    run = Trained(*two_epochs().records)
    browser = run.browse()
    assert asked(browser, "weights")[0] == {"epochs": [0, 1]}
    ask_change(browser, 7, epoch=0, row=1, weights=1)
    ((content, values),) = told_of_change(browser, 7)
    assert "problem" not in content and np.frombuffer(values, "<f4").tolist() == [1.5]
    ask_change(browser, 8, epoch=0, rollout=1, weights=1)
    told_of_change(browser, 8)
    assert run.asked == 1
    ask_change(browser, 9, epoch=0, row=1, weights=0)
    ask_change(browser, 10, epoch=0, row=5, weights=1)
    (no_ids, _), (failed_one, _) = told_of_change(browser, 9, 10)
    assert no_ids["problem"] == "no ids were recorded" and "failed" in failed_one["problem"]
    assert "rows 0 to 5" in asked(browser, "change", epoch=0, row=99, weights=1)[0]["problem"]


@pytest.mark.slow
@pytest.mark.proof
def test_a_run_without_weights_says_why():
    run = two_epochs()
    browser = run.browse()
    assert asked(browser, "weights")[0] == {"epochs": []}
    ask_change(browser, 7, epoch=0, row=1)
    del run
    gc.collect()
    ask_change(browser, 8, epoch=0, row=1)
    (without, _), (gone, _) = told_of_change(browser, 7, 8)
    assert "no weights" in without["problem"] and "run = ft.Run.open(" in gone["problem"]


def test_of_many_rollouts_that_are_asked_for_at_once_the_last_ones_are_computed():
    blocked = threading.Event()

    class Slow(Trained):
        def token_changes(self, trajectory, epoch=None):
            blocked.wait(10)
            return super().token_changes(trajectory, epoch)

    run = Slow(*two_epochs().records)
    browser = run.browse()
    for number in range(20):
        ask_change(browser, number, epoch=0, row=number % 2, weights=1)
    dropped = [content["of"] for content, _ in browser._widget.told if content.get("problem")]
    blocked.set()
    found = told_of_change(browser, *range(20))
    assert "problem" not in found[19][0] and set(dropped) <= set(range(12)) and len(dropped) >= 10
