"""These tests need the current openpipe-art, which lives in an environment of its own, with the Toolkit's plugin as pip
installs it: .ci/run makes it and runs them there.

    .venv-art/bin/python -m pytest tests/with_art -m slow
"""

import importlib.util
import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else openpipe-art waits for a server at import

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("art") is None else []
