"""finetune_nb from its wheel, in environments with the versions of hosted notebooks, each on the Python that it has there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripted.py"
BROUGHT = {"finetune_nb", "ruamel.yaml"}
"""What pip may install: nothing of theirs."""


def run(*command, **environment) -> str:
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def packages(python: Path, *paths: str) -> dict[str, str]:
    """Version by name, of what this Python sees (or of what is in these folders)."""
    listed = run(sys.executable, "-m", "pip", "--python", python, "list", "--format=json", *paths)
    return {each["name"]: each["version"] for each in json.loads(listed)}


@pytest.fixture(scope="session")
def installed(hosted, wheel, tmp_path_factory) -> tuple[Path, dict[str, str], dict[str, str], Path]:
    """A layer over the hosted environment into which pip has installed the wheel: its python, what was seen before and
    after, and the folder of its own packages."""
    _, python = hosted
    layer = tmp_path_factory.mktemp("hosted") / "venv"
    run(python, "-m", "venv", "--without-pip", layer)
    own = layer / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    below, folder = run(python, "-c", where).strip(), Path(run(own, "-c", where).strip())
    (folder / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    before = packages(own)
    run(sys.executable, "-m", "pip", "--python", own, "install", "--quiet", wheel)
    return own, before, packages(own), folder


def test_pip_replaces_none_of_their_packages(installed):
    own, before, after, folder = installed
    assert {"ipywidgets", "ipykernel", "pandas", "numpy", "notebook"} <= before.keys()
    assert {name: after.get(name) for name in before} == before
    assert after.keys() - before.keys() == BROUGHT
    assert packages(own, "--path", str(folder)).keys() == BROUGHT  # nor lies another version over theirs


def check(seen, hosted):
    name, python = hosted
    assert seen["epochs"] == 2 and seen["rewards"] == seen["opened"] == 2 * 6 * 4
    assert seen["table"] and min(seen["run"], seen["rollout"], seen["report"]) > 1000
    assert set(seen["plots"]) == {"89504e47"}
    assert seen["torch"] is False
    python, kernel, widgets = seen["versions"]
    assert (python.rpartition(".")[0], kernel) == ({"colab": "3.13", "kaggle": "3.12"}[name], "6.17.1")
    assert widgets == {"colab": "7.7.1", "kaggle": "8.1.5"}[name]


def test_a_script_shows_views_and_plots(hosted, installed, tmp_path):
    seen = json.loads(run(installed[0], SCRIPT, PYTHONPATH="").splitlines()[-1])
    check(seen, hosted)
    assert seen["panel"] == "StaticPanel"


def test_a_notebook_without_a_front_end_shows_them(hosted, installed, tmp_path):
    cells = [SCRIPT.read_text(encoding="utf-8"), "panel"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    for cell in notebook.cells:
        del cell["id"]  # theirs read an older format
    notebook.nbformat_minor = 4
    path = tmp_path / "todo.ipynb"
    nbformat.write(notebook, path)
    run(installed[0], "-c", EXECUTE, path, PYTHONPATH="", PYDEVD_DISABLE_FILE_VALIDATION="1")
    first, second = nbformat.read(path, as_version=4).cells
    printed = "".join(output.get("text", "") for output in first.outputs)
    check(json.loads(next(line for line in printed.splitlines() if line.startswith('{"epochs"'))), hosted)
    assert "no widgets: this notebook was executed without a front end" in second.outputs[0].data["text/html"]


EXECUTE = """
import asyncio, sys
from pathlib import Path
import nbformat
from finetune_nb.cli.demo import execute
path = Path(sys.argv[1])
notebook = nbformat.read(path, as_version=4)
failed = asyncio.run(execute(notebook, path.parent, path.parent))
nbformat.write(notebook, path)
sys.exit(failed)
"""


def test_a_kernel_with_a_front_end_makes_the_panel_of_widgets(hosted, installed):
    """As a front end drives it: the widgets open their comms, and the cell's output is the panel over its HTML."""
    seen = json.loads(
        run(installed[0], SCRIPT.with_name("panel_in_kernel.py"), hosted[0], PYTHONPATH="").splitlines()[-1]
    )
    assert seen["open"] > 30 and {"text/html", "text/plain"} <= set(seen["types"])
    assert seen["drafted"] == 0.6
    if hosted[0] == "colab":
        assert "application/vnd.jupyter.widget-view+json" in seen["types"]
