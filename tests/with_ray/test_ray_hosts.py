"""Two nodes of a Ray cluster on hosts of their own give the same rollouts as one process."""

import json

import pytest
from hosts import ENGINE

pytestmark = pytest.mark.slow

TWO = {"workers": 2, "worker_cpus": 1}  # one on each node of one CPU


@pytest.fixture(scope="module")
def cluster(make_host):
    """Two nodes of one CPU each; the first one is the head."""
    nodes = [make_host(), make_host()]
    nodes[0].start_ray(cpus=1)
    nodes[1].start_ray(nodes[0], cpus=1)
    return nodes


def marks_in(folder):
    return sorted(mark.name for mark in folder.iterdir())


@pytest.mark.proof
def test_two_nodes_give_the_trajectories_that_one_process_gives(cluster, tmp_path):
    second = cluster[1]
    (here,) = second.kernel("an_epoch", folder=second.own / "a", engine="local").found()
    (there,) = second.kernel("an_epoch", folder=second.own / "b", engine=ENGINE, marks=tmp_path, ray=TWO).found()
    assert there["told"] == here["told"]
    trajectories, failures = there["told"]
    assert len(trajectories) > 16
    assert failures
    assert marks_in(tmp_path) == ["host1", "host2"]


def test_module_that_only_the_kernel_has_comes_by_runtime_env(cluster, tmp_path):
    first = cluster[0]
    folder = first.own / "code"
    first.run("sh", "-c", f"mkdir {folder}; echo 'def loud(text): return text + \"!\"' > {folder}/only_here.py")
    options = {"what": "an_epoch", "path": folder, "module": "only_here", "marks": tmp_path}
    (here,) = first.kernel(folder=first.own / "c", engine="local", **options).found()
    (without,) = first.kernel(folder=first.own / "d", engine=ENGINE, ray=TWO, **options).found()
    # Of the generations, those that came to the other node failed.
    assert "No module named 'only_here'. Expected everything that the workflow needs on every node" in json.dumps(
        without
    )
    settings = {**TWO, "runtime_env": {"working_dir": folder}}
    (there,) = first.kernel(folder=first.own / "e", engine=ENGINE, ray=settings, **options).found()
    assert there["told"] == here["told"]
    assert "!" in json.dumps(there["told"])
    assert marks_in(tmp_path) == ["host1", "host2"]


def test_unfinished_file_of_one_host_is_left_alone_by_another(cluster):
    first, second = cluster
    runs, stop = first.shared / "runs", first.shared / "written"
    runs.mkdir()
    first.run("sh", "-c", "echo 20000 > /proc/sys/kernel/ns_last_pid")  # so that the second host has no such process
    writer = first.kernel("write_slowly", file=runs / "all.parquet", until=stop)
    writer.until(lambda: bool(writer.told()))
    (swept,) = second.kernel("sweep", folder=runs / "run").found()
    assert writer.told()[0]["pid"] not in swept["processes"]
    stop.touch()
    writer.found()
    assert (runs / "all.parquet").read_bytes() == b"whole"
