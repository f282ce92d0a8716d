"""A notebook that somebody else stored, in a real JupyterLab before it is trusted: styles and drawings are taken out of what it
shows, and what is left must still read well."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from .jupyterlab import Notebook

STORED = Path(__file__).parents[2] / "notebooks" / "03_live_curriculum.ipynb"
TRUST = "for (const cell of jupyterapp.shell.currentWidget.content.widgets) cell.model.trusted = true"


@pytest.fixture
def notebook(lab):
    """The cells of the stored notebook that show a preview and a panel, not signed here."""
    lab.close_notebooks()
    stored = nbformat.read(STORED, as_version=4)
    stored.cells = [c for c in stored.cells if c.source.startswith("run.preview(") or ".panel()" in c.source]
    for cell in stored.cells:
        cell.metadata.pop("trusted", None)
    path = lab.notebooks / "stored.ipynb"
    nbformat.write(stored, path)
    return Notebook(lab, path)


def test_a_stored_notebook_reads_well_before_and_after_it_is_trusted(notebook):
    preview, panel = notebook.output(0), notebook.output(1)
    notebook.wait_for_text(0, "Groups by mean reward, 0.5 to 1:")
    assert preview.locator("svg rect").count() == 0
    before_the_table = notebook.text(0).split("trajectories")[0].splitlines()
    assert any(re.fullmatch(r"\d+ trained on", line) for line in before_the_table)
    assert not [line for line in before_the_table if re.fullmatch(r"[\d.%]+", line)]
    assert panel.locator("img").evaluate("img => img.complete && img.naturalWidth") > 600
    assert "Mean reward per epoch" in panel.locator("img").get_attribute("alt")

    notebook.page.evaluate(TRUST)
    preview.locator("svg rect").first.wait_for()
    assert not preview.get_by_text("Groups by mean reward").is_visible()
    written = "span => getComputedStyle(span, '::after').content + getComputedStyle(span).position"
    assert preview.locator(".ft-at-middle").evaluate(written) == '"mean reward of the group"absolute'
