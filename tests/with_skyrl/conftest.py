"""These tests start SkyRL's Tinker server. FINETUNE_NB_SKYRL names its folder, and FINETUNE_NB_SKYRL_PYTHON the Python of an
environment that has what it needs; CONTRIBUTING says how they are made. Without them nothing here is collected.
"""

import os
import shutil

import pytest

missing = [name for name in ("FINETUNE_NB_SKYRL", "FINETUNE_NB_SKYRL_PYTHON") if not os.environ.get(name)]
collect_ignore_glob = ["test_*.py"] if missing else []


def pytest_report_header():
    return f"SkyRL's server is not tested: {' and '.join(missing)} not set (CONTRIBUTING, Checks)" if missing else None


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from skyrl_server import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def cache(request):
    """What was compiled, which takes a minute or two, is kept for the next time."""
    return request.config.cache.mkdir("skyrl_compiled")


@pytest.fixture(scope="session")
def server(tmp_path_factory, model, cache):
    """One for all tests, with two adapter slots, which processes that were killed hold for an hour."""
    from skyrl_server import SkyRLServer

    folder = tmp_path_factory.mktemp("skyrl")
    with SkyRLServer(folder, model, cache, slots=2, session_seconds=3600) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)
