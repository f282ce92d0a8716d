"""Notebook 7 (its python is named by FINETUNE_NB_NOTEBOOK7_PYTHON): what holds in JupyterLab, on its pages."""

from __future__ import annotations

import os

import pytest

from . import test_browser_in_lab, test_notebooks, test_panel
from .jupyterlab import Notebook7

pytestmark = pytest.mark.slow
SHOWN = ("run", "run.show()", "run.plot_rewards()", "run.trajectories()")


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """In place of JupyterLab, in the tests of other modules too."""
    server = Notebook7(tmp_path_factory.mktemp("notebook7"), browser, python=os.environ["FINETUNE_NB_NOTEBOOK7_PYTHON"])
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def forget(lab):
    lab.forget_events()


test_a_panel_is_heard_while_a_cell_waits = test_panel.test_what_is_applied_while_a_cell_waits_is_used_by_that_epoch
test_a_panel_goes_on_after_a_reload = test_panel.test_the_page_is_reloaded_and_the_tab_closed_while_the_run_goes_on
test_a_browser_mounts = test_browser_in_lab.test_it_mounts_keeps_its_keys_and_feeds_python
test_a_browser_lives_through_a_reload = (
    test_browser_in_lab.test_it_lives_through_a_reload_and_another_run_of_its_cell_replaces_it
)
test_a_notebook_with_widgets = test_notebooks.test_a_notebook_with_widgets_runs_top_to_bottom


def test_views_and_plots_are_shown(lab, runs_folder):
    made = f"from browser import stage\nrun = stage.make_run({str(runs_folder)!r}, seconds=0.3)\n"
    notebook = lab.open([f"{made}run.start(2); run.wait(progress=False)", *SHOWN])
    for place in range(1 + len(SHOWN)):
        notebook.run(place)
        assert notebook.output(place).locator(test_notebooks.ERROR).count() == 0, notebook.text(place)
    assert "2 epochs" in notebook.text(1) and "sum-" in notebook.text(2)
    picture = notebook.output(3).locator("img")
    picture.wait_for()
    assert picture.evaluate("each => each.complete && each.naturalWidth") > 100
    assert notebook.output(4).locator("table tbody tr").count() > 0
