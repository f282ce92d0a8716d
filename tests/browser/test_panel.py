"""The panel in a real JupyterLab: sliders are alive whatever the kernel does, reloads do no harm, a long run costs nothing.

Milliseconds are printed; they are held to what a person would notice (a tenth of a second) or, on a busy machine, to what
the same took in the same run with nothing to do.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import pytest

from .jupyterlab import until
from .test_untrusted import serious

PRESSES = 20
NOTICED = 100
"""Milliseconds."""
BACKGROUND = "run.start(3)"
NEXT_EPOCH = "epoch = await run.next_epoch()"
WAIT = "run.start(2); run.wait()"
SLOW, PROOF, MEASURES = pytest.mark.slow, pytest.mark.proof, pytest.mark.measures


def opened(lab, folder, *cells, kernel="python3", **options):
    """A notebook whose first cell makes a run and shows its panel."""
    made = "".join(f", {name}={value!r}" for name, value in options.items())
    first = f"from browser import probe, stage\nrun = stage.make_run({str(folder)!r}{made})\nrun.panel()"
    notebook = lab.open([first, *cells], kernel)
    notebook.run(0)
    notebook.output(0).locator(".ft-panel .noUi-handle").first.wait_for()
    return notebook


def press_many(lab, notebook, slider=0, presses=PRESSES):
    """Milliseconds from each press of a key on that slider until the draft has its value."""
    notebook.focus_slider(0, slider)
    took = []
    for press in range(presses):
        before = len(lab.events("draft"))
        pressed = notebook.press("ArrowRight" if slider == 0 else "ArrowLeft")
        event = lab.wait_for_event("draft", before + 1, 15)[before]
        took.append((event["time"] - pressed) * 1000)
        notebook.page.wait_for_timeout(30 + press % 3 * 20)
    return took


@MEASURES
@pytest.mark.parametrize(
    ("cell", "warm"),
    [
        pytest.param(BACKGROUND, False, id="background-cold"),
        pytest.param(NEXT_EPOCH, False, marks=[SLOW, PROOF], id="next_epoch-cold"),
        pytest.param(WAIT, False, marks=[SLOW, PROOF], id="wait-cold"),
        pytest.param(BACKGROUND, True, marks=SLOW, id="background-warm"),
        pytest.param(NEXT_EPOCH, True, marks=SLOW, id="next_epoch-warm"),
        pytest.param(WAIT, True, marks=SLOW, id="wait-warm"),
    ],
)
def test_a_slider_moved_by_keyboard_reaches_the_draft_while_the_run_goes_on(lab, runs_folder, cell, warm):
    notebook = opened(lab, runs_folder, cell, seconds=6)
    idle = press_many(lab, notebook, slider=1, presses=5)
    if warm:
        press_many(lab, notebook, presses=1)
    notebook.start(1)
    until(lambda: "running" in notebook.text(0), 20, "a running run", lab._breathe)
    took = press_many(lab, notebook)
    assert cell == BACKGROUND or notebook.is_running(1)
    found, quiet = statistics.median(took), statistics.median(idle)
    print(
        f"\n{cell}, {'warm' if warm else 'cold'}: median {found:.1f} ms, longest {max(took):.1f} ms; "
        f"with nothing running {quiet:.1f} ms"
    )
    assert found < max(NOTICED, 5 * quiet)


@SLOW
@PROOF
def test_what_is_applied_while_a_cell_waits_is_used_by_that_epoch(lab, runs_folder):
    cell = (
        f"{NEXT_EPOCH}\nprobe.note('used', percentile=epoch.curriculum.percentile, schedule=epoch.curriculum.schedule)"
    )
    notebook = opened(lab, runs_folder, cell, "run.journal()[['source', 'field', 'epoch']].to_dict('list')", seconds=4)
    notebook.start(1)
    until(lambda: "running" in notebook.text(0), 20, "a running run", lab._breathe)
    press_many(lab, notebook, presses=5)
    notebook.output(0).get_by_role("button", name="Apply").click()
    notebook.wait_for_text(0, "Asked for")
    (used,) = lab.wait_for_event("used", seconds=30)
    assert used["percentile"] == pytest.approx(0.35) and used["schedule"] == "manual"
    notebook.run(2)
    assert "'source': ['panel', 'panel']" in notebook.text(2) and "'epoch': [0, 0]" in notebook.text(2)


@SLOW
@PROOF
def test_the_page_is_reloaded_and_the_tab_closed_while_the_run_goes_on(lab, runs_folder):
    ended = "run.stop(); run.wait(); [epoch.index for epoch in run] == list(range(len(run))), len(run) > 1, run.state"
    notebook = opened(lab, runs_folder, "run.start(90)", ended, seconds=1.5)
    notebook.run(1)
    notebook.wait_for_text(0, "1 of 90 epochs", 60)
    notebook.save()
    notebook.reload()
    notebook.output(0).locator(".ft-panel .noUi-handle").first.wait_for()
    seen = notebook.text(0)
    until(lambda: notebook.text(0) != seen, 20, "a panel that goes on", lab._breathe)
    assert press_many(lab, notebook, presses=3)
    notebook.close_tab()
    time.sleep(2)
    notebook.open_tab()
    notebook.output(0).locator(".ft-panel .noUi-handle").first.wait_for()
    seen = notebook.text(0)
    until(lambda: notebook.text(0) != seen, 20, "a panel that goes on", lab._breathe)
    assert press_many(lab, notebook, presses=3)
    notebook.run(2, 90)
    assert notebook.text(2).splitlines()[-1] == "(True, True, 'ready')"
    notebook.wait_for_text(0, "ready")


def test_two_views_are_in_step_and_close_takes_both_away(lab, runs_folder):
    count = "import ipywidgets; len(ipywidgets.widgets.widget._instances)"
    notebook = opened(lab, runs_folder, "run.panel()", count, "run.panel()")
    notebook.run(1)
    press_many(lab, notebook, presses=2)
    readouts = notebook.page.locator(".ft-panel .widget-readout")
    until(lambda: readouts.all_inner_texts()[0] == "0.32", 10, "the moved slider", lab._breathe)
    texts = readouts.all_inner_texts()
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]
    notebook.output(1).get_by_role("button", name="Close").click()
    until(lambda: notebook.page.locator(".ft-panel").count() == 0, 10, "closed panels", lab._breathe)

    def left() -> str:
        notebook.run(2)
        return notebook.text(2)

    until(lambda: left() == "0", 10, "a kernel without widgets", lab._breathe)
    notebook.run(3)
    notebook.output(3).locator(".ft-panel .noUi-handle").first.wait_for()


def test_every_input_has_a_name_and_the_keyboard_reaches_it(lab, runs_folder):
    notebook = opened(lab, runs_folder)
    inputs = notebook.output(0).locator(".ft-panel input, .ft-panel select, .ft-panel button:visible")
    named = inputs.evaluate_all(
        "all => all.map(e => e.labels?.[0]?.innerText || e.innerText || e.getAttribute('aria-label'))"
    )
    assert len(named) > 15 and all(named), named
    notebook.output(0).get_by_role("button", name="Start").focus()
    reached = set()
    for _ in range(40):
        notebook.press("Tab")
        script = "document.activeElement.closest('.jupyter-widgets')?.innerText.trim().split('\\n')[0]"
        reached.add(notebook.page.evaluate(script))
    assert {"Run one epoch", "percentile", "grows by", "order", "temperature", "Revert"} <= reached


# ── when no kernel answers ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_reopened_notebook_shows_the_static_panel_and_no_error(lab, runs_folder):
    notebook = opened(lab, runs_folder, "run.start(3); run.panel()", seconds=0.2)
    notebook.run(1)
    notebook.output(1).locator(".ft-panel .noUi-handle").first.wait_for()
    record = notebook.output(1).locator("[data-ft-record]")
    assert record.count() == 1 and not record.is_visible()  # one of both is enough
    notebook.wait_for_text(1, "epoch 2 ended", 60)
    time.sleep(2)
    notebook.save()
    stored = json.loads(notebook.path.read_text())
    assert "widget-view" not in json.dumps(stored) and "widgets" not in stored["metadata"]
    lab.close_notebooks()
    for page in (lab.page, lab.new_page()):  # in the page where it was live, and in a new one
        lab.page = page
        again = type(notebook)(lab, notebook.path)
        again.wait_for_text(0, "ready · 3 epochs")
        again.wait_for_text(1, "ready · 3 epochs")
        assert "run.panel() brings it back" in again.text(1)
        page.wait_for_timeout(1000)
        assert again.page.locator(".ft-panel").count() == 0 and "Error displaying widget" not in again.text(0)
        assert again.output(0).locator("img").last.evaluate("image => image.naturalWidth") > 500
        lab.close_notebooks()


def test_a_kernel_that_has_ended_greys_the_panel_and_says_which_line_brings_it_back(lab, runs_folder):
    notebook = opened(lab, runs_folder, seconds=0.2)
    notebook.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    note = notebook.output(0).get_by_role("alert")
    note.wait_for()
    assert f"ft.Run.open('{runs_folder}/adder').panel()" in note.inner_text()
    assert (
        notebook.output(0).locator(".ft-panel").evaluate("panel => panel.inert && getComputedStyle(panel).opacity")
        == "0.5"
    )


@SLOW
@PROOF
@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_axe_finds_nothing_serious_in_the_panel_and_on_a_narrow_page_the_curve_comes_first(
    lab, runs_folder, axe, theme
):
    notebook = opened(lab, runs_folder, "epoch = await run.next_epoch()", seconds=0.2)
    notebook.run(1)
    page, panel = notebook.page, notebook.output(0).locator(".ft-panel")
    page.emulate_media(color_scheme=theme.lower())
    notebook.set_theme(theme)
    page.evaluate("jupyterapp.shell.collapseLeft()")
    page.evaluate(axe)
    found = {}
    for width in (1400, 1000, 700, 390):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(600)
        settings, curve = panel.locator(".ft-b-inputs"), panel.locator(".ft-b-seen")
        if width < 830:
            assert not settings.is_visible()
            panel.get_by_role("button", name="Settings").click()
            settings.wait_for()
            assert curve.bounding_box()["y"] < settings.bounding_box()["y"]
        found |= serious(panel, (width,))
        if width < 830:
            panel.get_by_role("button", name="Settings").click()
    page.set_viewport_size({"width": 1300, "height": 1000})
    notebook.set_theme("light")
    assert found == {}


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────

DEMO = """
from finetune_nb.examples import calculator
import finetune_nb as ft
run = ft.Run.from_config(calculator.CONFIG, name="demo", finetuning__output_dir={folder!r}, run__seed=0)
run.panel()
"""
MEMORY = """
import ctypes, gc, ipywidgets, matplotlib.pyplot
def sizes():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that what is free is not counted
    resident = int(open("/proc/self/statm").read().split()[1]) * 4096
    return dict(widgets=len(ipywidgets.widgets.widget._instances), resident=resident,
                figures=len(matplotlib.pyplot.get_fignums()), epochs=len(run))
"""


@SLOW
@MEASURES
def test_a_cell_beside_the_running_demo_answers_as_if_there_were_none(lab, runs_folder):
    pytest.importorskip("torch")
    notebook = lab.open(
        [DEMO.format(folder=str(runs_folder)), "epoch = await run.next_epoch()", "run.start(15)", "run.stop()"]
    )
    notebook.run(0)
    notebook.run(1, 120)
    time.sleep(3)
    idle = [notebook.round_trip() * 1000 for _ in range(20)]
    notebook.run(2)
    time.sleep(1)
    busy = []
    for _ in range(20):
        busy.append(notebook.round_trip() * 1000)
        time.sleep(0.3)
    notebook.run(3)
    print(f"\n1+1: idle {statistics.median(idle):.1f} ms, beside the demo {statistics.median(busy):.1f} ms")
    assert statistics.median(busy) < 2 * statistics.median(idle)


@SLOW
def test_two_hundred_epochs_with_a_panel_open_leave_nothing_behind(lab, runs_folder):
    cells = [f"{MEMORY}\nrun.start(100); run.wait(); probe.note('sizes', **sizes())"]
    cells += ["run.start(200); run.wait(); probe.note('sizes', **sizes())"]
    notebook = opened(lab, runs_folder, *cells, seconds=0.2, epochs=300, rows=10, sampling={"max_tokens": 16})
    with notebook.messages() as messages:
        notebook.run(1, 300)
        began = time.time()
        notebook.run(2, 500)
        took = time.time() - began
    warm, end = lab.events("sizes")
    written = [m for m in messages if m["type"] == "comm_msg" and not m["sent"] and m["time"] > began]
    per_second = len(written) / took
    grown, size = (end["resident"] - warm["resident"]) / 1e6, len(json.dumps(notebook.save()))
    print(
        f"\n200 epochs in {took:.0f} s: {grown:+.1f} MB, {end['widgets']} widgets before and after, {end['figures']} figures, "
        f"{per_second:.2f} messages/s, notebook {size / 1000:.0f} kB"
    )
    assert end["epochs"] == 300 and end["figures"] == 0 and end["widgets"] == warm["widgets"]
    # 5 to 12 MB were seen, of which the epochs' records are 3.
    assert grown < 15 and per_second < 2.2 and size < 300_000


# ── what it looks like ───────────────────────────────────────────────────────────────────────────────────────────────

TRIP = (
    "run.tripwires = [lambda e: 'the mean reward is above 0.3: worth a look' if e.metrics.mean_reward > 0.3 else None]"
)
BREAK = "run._driver.trajectory_builder.start_run = None"


@SLOW
def test_pictures_of_every_state_light_and_dark(lab, runs_folder, tmp_path):
    """They are for people to look at: FINETUNE_NB_PICTURES=folder keeps them."""
    folder = Path(os.environ.get("FINETUNE_NB_PICTURES", tmp_path))
    lab.page.set_viewport_size({"width": 1260, "height": 1150})
    notebook = opened(lab, runs_folder, "run.start(200)", TRIP, BREAK, seconds=1)
    notebook.page.evaluate("jupyterapp.shell.collapseLeft()")

    def picture(name):
        for theme in ("dark", "light"):
            notebook.set_theme(theme)
            notebook.page.wait_for_timeout(1200)
            assert notebook.screenshot(folder / f"{name}-{theme}.png", 0).stat().st_size > 15_000

    picture("idle")
    notebook.run(1)
    notebook.wait_for_text(0, "3 of 200 epochs", 60)
    picture("running")
    notebook.output(0).get_by_role("button", name="Pause").click()
    notebook.wait_for_text(0, "paused", 20)
    picture("paused")
    press_many(lab, notebook, presses=PRESSES)
    picture("dragged")
    notebook.run(2)
    notebook.output(0).get_by_role("button", name="Resume").click()
    notebook.wait_for_text(0, "worth a look", 40)
    picture("tripwire")
    notebook.run(3)
    notebook.output(0).get_by_role("button", name="Resume").click()
    notebook.wait_for_text(0, "The last epoch failed", 20)
    picture("error")
    lab.page.set_viewport_size({"width": 1300, "height": 1000})
