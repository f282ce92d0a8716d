"""What an epoch of very many trajectories costs, each stage of it: no stage may grow faster than n log n.

    FINETUNE_NB_TRAJECTORIES=100000 FINETUNE_NB_EPOCHS=10 python -m pytest tests/benchmarks/test_million.py -m measures -s

is the full size: about half an hour of CPU, multiplied from an epoch of 100,000. By default it is about a minute of CPU.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measuring import Measured

SCRIPT = Path(__file__).parent.parent / "support" / "million.py"
FULL = "FINETUNE_NB_TRAJECTORIES" in os.environ
TRAJECTORIES = int(os.environ.get("FINETUNE_NB_TRAJECTORIES", "8000"))
EPOCHS = int(os.environ.get("FINETUNE_NB_EPOCHS", "1"))
TIMES, ROUNDS = 8, 2
ONCE = {"export .html"}
"""Stages whose work has a bound, whatever the epoch's size."""
SECONDS = 0.05
"""What took less in the larger run is not compared: imports and the clock would decide."""


def measured(folder, trajectories, epochs):
    folder.mkdir()
    sizes = ["--trajectories", str(trajectories), "--epochs", str(epochs), "--megabytes", "10" if FULL else "1"]
    command = [sys.executable, str(SCRIPT), str(folder), *sizes]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the memory from /proc")
@pytest.mark.benchmark(group="million")
def test_no_stage_of_an_epoch_grows_faster_than_n_log_n(benchmark, tmp_path):
    rounds = 1 if FULL else ROUNDS
    sizes = {"few": TRAJECTORIES // TIMES, "many": TRAJECTORIES}
    found = {side: [] for side in sizes}

    def by_turns():
        for turn in range(rounds):
            for side, size in sizes.items():
                found[side].append(measured(tmp_path / f"{side}{turn}", size, EPOCHS))

    benchmark.pedantic(by_turns, rounds=1)
    allowed = TIMES * math.log(sizes["many"]) / math.log(sizes["few"])
    grown = {}
    print()
    # Few rollouts may be over before the first of them are kept.
    everywhere = set.intersection(*(set(each["seconds"]) for runs in found.values() for each in runs))
    for stage in found["many"][0]["seconds"]:
        if stage not in everywhere:
            continue
        of = Measured({side: [each["seconds"][stage] for each in runs] for side, runs in found.items()})
        grown[stage] = of.ratio("many", "few")
        print(f"{stage:20} {of['many']:8.2f} s CPU, {grown[stage]:5.1f} times {sizes['few']:,}; "
              f"{found['many'][0]['megabytes'][stage]:6.0f} MB")  # fmt: skip
    print(found["many"][0]["disk"])
    slow = {stage for stage in grown if found["many"][0]["seconds"][stage] > SECONDS} - ONCE
    assert {"collection", "record", "selection", "frame"} <= set(grown)
    assert {"collection", "record"} <= slow
    assert {stage: times for stage, times in grown.items() if stage in slow and times > 1.5 * allowed} == {}
