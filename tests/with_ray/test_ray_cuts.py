"""A node that is cut off in the middle of an epoch and comes back. The figure of notebooks/reference/scale.md comes from

FINETUNE_NB_CUTS=20 python -m pytest tests/with_ray/test_ray_cuts.py -m slow -s
"""

import os
import random
import time

import pytest
from hosts import ENGINE

pytestmark = pytest.mark.slow

CUTS = int(os.environ.get("FINETUNE_NB_CUTS", "4"))
ROWS, GENERATIONS = 30, 4


def processes(host, name):
    return host.run("sh", "-c", f"pgrep -c -f {name} || true").strip() != "0"


def test_no_trajectory_is_lost_or_doubled_when_a_node_is_cut_off(make_host, capsys):
    first, second = make_host(), make_host()
    first.start_ray(cpus=1)
    second.start_ray(first, cpus=1)
    options = {"rows": ROWS, "generations": GENERATIONS, "max_concurrency": 8, "seconds": 0.5}
    options |= {"until": first.shared / "stop", "ray": {"workers": 2, "worker_cpus": 1}}
    kernel = first.kernel("epochs_until", folder=first.own / "run", engine=ENGINE, **options)
    chance, restarts, deaths = random.Random(0), 0, lambda: kernel.said().count("a rollout worker was lost")

    def at_work():
        """Whether the second node has rollouts. A node that the cluster has given up is told so when it is back, and ends."""
        nonlocal restarts
        if not processes(second, "'[r]aylet/raylet'"):
            restarts += 1
            second.stop_ray()
            second.start_ray(first, cpus=1)
        return processes(second, "'^ray::RolloutWorker.run'")

    for cut in range(CUTS):
        kernel.until(at_work)
        time.sleep(chance.uniform(0.0, 1.0))
        before = deaths()
        second.cut_off()
        if cut % 4 < 3:
            time.sleep(chance.uniform(0.5, 2.5))
        else:  # until the cluster gives it up
            kernel.until(lambda before=before: deaths() > before)
        second.connect()
    kernel.until(at_work)
    (first.shared / "stop").touch()
    epochs = kernel.found()
    with capsys.disabled():
        rollouts = sum(epoch["rollouts"] for epoch in epochs)
        print(
            f"\n{CUTS} cuts of a node, which was started again {restarts} times: {rollouts} rollouts, {len(epochs)} epochs"
        )
        lost = sum(ROWS * GENERATIONS - epoch["different"] for epoch in epochs)
        print(f"lost: {lost}, doubled: {sum(epoch['rollouts'] - epoch['different'] for epoch in epochs)}")
    for epoch in epochs:
        assert epoch["rollouts"] == epoch["different"] == epoch["done"] == epoch["total"] == ROWS * GENERATIONS
        assert set(epoch["failures"]) <= {"ValueError: no zeros"}
