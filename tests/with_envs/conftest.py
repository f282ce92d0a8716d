"""These tests need other people's environments, which are installed in an environment of their own: .ci/all makes it.

.venv-envs/bin/python -m pytest tests/with_envs -m slow
"""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("reasoning_gym") else ["test_*.py"]
