"""What a run says at once of nodes that it cannot work with, or not well."""

import pytest
from hosts import ENGINE, TOKEN

pytestmark = pytest.mark.slow

TWO = {"workers": 2, "worker_cpus": 1}  # one on each node of one CPU


def installed(folder, package, version):
    """A folder of packages in which one has another version, as far as its metadata say."""
    about = folder / f"{package}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder


def patched(folder, code):
    """A folder of packages whose code runs first in each Python process."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return folder


@pytest.fixture(scope="module")
def first(make_host):
    host = make_host()
    host.start_ray(cpus=1)
    return host


def test_kernel_with_another_ray_is_told_so(first, tmp_path):
    path = patched(tmp_path / "older", "import ray; ray.__version__ = '2.51.0'\n")
    (ended,) = first.kernel("an_epoch", path=path, folder=first.own / "a", engine=ENGINE, ray=TWO).found()
    assert "BackendError: the Ray cluster at '10.77.0.1:6379' has other versions than this process" in ended["error"]
    assert "started with: Ray: 2.51.0 Python: 3." in ended["error"]
    assert "Expected the same versions of Ray and Python. Install those of the cluster here" in ended["error"]


def test_kernel_without_the_token_is_told_how_to_give_it(first):
    without = first.kernel(
        "an_epoch", env={"RAY_AUTH_MODE": "disabled"}, folder=first.own / "t", engine=ENGINE, ray=TWO
    )
    (ended,) = without.found()
    assert "BackendError: the Ray cluster at '10.77.0.1:6379' wants its token" in ended["error"]
    assert "Expected RAY_AUTH_MODE=token in the environment of this process when it starts" in ended["error"]
    assert "Set them, and restart the kernel" in ended["error"]
    assert TOKEN["RAY_AUTH_TOKEN"] not in ended["error"] + without.said()


def test_other_versions_little_shared_memory_and_a_clock_apart_are_said(first, make_host, tmp_path):
    second = make_host(shm="32m")
    second.start_ray(first, cpus=1, path=installed(tmp_path / "older", "transformers", "4.1.0"))
    (ended,) = first.kernel("an_epoch", folder=first.own / "b", engine=ENGINE, ray=TWO).found()
    assert "a rollout worker on host2 (10.77.0.2) has transformers 4.1.0; expected transformers" in ended["error"]
    assert "Install the same versions on all nodes" in ended["error"]

    second.stop_ray()
    # libfaketime breaks Python's time.sleep, so the clock is moved where Python reads it.
    clock = patched(tmp_path / "clock", "import time; right = time.time; time.time = lambda: right() + 90\n")
    second.start_ray(first, cpus=1, path=clock)
    kernel = first.kernel("an_epoch", folder=first.own / "c", engine=ENGINE, ray=TWO)
    (ended,) = kernel.found()
    assert "told" in ended
    said = kernel.said()
    assert "found 34 MB in /dev/shm of host2 (10.77.0.2); expected at least 100 MB for its object store" in said
    assert "found the clock of host2 (10.77.0.2) 90 s ahead of the clock here; expected at most 5 s" in said
    assert said.count("found the clock") == said.count("MB in /dev/shm") == 1
