"""The tutorial notebooks that show widgets, cell by cell in a real JupyterLab, as a reader runs them."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
SOURCES = {
    path.stem: [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for path in sorted(FOLDER.glob("*.ipynb"))
}
WITH_WIDGETS = [name for name, sources in SOURCES.items() if any(".panel()" in source for source in sources)]


def test_the_panel_is_taught():
    assert "03_live_curriculum" in WITH_WIDGETS


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("name", WITH_WIDGETS)
def test_a_notebook_with_widgets_runs_top_to_bottom(lab, name):
    notebook = lab.open(SOURCES[name])
    for place, source in enumerate(SOURCES[name]):
        notebook.run(place, 120)
        assert notebook.output(place).locator(ERROR).count() == 0, f"{source}\n{notebook.text(place)}"
        if ".panel()" in source:
            notebook.output(place).locator(".ft-panel .noUi-handle").first.wait_for()
