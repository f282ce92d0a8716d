"""These tests need the NeMo Agent Toolkit, which lives in an environment of its own: .ci/run makes it and runs them there.

.venv-nat/bin/python -m pytest tests/with_nat -m slow
"""

import importlib.util
import os
from pathlib import Path

import pytest
from loopback import LoopbackServer

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else openpipe-art waits for a server at import

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("nat") is None else []


CHECKOUT = os.environ.get("FINETUNE_NB_TOOLKIT_CHECKOUT")


def pytest_collection_modifyitems(config, items):
    """Without a checkout of the Toolkit the tests on its own files are left out, which the summary says."""
    if CHECKOUT is not None:
        return
    left_out = [item for item in items if "checkout" in getattr(item, "fixturenames", ())]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
        config.stash[_left_out] = len(left_out)


_left_out = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash.get(_left_out, 0)
    if count:
        terminalreporter.write_line(
            f"{count} tests on the NeMo Agent Toolkit's own files did not run: FINETUNE_NB_TOOLKIT_CHECKOUT names no checkout "
            "(see CONTRIBUTING)."
        )


@pytest.fixture(scope="session")
def checkout():
    """A checkout of NVIDIA/NeMo-Agent-Toolkit."""
    assert CHECKOUT is not None
    folder = Path(CHECKOUT).absolute()
    assert (folder / "packages").is_dir(), (
        f"FINETUNE_NB_TOOLKIT_CHECKOUT is {CHECKOUT!r}, which is no checkout of the Toolkit"
    )
    return folder


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
