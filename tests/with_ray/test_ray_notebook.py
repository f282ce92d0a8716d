"""The notebook on scaling out, where Ray is installed: the kernel starts a cluster of its own."""

from pathlib import Path

import nbformat
import pytest

from finetune_nb.cli.demo import execute, set_parameters

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "06_scale_out.ipynb"


async def test_notebook_runs_on_a_cluster_that_its_kernel_starts(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    set_parameters(notebook, SEED=0, EPOCHS=2, NAME="test")
    assert await execute(notebook, tmp_path, tmp_path) is None
    told = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "in workers of Ray" in told
