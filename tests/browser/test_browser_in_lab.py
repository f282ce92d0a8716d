"""The trajectory browser in a real JupyterLab: it mounts on the cell's static HTML, keeps the keys while it has the focus, lives
through reloads, and leaves the HTML where no kernel answers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from .jupyterlab import Notebook, until

TESTS = Path(__file__).parents[1]
VIEW = "[...document.querySelectorAll('[data-ft-mount] > div')].at(-1).view"
LABEL = "import sys, finetune_nb as ft; ft.Run.open(sys.argv[1]).label(sys.argv[2], 'hacked')"


def opened(lab, folder, *cells, seconds=0.3, epochs=2, **options):
    """A notebook whose first cell trains for some epochs and shows the browser."""
    made = "".join(f", {name}={value!r}" for name, value in options.items())
    first = f"from browser import stage\nrun = stage.make_run({str(folder)!r}, seconds={seconds}{made})\n"
    first += f"run.start({epochs}); run.wait(progress=False)\nbrowser = run.browse()\nbrowser"
    notebook = lab.open([first, *cells])
    notebook.run(0, 120)
    wait_until_mounted(notebook)
    return notebook


def wait_until_mounted(notebook):
    notebook.page.locator(".ftb .head .measures").first.wait_for()


def focus(notebook):
    notebook.page.locator(".ftb").first.focus()


def shown(notebook):
    """The name of the rollout that is open, and its epoch."""
    head = notebook.page.locator(".ftb .head")
    return head.locator(".id").inner_text(), head.locator(".what .dim").inner_text()


def press(notebook, *keys):
    for key in keys:
        notebook.press(key)
        notebook.page.wait_for_timeout(120)


def wait_until_told(notebook):
    """Waits until the kernel knows what is open."""
    notebook.page.wait_for_function(f"() => {VIEW}.told !== null && {VIEW}.told === {VIEW}.readers[0].at.rollout")


def test_it_mounts_keeps_its_keys_and_feeds_python(lab, runs_folder):
    where = "browser.epoch, browser.example, browser.generation, len(browser.selection)"
    notebook = opened(lab, runs_folder, where, "browser.open('e0/sum-3/2')")
    assert notebook.output(0).locator("[data-ft-mount] table").first.is_hidden()
    focus(notebook)
    press(notebook, "j", "j", "l", "[", "d", "d", "b")
    wait_until_told(notebook)
    assert notebook.page.locator(".jp-Notebook .jp-Cell").count() == 3
    assert notebook.path.exists() and shown(notebook)[1] == "epoch 0"
    notebook.run(1)
    epoch, example, generation, count = eval(notebook.text(1))
    assert (epoch, example, generation, count) == (0, shown(notebook)[0], 1, 320)
    notebook.run(2)
    until(lambda: shown(notebook) == ("sum-3", "epoch 0"), 10, "the rollout that Python opened", lab._breathe)

    # Ctrl+S is JupyterLab's, and after Escape the plain keys are, too.
    focus(notebook)
    notebook.press("Control+s")
    until(lambda: "data-ft-mount" in notebook.path.read_text(), 10, "the saved notebook", lab._breathe)
    before = notebook.page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex")
    press(notebook, "Escape", "k" if before else "j")
    assert notebook.page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex") != before
    assert [set(output.data) for output in notebook.save().cells[0].outputs if "data" in output][-1] == {
        "text/plain",
        "text/html",
    }


def test_it_answers_while_a_cell_is_busy_and_follows_a_run_that_trains(lab, runs_folder):
    notebook = opened(lab, runs_folder, "import time; time.sleep(8)", "run.start(2)", seconds=1, epochs=1)
    focus(notebook)
    press(notebook, "j")
    notebook.start(1)
    focus(notebook)
    press(notebook, "j", "l", "l", "j")
    waits = notebook.page.evaluate(f"{VIEW}.timings.slice(-4).map(each => each.all)")
    assert notebook.is_running(1)
    print(f"\nwhile a cell sleeps, a rollout is shown after {[round(wait) for wait in waits]} ms")
    notebook.wait_idle(1)
    notebook.run(2)
    until(lambda: shown(notebook)[1] == "epoch 2", 40, "the newest epoch", lab._breathe)


def test_an_epoch_is_read_while_it_is_sampled_and_after_it_has_ended(lab, runs_folder):
    notebook = opened(lab, runs_folder, "run.start(1)", seconds=8, epochs=1, validation=None)
    notebook.run(1)
    notebook.page.wait_for_function(f"() => {VIEW}.epochs.length === 2", timeout=30_000)
    focus(notebook)
    press(notebook, "]", "l")
    until(lambda: shown(notebook)[1] == "epoch 1, running", 10, "the epoch that is sampled", lab._breathe)
    example = shown(notebook)[0]
    chosen = notebook.page.locator(".ftb .switch [aria-pressed=true]")
    generation = chosen.inner_text().split(":")[0]
    assert chosen.inner_text().endswith("○")
    until(lambda: shown(notebook)[1] == "epoch 1", 40, "its end", lab._breathe)
    assert shown(notebook)[0] == example and chosen.inner_text().split(":")[0] == generation
    until(lambda: chosen.inner_text()[-1] in "01", 10, "its reward", lab._breathe)


def test_a_label_of_another_process_is_seen(lab, runs_folder):
    notebook = opened(lab, runs_folder)
    example, epoch = shown(notebook)
    name = f"e{epoch.split()[1]}/{example}/0"
    command = [sys.executable, "-c", LABEL, str(runs_folder / "adder"), name]
    subprocess.run(command, check=True, timeout=60, cwd=TESTS.parent)
    began = time.monotonic()
    notebook.page.locator(".labels li", has_text="hacked").wait_for()
    print(f"\na label of another process is seen {time.monotonic() - began:.1f} s after that has ended")
    assert time.monotonic() - began < 4


def test_it_lives_through_a_reload_and_another_run_of_its_cell_replaces_it(lab, runs_folder):
    cell = "run.browse()"
    count = (
        "import ipywidgets; sum(type(w).__name__ == 'Mounted' for w in ipywidgets.widgets.widget._instances.values())"
    )
    notebook = opened(lab, runs_folder, cell, count)
    focus(notebook)
    press(notebook, "j", "j", "l")
    wait_until_told(notebook)
    before = shown(notebook)
    notebook.save()
    notebook.reload()
    wait_until_mounted(notebook)
    assert shown(notebook) == before
    for _ in range(3):
        notebook.run(1)
        notebook.output(1).locator(".ftb .measures").wait_for()
    notebook.run(2)
    assert notebook.text(2) == "2"
    assert notebook.page.locator(".ftb").count() == 2


def test_a_dead_kernel_greys_it_out_and_a_stored_notebook_shows_the_summary(lab, runs_folder, tmp_path):
    notebook = opened(lab, runs_folder)
    stored = notebook.save()
    notebook.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    banner = notebook.page.locator(".ftb.lost .banner")
    banner.wait_for()
    assert "Run the cell again" in banner.inner_text() and ".browse(epoch=1)" in banner.inner_text()
    assert notebook.page.locator(".ftb .turn[role=group]").count() == 2

    # Opened again, and as a copy that nobody trusts: the summary, and no error.
    lab.close_notebooks()
    for cell in stored.cells:
        cell.metadata.pop("trusted", None)
        cell.source += " "
    nbformat.write(stored, lab.notebooks / "copy.ipynb")
    for path, trusted in ((notebook.path, True), (lab.notebooks / "copy.ipynb", False)):
        again = Notebook(lab, path)
        assert again.page.evaluate("jupyterapp.shell.currentWidget.content.widgets[0].model.trusted") is trusted
        again.page.wait_for_timeout(1000)
        said = again.text(0)
        assert "Trajectories of adder" in said and "teaches" in said and "Error displaying" not in said
        assert again.page.locator(".ftb").count() == 0
        marks = again.output(0).locator("tbody tr").last.locator("td").nth(1)
        assert set(marks.inner_text()) <= set("▁█") and len(marks.inner_text()) == 8
        assert marks.evaluate("e => getComputedStyle(e).color") == "rgb(59, 130, 196)"
    page, _ = HTMLExporter().from_notebook_node(stored)
    assert (
        "Trajectories of adder" in page
        and "widget-view" not in page
        and "require" not in page.lower().split("<body")[1]
    )
