"""What several tests of the engine share."""

import sys

import pytest


@pytest.fixture
def threads_take_turns_often():
    """So that a step without its lock is interrupted in the middle, here and not once a year."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
