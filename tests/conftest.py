"""What all tests share: CI never skips silently, and nothing reaches for a model hub."""

from __future__ import annotations

import os

import hypothesis
import pytest

from finetune_nb import redaction

# Whether an example is slow depends on the machine: no test fails for that.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each of the processes that share the tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


@pytest.fixture(autouse=True)
def forget_secrets(monkeypatch):
    """Secrets are remembered for the whole process; a test's own must not mask the messages of the next one."""
    monkeypatch.setattr(redaction, "_secrets", redaction._Secrets())


@pytest.fixture(scope="session", autouse=True)
def own_key(tmp_path_factory):
    """The key that signs run folders is the tests' own, and no test writes into the home directory."""
    os.environ.setdefault("FINETUNE_NB_DATA_DIR", str(tmp_path_factory.mktemp("data")))


@pytest.fixture
def closing():
    """Takes a run and gives it back; it is closed when the test is over."""
    runs = []

    def take(run):
        runs.append(run)
        return run

    yield take
    for run in runs:
        run.close()


@pytest.fixture
def make_run(tmp_path, closing):
    """Makes a run whose agent is right or wrong by the seed, and whose adapter trains nothing."""
    # Imported here, so that numpy is not loaded before the environment above is set.
    from small_agents import coin, guess, right

    import finetune_nb as ft
    from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

    def make(workflow=guess, reward=right, dataset=None, adapter=None, **options):
        adapter = adapter or FakeAdapter(policy=ScriptedPolicy(coin))
        dataset = sums(6) if dataset is None else dataset
        return closing(
            ft.Run(workflow, reward, dataset, adapter=adapter, **{"generations": 4, "output_dir": tmp_path, **options})
        )

    return make


WITHOUT = os.environ.get("FINETUNE_NB_WITHOUT", "").split()
"""Packages that this environment is without on purpose."""


def is_without(error: BaseException | None) -> bool:
    """Whether the error says, or comes from it, that a package is not there which is meant to be missing here."""
    while error is not None:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in WITHOUT:
            return True
        if isinstance(error, pytest.skip.Exception) and any(f"import {name!r}" in str(error) for name in WITHOUT):
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """In CI a skip is a failure: what a test needs is installed there. Captured text is made fit to go to another process."""
    if call.excinfo is not None and is_without(call.excinfo.value):
        skip = pytest.skip.Exception(f"needs one of {WITHOUT}").with_traceback(call.excinfo.tb)
        call.excinfo = pytest.ExceptionInfo.from_exception(skip)
    elif os.environ.get("CI") and call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception):
        call.excinfo = pytest.ExceptionInfo.from_exception(
            AssertionError(f"skipped in CI: {call.excinfo.value}").with_traceback(call.excinfo.tb)
        )
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
