"""These tests need an environment with the lowest versions that pyproject.toml accepts: .ci/all makes it.

.venv-floors/bin/python -m pytest tests/with_floors -m slow
"""

from importlib.metadata import version

from packaging.version import Version
from requirements import floors

collect_ignore_glob = [] if Version(version("ipywidgets")) == floors()["ipywidgets"] else ["test_*.py"]
