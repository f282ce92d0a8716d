"""The tutorial notebooks: each runs top to bottom in a real kernel, and is stored so that it reads well without one."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from finetune_nb.cli.demo import execute, set_parameters

pytest.importorskip("torch")

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == [
        "01_first_run.ipynb",
        "02_read_trajectories.ipynb",
        "03_live_curriculum.ipynb",
        "04_your_own_agent.ipynb",
        "05_real_model.ipynb",
        "06_scale_out.ipynb",
        "07_rewards.ipynb",
        "08_maths_grpo.ipynb",
        "09_one_gpu.ipynb",
        "10_environments.ipynb",
        "11_warm_start.ipynb",
    ]


ELSEWHERE = {"10_environments"}
"""What needs more than the extra "dev"; tests/with_envs runs it."""
IN_A_BROWSER = {"03_live_curriculum"}
"""What tests/browser runs too, so that it proves nothing more here."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in IN_A_BROWSER else pytest.mark.proof, id=path.stem)
        for path in NOTEBOOKS
        if path.stem not in ELSEWHERE
    ],
)
async def test_notebook_runs_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    set_parameters(notebook, CONFIG=None, SEED=0, EPOCHS=3, NAME="test")
    takes_config = any("from_config(CONFIG" in cell.source for cell in notebook.cells)
    for cell in notebook.cells:
        cell.source = cell.source.replace("CONFIG = None", "CONFIG = calculator.CONFIG" if takes_config else "")
    assert await execute(notebook, tmp_path, tmp_path) is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_static_outputs_and_is_small(path):
    assert path.stat().st_size <= 300_000
    text = path.read_text(encoding="utf-8")
    assert "widget" not in json.dumps(json.loads(text)["metadata"])
    assert "application/vnd.jupyter.widget-view" not in text
    assert str(Path.home()) not in text
    assert "image/png" in text
    assert not re.search(r"</(text|title)>", text)  # GitHub takes drawings out and leaves their texts


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_picture_is_on_the_first_screen_and_the_next_notebook_after_the_last_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    assert "](images/" in "\n".join(cells[0].source.splitlines()[:5])
    later = [*NOTEBOOKS[NOTEBOOKS.index(path) + 1 :], FOLDER / "reference/runs.md"]
    assert cells[-1].source.startswith("**Next:**") and f"({later[0].relative_to(FOLDER)})" in cells[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_have_prose_before_them(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert max(len(cell.source.splitlines()) for cell in code_cells(path)) <= 10
    assert sum(cell.cell_type == "markdown" for cell in cells) >= len(cells) / 3
