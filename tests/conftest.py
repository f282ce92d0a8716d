"""What all tests share: CI never skips silently, and nothing reaches for a model hub."""

from __future__ import annotations

import os

import pytest

from finetune_nb import redaction

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each of the processes that share the tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


@pytest.fixture(autouse=True)
def forget_secrets(monkeypatch):
    """Secrets are remembered for the whole process; a test's own must not mask the messages of the next one."""
    monkeypatch.setattr(redaction, "_secrets", redaction._Secrets())


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """In CI a skip is a failure: what a test needs is installed there. Captured text is made fit to go to another process."""
    if os.environ.get("CI") and call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception):
        call.excinfo = pytest.ExceptionInfo.from_exception(
            AssertionError(f"skipped in CI: {call.excinfo.value}").with_traceback(call.excinfo.tb)
        )
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
