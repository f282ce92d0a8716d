"""The demo as a user runs it: the embedded model learns, and a repeat is equal to the last digit."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from planted_faults import SEEDS

pytestmark = pytest.mark.slow


def demo(folder, seed, epochs):
    command = [sys.executable, "-m", "finetune_nb", "demo", "--seed", str(seed), "--epochs", str(epochs)]
    done = subprocess.run(
        [*command, "--out", str(folder), "--json", str(folder / "figures.json")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return json.loads((folder / "figures.json").read_text()), done.stdout


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_demo_learns_to_use_its_tool(tmp_path, seed):
    figures, printed = demo(tmp_path, seed, 15)
    assert figures["held_out_before"] <= 0.45
    assert figures["held_out_after"] >= 0.80
    first, last = figures["epochs"][0], figures["epochs"][-1]
    assert len(figures["epochs"]) == 15
    assert last["mean_reward"] > first["mean_reward"] + 0.3
    assert last["scores"]["guessed"] < first["scores"]["guessed"]  # what explains the climb
    assert last["scores"]["used_tool"] > first["scores"]["used_tool"] + 0.3
    assert printed.count("groups teach") == 15
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") >= 3
    notebook = json.loads((tmp_path / "demo.ipynb").read_text(encoding="utf-8"))
    assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")


def test_a_repeat_of_a_seed_is_equal_to_the_last_digit(tmp_path):
    def numbers(figures):
        for epoch in figures["epochs"]:
            epoch["training"].pop("seconds")
        return figures["held_out_before"], figures["held_out_after"], figures["epochs"]

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert numbers(demo(tmp_path / "a", 5, 3)[0]) == numbers(demo(tmp_path / "b", 5, 3)[0])
