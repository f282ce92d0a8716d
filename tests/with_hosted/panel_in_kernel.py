"""Drives a kernel as a front end does, which takes input from a person and is told of every widget; prints what it was told of
a run's panel, as JSON.

python panel_in_kernel.py colab|kaggle
"""

import json
import sys

from jupyter_client.manager import start_new_kernel

COLAB = 'import sys, types; sys.modules["google.colab"] = types.ModuleType("google.colab")'
SETUP = """
import tempfile
import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

def guess(question): return "7"
def right(output, answer): return float(answer in output)

run = ft.Run(guess, right, sums(6), adapter=FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "7")), generations=4,
             output_dir=tempfile.mkdtemp())
"""
MOVE = """
percentile = next(each for each in panel.inputs.all() if each.name == "percentile")
percentile.widget.value = 0.6
print(run._settings.draft["percentile"])
"""
manager, client = start_new_kernel(kernel_name="python3")


def execute(code):
    """What the cell shows, and how many widgets it opens."""
    asked = client.execute(code, allow_stdin=True)
    shown, opened = [], 0
    while True:
        message = client.get_iopub_msg(timeout=120)
        if message["parent_header"].get("msg_id") != asked:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "error":
            sys.exit("\n".join(content["traceback"]))
        opened += kind == "comm_open"
        if kind in ("display_data", "execute_result", "stream"):
            shown.append(content)
        if kind == "status" and content["execution_state"] == "idle":
            return shown, opened


try:
    if sys.argv[1] == "colab":
        execute(COLAB)
    execute(SETUP)
    panel, opened = execute("panel = run.panel(); panel")
    moved, _ = execute(MOVE)
    kinds = sorted({kind for each in panel for kind in each.get("data", {})})
    print(json.dumps({"open": opened, "types": kinds, "drafted": float(moved[-1]["text"])}))
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
