"""IPython in a terminal: no front end, and a prompt that shows text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SESSION = """
import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums
from small_agents import coin, guess, right
policy = ScriptedPolicy(coin)
run = ft.Run(guess, right, sums(6), adapter=FakeAdapter(policy=policy), generations=4, output_dir={folder!r})
epoch = await run.next_epoch()
run
run.start(epochs=1); run.wait()
run.panel()
run.browse()
run.plot_rewards().png()[:4]
print(len(run), "epochs, torch:", "torch" in __import__("sys").modules)
exit
"""


@pytest.mark.slow
def test_ipython_in_a_terminal_runs_epochs_and_shows_them_as_text(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "TERM": "dumb",
    }
    command = [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor"]
    session = SESSION.format(folder=str(tmp_path / "runs"))
    done = subprocess.run(command, input=session, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout and "Error" not in done.stdout, done.stdout
    assert "2 epochs, torch: False" in done.stdout and "PNG" in done.stdout
    assert "epoch 0" in done.stdout  # the run, as text
    assert "ready  2 epochs" in done.stdout and "epoch 1 of 2 epochs" in done.stdout  # the panel, and the browser
