"""A kernel as VS Code drives it: named in its environment, a person at the front end, no subshell. Its window is not here: no
message comes to a widget."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

from finetune_nb.notebook.mount import WIDGET

TESTS = Path(__file__).parents[1]
SETUP = """
import asyncio
import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from small_agents import coin, guess, right

async def slow(question, llm):
    await asyncio.sleep(1)
    return await guess(question, llm)

run = ft.Run(slow, right, sums(6), adapter=FakeAdapter(policy=ScriptedPolicy(coin)), generations=4, max_concurrency=6,
             output_dir={folder!r})
"""


class Here(KernelManager):
    """Kernels of this Python."""

    def format_kernel_cmd(self, extra_arguments=None):
        return [sys.executable, *super().format_kernel_cmd(extra_arguments)[1:]]


@pytest.fixture
def execute():
    """Runs a cell; gives what it shows, by kind of message."""
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS / "support")))
    environment = {**os.environ, "PYTHONPATH": paths, "VSCODE_PID": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    manager = Here()
    manager.start_kernel(env=environment)
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(120)

    def execute(code):
        shown = []
        reply = client.execute_interactive(code, allow_stdin=True, timeout=120, output_hook=shown.append)
        assert reply["content"]["status"] == "ok", shown
        return [(each["msg_type"], each["content"]) for each in shown]

    yield execute
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_a_cell_with_a_panel_names_its_widget_and_the_run_goes_on_without_an_answer(execute, tmp_path):
    execute(SETUP.format(folder=str(tmp_path)))
    shown = execute("panel = run.panel(); panel")
    (cell,) = [content["data"] for _, content in shown if "text/html" in content.get("data", {})]
    assert {"text/plain", "text/html", WIDGET} == set(cell) and "no epoch" in cell["text/html"]
    opened = {content["comm_id"] for kind, content in shown if kind == "comm_open"}
    assert cell[WIDGET]["model_id"] in opened

    shown = execute("run.start(epochs=1); run.wait()")
    lines = "".join(content["data"].get("text/html", "") for _, content in shown if "data" in content)
    assert lines.count("changes made in widgets count when this cell has ended (the front end uses no subshells") >= 1
    assert [content["text"] for _, content in execute("print(len(run), run.state)") if "text" in content] == [
        "1 ready\n"
    ]

    (browser,) = [content["data"] for _, content in execute("run.browse()") if "text/html" in content.get("data", {})]
    assert WIDGET in browser and "Trajectories of" in browser["text/html"]
    # Messages of the browser's widget may come in between: they have data, too.
    shown = [content.get("data", {}) for _, content in execute("run.plot_rewards()")]
    assert sum("image/png" in data for data in shown) == 1
