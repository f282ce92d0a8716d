"""The trajectory browser on 100,000 rollouts in a real JupyterLab, while a run trains in the same kernel: how long until it is
there, until a rollout of 18,000 tokens is painted, until a search of 800,000 rollouts has its first hits, and what the page's
memory does meanwhile. Targets are printed; what fails is a size or a ratio of one run.

    python -m pytest -m "slow or not slow" -s tests/browser/test_browser_scale.py
    BROWSE_MINUTES=10 python -m pytest -m "slow or not slow" -s tests/browser/test_browser_scale.py
"""

from __future__ import annotations

import os
import statistics
import time

import pytest

from .test_browser_in_lab import VIEW, focus, wait_until_mounted

pytestmark = [pytest.mark.slow, pytest.mark.measures]

MINUTES = float(os.environ.get("BROWSE_MINUTES", "0.3"))
"""How long a hand goes through the rollouts."""

MAKE = """
import random
from pathlib import Path
from browser import stage
from factories import item, sampled
from records import Views, epoch_of
from finetune_nb.store.store import RunStore
from finetune_nb.types import EpisodeItem, EpisodeItemRole, Trajectory

WORDS = "amber tokyo paris rome answer sum total river mountain cloud data model reward token policy group".split()
chance = random.Random(0)

def said(role, words):
    text = " ".join(chance.choices(WORDS, k=words))
    return EpisodeItem.model_construct(role=role, content=text, logprobs=None, metadata=None)

def long_episode():
    episode = [item("user", "the question " * 50)]
    for _ in range(23):
        tokens = [(" " + chance.choice(WORDS), -chance.expovariate(2.0)) for _ in range(783)]
        episode += [sampled(*tokens), item("tool", "result " * 200)]
    return episode

def epoch(number, groups=12_500):
    made = []
    for place in range(groups):
        group = []
        for generation in range(8):
            episode = [said(EpisodeItemRole.USER, 8), said(EpisodeItemRole.ASSISTANT, 30)]
            metadata = {{"id": f"q{{place}}", "generation": generation}}
            reward = float(chance.random() < 0.5)
            group.append(Trajectory.model_construct(episode=episode, reward=reward, shaped_rewards=None, metadata=metadata))
        made.append(group)
    if number == 7:
        for group in made[:4]:
            for rollout in group:
                rollout.episode = long_episode()
        made[9_000][3].episode[1].content += " Bertelsmann"
    return epoch_of(made, number)

class Run(Views):
    folder = Path({folder!r}) / "run"

with RunStore.create(Run.folder, "run", {{}}) as store:
    for number in range(8):
        store.append(epoch(number), {{}})
run = Run(*RunStore.open(Run.folder).epochs)
live = stage.make_run({folder!r}, seconds=1.0, epochs=100_000)
live.start()
"""


def memory(page):
    """Bytes of the page's JavaScript after a collection, and how many nodes its document has."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    session.send("HeapProfiler.collectGarbage")
    found = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
    session.detach()
    return found["JSHeapUsedSize"], found["Nodes"]


def press(notebook, key, may_end=False):
    """Presses a key and waits until the rollout that it opens is painted.

    Args:
        may_end: Whether there may be nothing more in that direction.

    Returns:
        What the page measured of it; None if there was nothing more.
    """
    notebook.page.evaluate(f"{VIEW}.timings.push(null), window.pressed = performance.now()")
    notebook.press(key)
    there = f"{VIEW}.timings.at(-1) !== null"
    at_the_end = f"performance.now() > pressed + 2000 && {VIEW}.kernel.waiting.size === 0 && {VIEW}.opening === 0"
    notebook.page.wait_for_function(f"() => {there} || ({str(may_end).lower()} && {at_the_end})", timeout=60_000)
    return notebook.page.evaluate(f"{VIEW}.timings.at(-1)")


def first_paint(notebook):
    """Runs the cell that shows the browser. Returns the seconds until a rollout is there."""
    notebook.page.evaluate("() => document.querySelectorAll('.ftb').forEach((each) => each.remove())")
    began = time.monotonic()
    notebook.start(1)
    wait_until_mounted(notebook)
    seconds = time.monotonic() - began
    notebook.wait_idle(1)
    return seconds


def test_a_hundred_thousand_rollouts_are_read_while_a_run_trains(lab, runs_folder):
    notebook = lab.open(
        [
            MAKE.format(folder=str(runs_folder)),
            "browser = run.browse(epoch=7)\nbrowser",
            "browser.filter = {}; live.records[-1].index",
        ]
    )
    notebook.run(0, 600)
    first_paints = [first_paint(notebook) for _ in range(3)]
    size = notebook.page.evaluate(
        f"Object.values({VIEW}.index).reduce((sum, each) => sum + (each?.byteLength ?? 0), 0)"
    )
    focus(notebook)

    opened = [press(notebook, key, may_end=True) for key in "lllllll" + 3 * "jlllllll"]
    opened = [each for each in opened if each is not None]
    assert len(opened) > 15
    assert {each["tokens"] for each in opened} == {23 * 783}
    paints = sorted(each["all"] for each in opened)

    short = [press(notebook, "j") for _ in range(40)]
    moved = sorted(each["all"] for each in short)

    notebook.press("/")
    notebook.page.keyboard.type("Bertelsmann")
    began = time.monotonic()
    notebook.press("Enter")
    notebook.page.wait_for_function(f"() => {VIEW}.hitsByEpoch.size > 0", timeout=60_000)
    first_hits = time.monotonic() - began
    notebook.page.wait_for_function(f"() => {VIEW}.hitsByEpoch.size === 8", timeout=120_000)
    all_hits = time.monotonic() - began
    notebook.run(2)
    epochs_before = int(notebook.text(2))
    notebook.page.wait_for_function(f"() => {VIEW}.order.length > 1 && {VIEW}.opening === 0")
    focus(notebook)
    warm = [memory(notebook.page)]
    end = time.monotonic() + 60 * MINUTES
    keys = 0
    while time.monotonic() < end:
        for key in "jjjlljjhjj":
            press(notebook, key, may_end=key in "hl")
        keys += 10
        if keys % 200 == 0:
            warm.append(memory(notebook.page))
    warm.append(memory(notebook.page))
    notebook.run(2)
    epochs = int(notebook.text(2)) - epochs_before

    heaps = [heap / 1e6 for heap, _ in warm]
    shown = " ".join(f"{each:.2f}" for each in first_paints)
    print(f"\n100,000 rollouts: index {size / 1e6:.2f} MB (at most 4), painted after {shown} s (target 1)")
    middle, slowest = statistics.median(paints), paints[-1]
    print(f"18,000 tokens, new to the page: median {middle:.0f} ms, slowest {slowest:.0f} (target 300)")
    print(f"short rollouts: median {statistics.median(moved):.0f} ms, slowest {moved[-1]:.0f}")
    print(f"search of 800,000 rollouts: first hits after {first_hits:.2f} s (target 1), all after {all_hits:.1f} s")
    used = " ".join(f"{each:.1f}" for each in heaps)
    print(f"{keys} keys in {MINUTES:g} min beside {epochs} epochs: heap {used} MB,")
    print(f"nodes {' '.join(f'{nodes:.0f}' for _, nodes in warm)}")
    assert 0 < size <= 4e6
    assert epochs > 0
    # Caches are full after the first keys: what comes later takes the place of something.
    assert heaps[-1] < 1.25 * max(heaps[:2]) + 40
