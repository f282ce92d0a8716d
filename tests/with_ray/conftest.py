"""These tests need Ray, which lives in an environment of its own: .ci/run makes it and runs them there.

.venv-ray/bin/python -m pytest tests/with_ray -m slow
"""

import importlib.util
import time

import pytest

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
