"""The notebook on environments runs where their packages are installed."""

from pathlib import Path

import nbformat
import pytest

from finetune_nb.cli.demo import execute, set_parameters

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "10_environments.ipynb"


@pytest.mark.slow
async def test_the_notebook_runs_top_to_bottom(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    set_parameters(notebook, SEED=0, EPOCHS=2, NAME="test")
    assert await execute(notebook, tmp_path, tmp_path) is None


def glue_lines() -> list[str]:
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    return [line for source in cells for line in source.splitlines() if "env=" in line]


@pytest.mark.slow
def test_each_environment_takes_one_line():
    assert len(glue_lines()) == 4
    assert all(line.count("ft.Run(") == 1 and line.rstrip().endswith(")") for line in glue_lines())
