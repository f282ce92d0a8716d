"""Notebooks that nobody looks at while they run: what is saved of them, and what waits for whom."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from finetune_nb.cli.demo import execute

SUPPORT = Path(__file__).parents[1] / "support"
SETUP = """
import sys
sys.path.insert(0, {support!r})
import finetune_nb as ft
from finetune_nb.testing import sums
from small_agents import guess, right
from detached import Weights
run = ft.Run(guess, right, sums(6), adapter=Weights(), generations=4, output_dir={folder!r}, name="live")
"""


def setup(folder) -> str:
    return SETUP.format(support=str(SUPPORT), folder=str(folder))


def execute_cells(tmp_path, *cells):
    """Executes them as `jupyter execute` does; returns the notebook's cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    assert asyncio.run(execute(notebook, tmp_path, tmp_path)) is None
    return notebook.cells


def displays(cell):
    return [output.data for output in cell.outputs if "data" in output]


@pytest.mark.slow
@pytest.mark.proof
def test_the_cell_that_started_a_run_is_saved_with_its_last_state(tmp_path):
    cells = execute_cells(
        tmp_path,
        setup(tmp_path / "runs"),
        "run.start(epochs=3)",
        "run.wait()",
        "run.start(epochs=1); await run.wait_async()",
        "epochs = [(await run.next_epoch()).index for _ in range(2)]",
        "run.start(epochs=2)",
        "import time\nwhile run.state == 'running': time.sleep(0.05)\ntime.sleep(4)",
        "import threading; drawing = [t.name for t in threading.enumerate()].count('ft-record')\n"
        "print(len(run), 'ipywidgets' in sys.modules, drawing)",
    )
    record, *rest = displays(cells[1])
    assert rest == [] and set(record) == {"text/plain", "text/html", "image/png"}
    assert "3 epochs" in record["text/html"] and "ready" in record["text/html"]
    assert "epoch 2" in displays(cells[2])[0]["text/html"]  # the line of the cell that waited
    shown = displays(cells[3])[0]["text/html"]  # it follows the epochs of later cells, where there is time
    assert any(f"{count} epochs" in shown for count in range(4, 9)), shown
    assert len(displays(cells[4])) == 1 and "epoch 5" in displays(cells[4])[0]["text/html"]
    assert "8 epochs" in displays(cells[5])[0]["text/html"]  # from the run's thread, while another cell was busy
    assert cells[7].outputs[0].text == "8 False 1\n"  # one thread draws the records of three cells
    assert len(record["image/png"]) < 100_000


ABSENT = "no widgets: this notebook was executed without a front end"
STEERED = (
    "run.panel()",
    "run.start(epochs=2); run.wait()",
    "run.panel()",
    "run.browse()",
    "import ipykernel; print(len(run), run.state, ipykernel.__version__, 'ipywidgets' in sys.modules)",
)


def jupyter_execute(python, path):
    return [python.with_name("jupyter-execute"), path, f"--output={path.with_name('done.ipynb')}"]


def papermill(python, path):
    return [python, "-m", "papermill", path, path.with_name("done.ipynb"), "--no-progress-bar", "-k", "python3"]


def executed_by(command, python, tmp_path):
    """The cells of a notebook that opens a panel and runs two epochs, executed by that program."""
    cells = [nbformat.v4.new_code_cell(source) for source in (setup(tmp_path / "runs"), *STEERED)]
    path = tmp_path / "todo.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    done = subprocess.run(command(python, path), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(path.with_name("done.ipynb"), as_version=4).cells


def check(cells, release):
    before, after = displays(cells[1])[0], displays(cells[3])[0]
    assert "no epoch" in before["text/html"] and "image/png" not in before
    assert "ready" in after["text/html"] and "2 epochs" in after["text/html"] and "image/png" in after
    assert all(
        data["text/html"].count(ABSENT) == 1 and not any("widget" in kind for kind in data) for data in (before, after)
    )
    assert "count when this cell has ended" not in str(cells[2].outputs)  # nobody is there to move a slider
    assert "2 epochs" in displays(cells[2])[0]["text/html"]
    (browser,) = displays(cells[4])
    assert set(browser) == {"text/plain", "text/html"} and "A static summary" in browser["text/html"]
    assert cells[5].outputs[0].text.startswith("2 ready " + release) and cells[5].outputs[0].text.endswith("False\n")


@pytest.mark.slow
def test_jupyter_execute_runs_it_and_saves_panel_and_browser_without_widgets(tmp_path):
    check(executed_by(jupyter_execute, Path(sys.executable), tmp_path), "7.")


@pytest.mark.slow
@pytest.mark.proof
def test_papermill_with_ipykernel_6_runs_it_and_saves_panel_and_browser_without_widgets(tmp_path):
    python = os.environ.get("FINETUNE_NB_KERNEL6_PYTHON")
    if python is None:
        pytest.skip("FINETUNE_NB_KERNEL6_PYTHON names no environment with ipykernel 6 and papermill; .ci/run makes one")
    check(executed_by(papermill, Path(python), tmp_path), "6.")
