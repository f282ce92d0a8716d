"""What is built is what works: the wheel, away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source distribution, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--outdir", folder, ROOT, cwd=folder)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
@pytest.mark.proof
def test_the_wheel_has_what_is_not_python_too(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "finetune_nb/py.typed",
        "finetune_nb/notebooks/01_first_run.ipynb",
        "finetune_nb/examples/calculator/config.yml",
        "finetune_nb/notebook/mount.js",
        "finetune_nb/notebook/panel.js",
        "finetune_nb/notebook/embedded.js",
        "finetune_nb/notebook/browser.js",
        "finetune_nb/notebook/browser.css",
    ):
        assert wanted in names
    assert any(name.startswith("finetune_nb/backends/local/tiny/") and name.endswith(".safetensors") for name in names)
    assert [name for name in names if not name.startswith(("finetune_nb/", "finetune_nb-"))] == []
    assert [name for name in names if "__pycache__" in name or name.startswith("finetune_nb/tests")] == []


@pytest.mark.slow
@pytest.mark.proof
def test_the_wheel_trains_and_brings_its_notebooks_in_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=empty)
    found = run("-c", "import finetune_nb; print(finetune_nb.__file__)", cwd=empty, PYTHONPATH=str(site))
    assert Path(found.strip()).is_relative_to(site)
    said = run("-m", "finetune_nb", "demo", "--epochs", "1", cwd=empty, PYTHONPATH=str(site))
    assert "epoch" in said and (empty / "finetune-nb-demo").is_dir()
    run("-m", "finetune_nb", "lab", "copies", "--no-open", cwd=empty, PYTHONPATH=str(site))
    assert (empty / "copies" / "01_first_run.ipynb").exists()


def test_every_package_of_an_extra_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "constraints.txt", *ROOT.glob("tests/with_*/constraints.txt"))
    )
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", pins, re.M)}
    named = [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
    packages = {re.sub(r"[-_.]+", "-", requirement.name).lower() for requirement in named} - {"finetune-nb"}
    assert sorted(packages - pinned) == []
