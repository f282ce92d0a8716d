"""marimo (its python is named by FINETUNE_NB_MARIMO_PYTHON): what its page shows, and the tutorial notebooks as marimo's."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import nbformat
import pytest

from finetune_nb.cli.demo import set_parameters

from .jupyterlab import TESTS, until

pytestmark = pytest.mark.slow
NOTEBOOKS = sorted((TESTS.parent / "notebooks").glob("0[1-4]_*.ipynb"))
APP = """
import marimo

app = marimo.App()


@app.cell
async def _():
    import finetune_nb as ft
    from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
    from small_agents import coin, guess, right

    run = ft.Run(guess, right, sums(6), adapter=FakeAdapter(policy=ScriptedPolicy(coin)), generations=4,
                 output_dir={folder!r}, name="shown")
    epoch = await run.next_epoch()
    run.start(epochs=1)
    run.wait()
    return (run,)
"""
CELL = """

@app.cell
def _(run):
    {expression}
    return
"""


@pytest.fixture
def python():
    return os.environ["FINETUNE_NB_MARIMO_PYTHON"]


@pytest.fixture
def environment():
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS / "support")))
    return {**os.environ, "PYTHONPATH": paths, "MARIMO_SKIP_UPDATE_CHECK": "1"}


@pytest.fixture
def served(python, environment, tmp_path):
    """Serves a notebook that shows a run, and what those cells say of it; gives its address."""
    servers = []

    def serve(*cells: str) -> str:
        app = tmp_path / "app.py"
        app.write_text(APP.format(folder=str(tmp_path)) + "".join(CELL.format(expression=cell) for cell in cells))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [python, "-m", "marimo", "run", app, "--headless", "--no-token", "--host=127.0.0.1", f"--port={port}"]
        log = tmp_path / "server.log"
        with log.open("wb") as file:
            servers.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))

        def answers() -> bool:
            assert servers[0].poll() is None, log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(answers, 120, "marimo's first answer")
        return f"http://127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.terminate()
        server.wait(20)


def test_its_page_shows_runs_plots_tables_and_the_panel_and_the_browser_as_they_are(browser, served):
    page = browser.new_page()
    try:
        page.goto(served("run.show()", "run.plot_rewards()", "run.trajectories()", "run.panel()", "run.browse()"))
        outputs = page.locator(".output-area")
        until(lambda: outputs.count() == 6 and "Trajectories of" in outputs.nth(5).inner_text(), 180, "the last output")
        texts = outputs.all_inner_texts()
        assert "2 epochs" in texts[0] and "sum-" in texts[1]
        outputs.nth(3).get_by_text("e0/sum-0/0").first.wait_for()
        for place in (2, 4):
            picture = outputs.nth(place).locator("img").first
            until(lambda: picture.evaluate("each => each.complete && each.naturalWidth > 100"), 20, "a picture")  # noqa: B023
        assert "2 epochs" in texts[4] and "no widgets: marimo" in texts[4]
        assert "A static summary" in texts[5]
    finally:
        page.close()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_notebook_runs_top_to_bottom(path: Path, python, environment, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    set_parameters(notebook, SEED=0, EPOCHS=3, NAME="test")
    nbformat.write(notebook, tmp_path / path.name)
    for command in (["-m", "marimo", "convert", path.name, "-o", "app.py"], ["app.py"]):
        done = subprocess.run(
            [python, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^epoch 2 ", done.stderr, re.M)
