"""The trajectory browser in a report: from a file, without a kernel and without a network."""

from __future__ import annotations

import numpy as np
import pytest
from factories import make_epoch, sampled
from records import Views, stored

from finetune_nb.analysis.browse_index import SORTS, BrowseFilter
from finetune_nb.notebook.browser import Source

from .test_browser_page import Folder, hostile_run, records
from .test_hostile_content import ATTACKS

MODEL = "document.querySelector('.ft-rollouts').view.kernel.model"


class Report:
    """A report in a window of its own."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(viewport={"width": 1300, "height": 1000}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.asked, self.problems = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self.page.goto(path.as_uri())

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)
            self.page.wait_for_timeout(120)

    def text(self, selector):
        return self.page.locator(selector).first.inner_text()

    @property
    def said(self):
        return self.text(".say")


@pytest.fixture
def opened(browser, tmp_path):
    """opened(run, **options) writes the report of a run and opens it."""
    reports = []

    def open(run, javascript=True, **options):
        path = run.export(tmp_path / f"report {len(reports)}.html", **options)
        reports.append(Report(browser, path, java_script_enabled=javascript))
        if javascript:
            reports[-1].page.locator(".ftb .head .measures, .ftb .turns > p").first.wait_for()
            reports[-1].page.locator(".ftb").focus()
        return reports[-1]

    yield open
    for report in reports:
        assert report.problems == [] and len(report.asked) == 1
        report.context.close()


def test_it_reads_compares_filters_and_searches_from_a_file(opened, tmp_path):
    run = Folder(tmp_path / "run", *stored(tmp_path, *records()))
    run.label("e1/b/1", "hacked", note="it prints the answer")
    shown = opened(run)
    assert not shown.page.locator("text=A static summary").is_visible()
    shown.press("j", "l")
    assert shown.text(".head .id") == "b" and shown.text(".switch [aria-pressed=true]") == "1: 1"
    assert "hacked" in shown.text(".labels li") and not shown.page.locator(".labels form").is_visible()
    shown.press("x")
    assert shown.said == "labels are made in a notebook"
    shown.press(".")
    assert '" 1"' in shown.text(".inspector .which")
    shown.press("[", "c", "d")
    assert shown.said == "they part in turn 8"
    shown.press("c", "/")
    shown.page.keyboard.type("TIMEOUT")
    shown.press("Enter")
    shown.page.get_by_text("1 rollout in 1 epoch").wait_for()
    assert shown.page.locator(".row").count() == 1 and "TimeoutError: too slow" in shown.text(".error")
    shown.page.get_by_role("button", name="raw JSON").click()
    assert '"name": "e0/a/7"' in shown.text(".raw pre")


def test_what_it_lists_is_what_a_kernel_would_list(opened):
    random = np.random.default_rng(0)
    made = []
    for number in range(3):
        rewards = {f"q{place}": random.choice([0.0, 0.5, 1.0, 0.1], 4).tolist() for place in range(30)}
        epoch = make_epoch(rewards, number)
        for group in epoch.collection.trajectories:
            for trajectory in group:
                tokens = [(f" {word}", float(-random.exponential())) for word in range(int(random.integers(1, 6)))]
                trajectory.episode = [*trajectory.episode[: int(random.integers(1, 3))], sampled(*tokens)]
        made.append(epoch)
    run = Views(*made)
    shown, source = opened(run), Source(run)
    read = f"""async ([filter, sort]) => {{ const model = {MODEL};
        const [, views] = await model.constructor.answers.view(model, {{epoch: 1, filter, sort}});
        return [Uint32Array, Uint8Array, Uint32Array].map((Type, i) => [...new Type(views[i].buffer)]); }}"""
    filters = [{}, {"reward": (0.1, 0.5)}, {"reward": (None, 0.1)}, {"turns": (3, None)}, {"signal": "teaches"}]
    filters += [{"failed": False}, {"failed": True}, {"cut": True}, {"missing": True}, {"text": " 3"}]
    for wanted in filters:
        for sort in SORTS:
            order, found, first = shown.page.evaluate(read, [wanted, sort])
            expected = source.matching(1, BrowseFilter.of(wanted))
            assert found == expected.astype(int).tolist(), wanted
            assert order == source.order(1, expected, sort).tolist(), (wanted, sort)
            assert first == source.leading(1, expected, sort)[order].tolist(), (wanted, sort)
        assert wanted in ({"failed": True}, {"cut": True}, {"missing": True}) or any(found), wanted


def test_what_did_not_fit_is_said_where_it_would_be_read(opened):
    made = [make_epoch({f"q{place}": [0, 1] for place in range(40)}, number) for number in range(2)]
    shown = opened(Views(*made), max_megabytes=0.006)
    assert "are in this page, whole; of the others, it has the numbers" in shown.text(".note")
    shown.press("G")
    assert 'what this rollout says is not in this page; run.show("e1/q39/0") shows it' in shown.text(".reader")
    assert "q39" in shown.text(".row[aria-selected=true]")
    shown.press("l")
    assert "e1/q39/1" in shown.text(".reader")
    shown.press("g")
    assert shown.text(".head .id") == "q0"


def test_hostile_texts_run_nothing_and_fetch_nothing(opened):
    shown = opened(hostile_run("".join(ATTACKS)))
    shown.press(".", "c", "t", "c", "j", "k", "?", "Escape")
    for fold in shown.page.locator(".folded > button").all():
        fold.click()
    assert shown.page.evaluate("window.ran") is None


def test_without_scripts_and_on_paper_it_is_a_summary(opened):
    silent = opened(Views(*records()), javascript=False)
    assert silent.page.get_by_text("A static summary").is_visible() and silent.page.locator(".ftb").count() == 0
    printed = opened(Views(*records()))
    printed.page.emulate_media(media="print")
    assert printed.page.get_by_text("A static summary").is_visible()
    assert not printed.page.locator(".ftb").is_visible()
