"""These tests need Ray, which lives in an environment of its own: .ci/run makes it and runs them there.

.venv-ray/bin/python -m pytest tests/with_ray -m slow
"""

import importlib.util
import time

import pytest
from hosts import Host, make_switch, why_not

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("ray") is None else []


@pytest.fixture(scope="session")
def ray():
    """A cluster of two CPUs in this process, which the engine "ray" takes."""
    import ray

    for attempt in range(4):  # on a busy machine Ray gives up on starting after 15 seconds
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="finetune_nb")
            break
        except Exception:
            ray.shutdown()
            if attempt == 3:
                raise
            time.sleep(2)
    yield ray
    ray.shutdown()


# ── hosts made of namespaces ─────────────────────────────────────────────────────────────────────────────────────────


def pytest_collection_modifyitems(config, items):
    """Where no host can be made, the tests with several of them are left out, which the summary says."""
    needing = [item for item in items if "make_host" in getattr(item, "fixturenames", ())]
    reason = why_not() if needing else None
    if reason:
        items[:] = [item for item in items if item not in needing]
        config.hook.pytest_deselected(items=needing)
        config.stash[_left_out] = f"{len(needing)} tests of Ray on several hosts did not run: {reason}."


_left_out = pytest.StashKey[str]()


def pytest_terminal_summary(terminalreporter, config):
    if _left_out in config.stash:
        terminalreporter.write_line(config.stash[_left_out])


@pytest.fixture(scope="module")
def make_host(tmp_path_factory):
    """Makes hosts that share a folder, and have one of their own at the same path."""
    switch, made, folder = make_switch(), [], tmp_path_factory.mktemp("hosts")
    (folder / "shared").mkdir()
    (folder / "own").mkdir()

    def make(shm="200m"):
        made.append(Host(switch, len(made) + 1, folder, shm))
        return made[-1]

    yield make
    for host in made:
        host.kill()
    switch.kill()
