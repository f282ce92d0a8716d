"""The trainer's actor on another host than the kernel: either of them dies, or the kernel comes back elsewhere."""

import signal

import pytest
from hosts import ENGINE, ended_after

pytestmark = pytest.mark.slow

ACTORS = """
import ray
ray.init(address="10.77.0.1:6379", log_to_driver=False)
print(*[named["name"] for named in ray.util.list_named_actors(all_namespaces=True)])
"""


@pytest.fixture(scope="module")
def cluster(make_host):
    """The head has one CPU, and the other node two: a trainer that wants two can only be there."""
    nodes = [make_host(), make_host()]
    nodes[0].start_ray(cpus=1)
    nodes[1].start_ray(nodes[0], cpus=2)
    return nodes


def actors(host):
    return host.python("-c", ACTORS).split()


def test_killed_kernel_comes_back_on_the_other_node_and_finds_actor_and_job(cluster):
    first, second = cluster
    options = {"folder": first.shared / "a", "engine": ENGINE, "epochs": 1}
    killed = first.kernel("trained", die="job", **options)
    assert killed.wait() == -signal.SIGKILL
    job = killed.told()[-1]["job"]
    assert len(actors(second)) == 1
    again = second.kernel("trained", **options)
    opened, *_, epoch = again.found()
    assert opened == {"opened": 0}
    assert (epoch["epoch"], epoch["status"], epoch["versions"]) == (0, "completed", [0, 1])
    assert epoch["job"] == job
    assert epoch["rollouts"] == 8 * 8
    assert "was found again" in again.said()
    assert not actors(first)


def test_actor_of_a_dead_kernel_ends_by_itself_after_its_job_and_the_timeout(cluster):
    first = cluster[0]
    options = {"folder": first.shared / "b", "engine": ENGINE, "epochs": 1, "orphan_timeout": 8.0}
    killed = first.kernel("trained", die="job", **options)
    assert killed.wait() == -signal.SIGKILL
    assert ended_after(100, lambda: not actors(first))
    again = first.kernel("trained", **options)
    *_, epoch = again.found()
    assert (epoch["epoch"], epoch["status"], epoch["versions"]) == (0, "completed", [0, 1])
    assert "a new one continues from the newest checkpoint" in again.said()


def test_killed_node_of_the_trainer_costs_the_epoch_and_the_run_continues_on_another(cluster, make_host):
    first, second = cluster
    options = {"folder": first.shared / "c", "engine": ENGINE, "epochs": 3}
    kernel = first.kernel("trained", **options)
    kernel.until(lambda: any(line.get("training") == 1 for line in kernel.told()))
    second.kill()
    assert "the trainer's actor was lost" in str(kernel.found())
    third = make_host()
    third.start_ray(first, cpus=2)
    *_, before, after = first.kernel("trained", **{**options, "epochs": 1}).found()
    # The job may have ended before its node did: then its epoch was recorded, but no checkpoint could be written.
    assert after["epoch"] == before["epoch"] + 1
    assert (before["versions"][1], after["status"]) == (after["versions"][0], "completed")
    assert before["rollouts"] == after["rollouts"] == 8 * 8
    assert after["gap"] < 1e-4
