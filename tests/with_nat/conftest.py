"""These tests need the NeMo Agent Toolkit, which lives in an environment of its own: .ci/run makes it and runs them there.

.venv-nat/bin/python -m pytest tests/with_nat -m slow
"""

import importlib.util
import os

import pytest
from loopback import LoopbackServer

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else openpipe-art waits for a server at import

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("nat") is None else []


@pytest.fixture
def place(tmp_path, monkeypatch):
    import toolkit

    monkeypatch.chdir(tmp_path)  # openpipe-art keeps a folder where it runs
    toolkit.start_anew()
    return tmp_path


@pytest.fixture
def llm():
    with LoopbackServer() as server:
        yield server


@pytest.fixture
def art():
    import toolkit

    with toolkit.ArtServer() as server:
        yield server
