"""Five tasks of somebody who reads rollouts, by the browser's keys and by code: both find the same. Says how many keys are
pressed, how many characters are typed, and how long it takes until the answer is there, without the time to think.

    python -m pytest -m "slow or not slow" -s tests/browser/test_timed_tasks.py
"""

from __future__ import annotations

import time

import pytest

from .test_browser_in_lab import VIEW, focus, wait_until_mounted, wait_until_told

pytestmark = pytest.mark.slow

MAKE = """
import random
from pathlib import Path
from factories import item, make_epoch, sampled
from records import CALL, Views, stored

def tokens(words, chance):
    return [(f" {{word}}", -chance.expovariate(1.5)) for word in words.split()]

def epoch(number):
    chance = random.Random(number)
    right = 0.2 + 0.06 * number
    made = make_epoch({{f"q{{place}}": [float(chance.random() < right) for _ in range(8)] for place in range(40)}}, number)
    for place, group in enumerate(made.collection.trajectories):
        for generation, rollout in enumerate(group):
            call = sampled(*tokens("I add them", chance), tool_calls=[CALL], finish_reason="tool_calls")
            length = 3 + (place * 8 + generation) * 37 % 320 // (1 if number == 9 else 40)  # in epoch 9 no two are equal
            said = "the sum is " + " ".join(str(chance.randrange(99)) for _ in range(length))
            said += " sorry" if chance.random() < 0.02 else ""
            if (number, place, generation) == (9, 17, 5):  # it says every number, so that the right one is among them
                rollout.reward, said = 1.0, " ".join(map(str, range(400)))
            if (number, place, generation) == (9, 4, 3):
                call.logprobs[1] = -14.0
            answer = sampled(*tokens(said, chance))
            if (number, place, generation) == (9, 8, 2):
                answer.logprobs[1] = -16.0  # less likely, but no tool call
            asked = item("user", f"what is {{place}} + {{place}}?")
            rollout.episode = [asked, call, item("tool", "34", tool_call_id="c1"), answer]
    return made

class Run(Views):
    folder = Path({folder!r}) / "run"

run = Run(*stored(Path({folder!r}), *map(epoch, range(10))))
browser = run.browse()
browser
"""

LONGEST = """
t = run.trajectories(epoch=9)
t = t[t.reward == 1].sort_values("tokens")
run.show(t.trajectory.iloc[-1])
"""
COMPARE = """
run.compare("e9/q7/0", "e0/q7/0")
"""
LABEL = """
t = run.trajectories(epoch=9)
t = t.sort_values("tokens").drop_duplicates("example", keep="last")
run.label(t.trajectory[-20:], "long")
"""
CALLS = """
m = run.messages(epoch=9)
m = m[m.tool_calls.notna()][["trajectory", "message"]]
k = run.tokens(epoch=9).merge(m)
run.show(k.nsmallest(1, "logprob").trajectory.iloc[0])
"""
FIND = """
run.find("sorry")
"""
FOUND = "browser.example, browser.generation, browser.epoch"


def settle(notebook):
    notebook.page.wait_for_timeout(40)
    notebook.page.wait_for_function(f"() => {VIEW}.kernel.waiting.size === 0")
    notebook.page.wait_for_timeout(20)


def by_keys(notebook, *keys):
    """Presses the keys, each once what the one before asked for is there. A text is typed. Returns how many, and seconds."""
    focus(notebook)
    count, began = 0, time.monotonic()
    for key in keys:
        if len(key) > 1 and key.islower():
            notebook.page.keyboard.type(key)
            count += len(key)
        else:
            notebook.press(key)
            count += 1
        settle(notebook)
    return count, time.monotonic() - began


def by_code(notebook, index, code):
    """Runs the cell. Returns how many characters it has, and seconds until its output is there."""
    began = time.monotonic()
    notebook.run(index)
    assert "Error" not in notebook.text(index), notebook.text(index)
    return len(code.strip()), time.monotonic() - began


def test_five_tasks_by_keys_and_by_code(lab, tmp_path):
    codes = [LONGEST, COMPARE, LABEL, CALLS, FIND]
    looks = [
        FOUND,
        "run.labels().query('tag == \"mine\"')[['name']].name.sort_values().tolist() == "
        "run.labels().query('tag == \"long\"').name.sort_values().tolist(), len(run.labels())",
        "run.find('sorry').frame.trajectory.nunique()",
    ]
    notebook = lab.open([MAKE.format(folder=str(tmp_path)), *codes, *looks])
    notebook.run(0, 120)
    wait_until_mounted(notebook)
    page = notebook.page
    found: dict[str, tuple[tuple[int, float], tuple[int, float]]] = {}

    # The rollout that gamed the reward: the longest one that is right.
    keys = by_keys(notebook, "s", "s", "s")
    wait_until_told(notebook)
    notebook.run(6)
    assert eval(notebook.text(6)) == ("q17", 5, 9)
    found["the rollout that gamed the reward"] = keys, by_code(notebook, 1, LONGEST)
    assert "q17" in notebook.text(1)

    # What has changed between epochs 0 and 9 for one question.
    by_keys(notebook, "S", "S", "S")
    for _ in range(40):
        if page.locator(".ftb .head .id").first.inner_text() == "q7":
            break
        by_keys(notebook, "j")
    keys = by_keys(notebook, "C", "{", "d")
    assert page.locator(".ftb .turn.parts").count() == 2
    heads = page.locator(".ftb .what select").evaluate_all("all => all.map(each => each.value)")
    assert heads == ["0", "9"] and set(page.locator(".ftb .head .id").all_inner_texts()) == {"q7"}
    found["what changed between epochs 0 and 9"] = keys, by_code(notebook, 2, COMPARE)

    # 20 labels: on the longest rollout of each of 20 questions.
    by_keys(notebook, "c", "}", "s", "s", "s")
    keys = by_keys(notebook, "x", "mine", "Enter", *["j", "X"] * 19)
    found["20 labels"] = keys, by_code(notebook, 3, LABEL)
    notebook.run(7)
    assert eval(notebook.text(7)) == (True, 40)

    # The least likely tool call.
    by_keys(notebook, "g", "S", "S", "S")
    keys = by_keys(notebook, "s", "s", "s", "s", "s", ".")
    wait_until_told(notebook)
    notebook.run(6)
    assert eval(notebook.text(6)) == ("q4", 3, 9)
    assert "-14" in page.locator(".ftb .inspector").inner_text()
    found["the least likely tool call"] = keys, by_code(notebook, 4, CALLS)
    assert "q4" in notebook.text(4)

    # All rollouts that mention a word.
    keys = by_keys(notebook, "/", "sorry", "Enter")
    began = time.monotonic()
    page.locator(".ftb .say", has_text="rollouts in").wait_for()
    keys = keys[0], keys[1] + time.monotonic() - began
    said = page.locator(".ftb .say").inner_text()
    found["all rollouts that mention a word"] = keys, by_code(notebook, 5, FIND)
    notebook.run(8)
    assert said.startswith(f"{notebook.text(8)} rollouts in ")

    print("\n| task | keys | seconds | characters of code | seconds |\n|---|---|---|---|---|")
    for task, ((count, seconds), (characters, of_code)) in found.items():
        print(f"| {task} | {count} | {seconds:.1f} | {characters} | {of_code:.1f} |")
    assert [keys[0] for keys, _ in found.values()] == [3, 3, 44, 6, 7]
