"""Kernels in which widgets are not heard while a cell waits: ipykernel 6, which lives in an environment of its own (its python
is named by FINETUNE_NB_KERNEL6_PYTHON), and ipykernel 7 where JupyterLab is told to use no subshells."""

import os
import statistics

import pytest

from .jupyterlab import Lab, until
from .test_panel import BACKGROUND, NEXT_EPOCH, NOTICED, WAIT, opened, press_many

pytestmark = pytest.mark.slow

WORD = "changes made in widgets count when this cell has ended"
KINDS = {
    "ipykernel 6": "ipykernel 6.",
    "no subshells": "the front end uses no subshells; if a slider is dead then, reload the page",
}
"""Each, and the reason that is told."""


@pytest.fixture(scope="module", params=[pytest.param("ipykernel 6", marks=pytest.mark.proof), "no subshells"])
def deaf(request, browser, tmp_path_factory):
    """A JupyterLab of that kind, the name of its kernel, and the reason."""
    kernels, settings, name = {}, {}, "python3"
    if request.param == "ipykernel 6":
        python = os.environ.get("FINETUNE_NB_KERNEL6_PYTHON")
        if python is None:
            pytest.skip("FINETUNE_NB_KERNEL6_PYTHON names no environment with ipykernel 6; .ci/run makes one")
        kernels, name = {"kernel6": python}, "kernel6"
    else:
        settings = {"kernels-settings": {"commsOverSubshells": "disabled"}}
    lab = Lab(tmp_path_factory.mktemp("deaf"), browser, kernels, settings)
    try:
        yield lab.start(), name, KINDS[request.param]
    finally:
        lab.stop()


@pytest.mark.parametrize("cell", [NEXT_EPOCH, WAIT], ids=["next_epoch", "wait"])
def test_what_a_slider_does_while_a_cell_waits_counts_after_it_and_that_is_said_once(deaf, runs_folder, cell):
    lab, kernel, reason = deaf
    lab.forget_events()
    notebook = opened(lab, runs_folder, cell, "await run.next_epoch()", kernel=kernel, seconds=8)
    notebook.start(1)
    until(lambda: "running" in notebook.text(0), 30, "a running run", lab._breathe)
    notebook.wait_for_text(1, WORD, 30)
    assert reason in notebook.text(1)
    notebook.focus_slider(0)
    for _ in range(5):
        notebook.press("ArrowRight")
        notebook.page.wait_for_timeout(60)
    assert notebook.is_running(1) and len(lab.events("draft")) <= 1, lab.events("draft")
    notebook.wait_idle(1, 90)
    lab.wait_for_event("draft", 1, 30)
    if (kernel, cell) == ("python3", NEXT_EPOCH):  # the case in which ipykernel 7 leaves it dead
        notebook.save()
        notebook.reload()
        notebook.output(0).locator(".ft-panel .noUi-handle").first.wait_for()
    else:
        until(lambda: abs(lab.events("draft")[-1]["percentile"] - 0.35) < 1e-6, 20, "all presses", lab._breathe)
    assert press_many(lab, notebook, presses=3)  # it is as lively as ever
    notebook.run(2, 90)
    assert WORD not in notebook.text(2)


@pytest.mark.measures
def test_with_a_run_in_the_background_a_slider_is_heard_at_once(deaf, runs_folder):
    lab, kernel, _ = deaf
    lab.forget_events()
    notebook = opened(lab, runs_folder, BACKGROUND, kernel=kernel, seconds=6)
    idle = press_many(lab, notebook, slider=1, presses=5)
    notebook.run(1)
    until(lambda: "running" in notebook.text(0), 30, "a running run", lab._breathe)
    took = press_many(lab, notebook)
    found, quiet = statistics.median(took), statistics.median(idle)
    print(f"\n{kernel}: median {found:.1f} ms, with nothing running {quiet:.1f} ms")
    assert found < max(NOTICED, 5 * quiet)
    assert WORD not in notebook.text(1)
