"""Killed while one epoch trains and the next one is sampled: nothing is lost, and nothing is trained twice."""

import asyncio
import json
import random

import killed
import pytest
from test_kills import go_through, jobs_of

from finetune_nb.store.store import RunStore

POINTS = [
    "ahead",
    "begun ahead",
    "taken up",
    "begin",
    "collected",
    "selected",
    "submit",
    "submitted",
    "job",
    "waited",
    "checkpoint",
    "append",
    "prune",
]


def record_of(folder):
    """All that may not depend on when a run was killed. The first epoch after that is sampled from the newest weights."""
    found = killed.record_of(folder)
    for epoch in found:
        del epoch["metrics"], epoch["versions"]
    return found


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")

    async def run():
        whole = killed.make(folder, "ahead")
        whole.start(killed.EPOCHS)
        await whole.wait_async()
        assert whole.epochs().version_lag.tolist() == [0] + [1] * (killed.EPOCHS - 1)
        await asyncio.to_thread(whole.close)

    asyncio.run(run())
    return record_of(folder / "run")


def check_whole(folder, straight):
    assert record_of(folder / "run") == straight
    epochs = RunStore.open(folder / "run").epochs
    assert [epoch.policy_versions[1] for epoch in epochs] == [*range(1, killed.EPOCHS + 1)]  # each trained once
    assert all(epoch.metrics.version_lag in (0, 1) for epoch in epochs)
    assert all(
        epoch.policy_versions[0] == epoch.index - epoch.metrics.version_lag
        and {t.metadata["policy_version"] for g in epoch.collection.trajectories for t in g}
        == {epoch.policy_versions[0]}
        for epoch in epochs
    )
    lines = (folder / "run" / "training_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [*range(killed.EPOCHS)]


@pytest.mark.slow
def test_killed_once_in_every_phase_of_two_epochs_at_once(killer, tmp_path, never_killed):
    tasks = [{"point": point, "when": when, "nth": 2} for point in POINTS for when in ("before", "after")]
    kills, reached = go_through(killer, tmp_path, never_killed, tasks, check_whole, backend="ahead")
    assert kills >= 15
    assert reached >= {*POINTS} - {
        "prune",
        "selected",
        "collected",
    }  # rollouts that took no time are kept with their epoch


@pytest.mark.slow
def test_killed_at_random_moments(killer, tmp_path, never_killed):
    rng = random.Random(11)
    tasks = [{"after": rng.uniform(0.01, 0.35)} for _ in range(30)]
    kills, _ = go_through(killer, tmp_path, never_killed, tasks, check_whole, backend="ahead")
    assert kills >= 20


@pytest.mark.slow
def test_a_job_that_outlives_its_process_is_found_again_and_the_epoch_after_it_sampled_anew(killer, tmp_path):
    for point, when in (("job", "before"), ("begun ahead", "after"), ("waited", "after"), ("append", "before")):
        folder = tmp_path / f"{point}-{when}"
        folder.mkdir()
        assert killer(folder=folder, backend="detached ahead", point=point, when=when, nth=2)["killed"]
        assert killer(folder=folder, backend="detached ahead", after=120) == {"killed": False, "code": 0}
        epochs = RunStore.open(folder / "run").epochs
        assert [epoch.index for epoch in epochs] == [*range(killed.EPOCHS)]
        assert [epoch.policy_versions[1] for epoch in epochs] == [*range(1, killed.EPOCHS + 1)]
        assert len(jobs_of(folder)) == killed.EPOCHS, (point, when)
