"""The notebook on one GPU, where vLLM is installed: its run starts a server of its own, in float32."""

from pathlib import Path

import nbformat
import pytest

from finetune_nb.cli.demo import execute, set_parameters

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "09_one_gpu.ipynb"


async def test_notebook_samples_with_a_server_that_its_run_starts(model_folder, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    set_parameters(notebook, MODEL=str(model_folder), SEED=0, EPOCHS=2, NAME="test")
    for cell in notebook.cells:  # random weights write no call, and would earn nothing
        cell.source = cell.source.replace("json_tools.reward", "lambda output: float(sum(map(ord, output)) % 7)")
    at_the_end = notebook.cells.index(next(cell for cell in notebook.cells if cell.source == "run.close()"))
    gaps = "print(max(epoch.train_metrics['logprob_gap'] for epoch in run))"
    notebook.cells.insert(at_the_end, nbformat.v4.new_code_cell(gaps))
    assert await execute(notebook, tmp_path, tmp_path) is None
    told = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert any("replies come from a vLLM server" in text for text in told)
    assert any("sampled by vLLM, a server of its own" in text for text in told)
    assert float(told[at_the_end]) < 1e-4
