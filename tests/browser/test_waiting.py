"""A cell that waits for a run: its stop button, its widgets; and the display that stays in the cell that started one."""

import statistics

import pytest

SETUP = """
import asyncio, sys
import ipywidgets
import finetune_nb as ft
from browser import probe
from finetune_nb.testing import sums
from small_agents import guess, right
from detached import Weights

async def slow(question, llm):
    await asyncio.sleep(seconds)
    probe.note("rollout")
    return await guess(question, llm)

seconds = 0.3

def new_run(name):
    return ft.Run(slow, right, sums(6), adapter=Weights(), generations=4, max_concurrency=4, output_dir={folder!r}, name=name)

def told(run):
    probe.note("left", state=run.state, epochs=len(run), partial=run.partial is not None)
"""
WAITS = {
    "wait": "run.start(epochs=50); run.wait()",
    "wait_async": "run.start(epochs=50); await run.wait_async()",
    "next_epoch": "\n    while True: await run.next_epoch()",
}
CELL = "seconds = {seconds}; run = new_run({name!r})\ntry: {body}\nfinally: told(run)"
SLIDER = """
run = new_run("slider")
slider = ipywidgets.FloatSlider(value=0.1, min=0.1, max=1, step=0.01)
slider.observe(lambda change: probe.note("moved", value=change.new), "value")
slider
"""


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("mode", WAITS)
def test_the_stop_button_ends_behind_the_epoch_and_pressed_again_at_once(lab, runs_folder, mode):
    seconds = {1: 0.3, 2: 2}  # of a rollout; the second epoch lasts until both presses have been heard, however slowly
    cells = [CELL.format(seconds=seconds[n], name=f"{mode}-{n}", body=WAITS[mode]) for n in (1, 2)]
    notebook = lab.open([SETUP.format(folder=str(runs_folder)), *cells, "1 + 1"])
    notebook.run(0)
    for presses in (1, 2):
        lab.forget_events()
        notebook.start(presses)
        lab.wait_for_event("rollout", 4, 60)
        notebook.wait_for_text(presses, "rollouts")  # the cell waits
        notebook.interrupt()
        if presses == 2:
            notebook.wait_for_text(2, "interrupt again to abort it")
            notebook.interrupt()
        notebook.wait_idle(presses, 30)
        (left,) = lab.wait_for_event("left")
        if presses == 1:
            assert (left["state"], left["epochs"], left["partial"]) == ("ready", 1, False)
            assert ("KeyboardInterrupt" in notebook.text(1)) == (mode == "next_epoch")
        else:
            assert left["state"] in ("ready", "aborting") and left["epochs"] == 0
            assert "KeyboardInterrupt" in notebook.text(2)
    notebook.run(3)
    assert notebook.text(3) == "2"


@pytest.mark.parametrize("mode", [pytest.param("wait", marks=[pytest.mark.slow, pytest.mark.proof]), "next_epoch"])
def test_a_slider_that_was_never_touched_is_heard_while_a_cell_waits(lab, runs_folder, mode):
    waits = {"wait": "run.start(epochs=2); run.wait()", "next_epoch": "await run.next_epoch(); await run.next_epoch()"}
    notebook = lab.open([SETUP.format(folder=str(runs_folder)), SLIDER, f"{waits[mode]}; told(run)"])
    notebook.run(0)
    notebook.run(1)
    notebook.start(2)
    lab.wait_for_event("rollout", 4)
    notebook.focus_slider(1)
    taken = []
    for count in range(1, 11):
        pressed = notebook.press("ArrowRight")
        taken.append(lab.wait_for_event("moved", count)[-1]["time"] - pressed)
    assert lab.events("left") == []  # the cell still waited
    print(f"{mode}: a key reaches the kernel in {1000 * statistics.median(taken):.0f} ms (median of 10)")
    (left,) = lab.wait_for_event("left", seconds=60)
    assert left["epochs"] == 2


@pytest.mark.slow
@pytest.mark.proof
def test_the_cell_that_started_a_run_shows_each_epoch_and_is_saved_with_the_last(lab, runs_folder):
    notebook = lab.open(
        [SETUP.format(folder=str(runs_folder)), 'run = new_run("record"); run.start(epochs=2)', "run.wait()"]
    )
    notebook.run(0)
    notebook.run(1)
    notebook.wait_for_text(1, "2 epochs", 60)  # from the run's own thread: no cell waits
    notebook.run(2)
    (record,) = notebook.save().cells[1].outputs
    assert {"text/html", "image/png"} <= set(record.data) and "2 epochs" in record.data["text/html"]
    assert notebook.path.stat().st_size < 300_000
