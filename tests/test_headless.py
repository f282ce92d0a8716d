"""Notebooks that nobody looks at while they run: what is saved of them, and what waits for whom."""

import asyncio
from pathlib import Path

import nbformat

from finetune_nb.demo import execute

SETUP = """
import sys
sys.path.insert(0, {tests!r})
import finetune_nb as ft
from finetune_nb.testing import sums
from agents import guess, right
from detached import Weights
run = ft.Run(guess, right, sums(6), adapter=Weights(), generations=4, output_dir={folder!r}, name="live")
"""


def setup(folder) -> str:
    return SETUP.format(tests=str(Path(__file__).parent), folder=str(folder))


def execute_cells(tmp_path, *cells):
    """Executes them as `jupyter execute` does; returns the notebook's cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    assert asyncio.run(execute(notebook, tmp_path, tmp_path)) is None
    return notebook.cells


def displays(cell):
    return [output.data for output in cell.outputs if "data" in output]


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
        "print(len(run), 'ipywidgets' in sys.modules)",
    )
    record, *rest = displays(cells[1])
    assert rest == [] and set(record) == {"text/plain", "text/html", "image/png"}
    assert "3 epochs" in record["text/html"] and "ready" in record["text/html"]
    assert "epoch 2" in displays(cells[2])[0]["text/html"]  # the line of the cell that waited
    shown = displays(cells[3])[0]["text/html"]  # it follows the epochs of later cells, where there is time
    assert any(f"{count} epochs" in shown for count in range(4, 9)), shown
    assert len(displays(cells[4])) == 1 and "epoch 5" in displays(cells[4])[0]["text/html"]
    assert "8 epochs" in displays(cells[5])[0]["text/html"]  # from the run's thread, while another cell was busy
    assert cells[7].outputs[0].text == "8 False\n"
    assert len(record["image/png"]) < 100_000
