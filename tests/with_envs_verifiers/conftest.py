"""These tests need verifiers, which is installed in an environment of its own: .ci/all makes it.

.venv-envs_verifiers/bin/python -m pytest tests/with_envs_verifiers -m slow
"""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("verifiers") else ["test_*.py"]
