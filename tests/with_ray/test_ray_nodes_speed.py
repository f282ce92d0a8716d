"""What a second node takes off an epoch of agents that wait. The figure of notebooks/reference/scale.md comes from

python -m pytest tests/with_ray/test_ray_nodes_speed.py -m slow -s
"""

import statistics
from itertools import chain

import pytest
from hosts import ENGINE
from measuring import Measured

pytestmark = pytest.mark.slow

SIDES = {"one": {"workers": 1, "worker_cpus": 1}, "two": {"workers": 2, "worker_cpus": 1}}
TURNS, EPOCHS = 2, 3
ROWS, GENERATIONS, SLOTS, SECONDS = 24, 4, 8, 0.5


def test_two_nodes_take_little_more_than_half_of_the_time_of_one(make_host, tmp_path, capsys):
    first, second = make_host(), make_host()
    first.start_ray(cpus=1)
    second.start_ray(first, cpus=1)
    marks = {side: [tmp_path / f"{side}{turn}" for turn in range(TURNS)] for side in SIDES}
    for place in chain(*marks.values()):
        place.mkdir()
    options = {"sides": SIDES, "turns": TURNS, "epochs": EPOCHS, "marks": tmp_path}
    options |= {"rows": ROWS, "slots": SLOTS, "seconds": SECONDS}
    found = first.kernel("epochs_by_turns", folder=first.own / "runs", engine=ENGINE, **options).found(600.0)
    assert {epoch["rollouts"] for epoch in found} == {ROWS * GENERATIONS}
    # A node of one CPU has room for one worker.
    hosts = {side: [len(list(place.iterdir())) for place in marks[side]] for side in SIDES}
    assert hosts == {"one": [1] * TURNS, "two": [2] * TURNS}

    turns = {side: [[] for _ in range(TURNS)] for side in SIDES}
    for epoch in found:
        turns[epoch["side"]][epoch["turn"]].append(epoch["seconds"])
    compared = Measured({side: [statistics.median(turn) for turn in turns[side]] for side in SIDES})
    one, two, ratio = compared["one"], compared["two"], compared.ratio("two", "one")
    with capsys.disabled():
        waves = ROWS * GENERATIONS / SLOTS
        print(f"\nan epoch of {ROWS * GENERATIONS} agents that wait {SECONDS} s in one of {SLOTS} slots of each node:")
        print(f"  on one node {one:.2f} s (waiting alone: {waves * SECONDS:g} s), on two {two:.2f} s "
              f"({waves * SECONDS / 2:g} s), {ratio:.2f} of it")  # fmt: skip
    assert ratio < 0.75
