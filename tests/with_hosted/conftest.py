"""These tests need environments with the versions that hosted notebooks have: .ci/all makes them and names their pythons."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
NAMED = [name for name in ("colab", "kaggle") if f"FINETUNE_NB_{name.upper()}_PYTHON" in os.environ]
collect_ignore_glob = [] if NAMED else ["test_*.py"]


@pytest.fixture(scope="session", params=NAMED)
def hosted(request) -> tuple[str, Path]:
    """Its name, and its python."""
    return request.param, Path(os.environ[f"FINETUNE_NB_{request.param.upper()}_PYTHON"])
