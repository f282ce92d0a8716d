"""These tests need agent libraries, which live in environments of their own: .ci/all makes them and runs the tests there.

.venv-agents/bin/python -m pytest tests/with_agents -m slow
"""

import importlib.util

ANY = ("dspy", "strands", "inspect_ai", "agents_node")
"""One library of each environment."""
collect_ignore_glob = ["test_*.py"] if not any(map(importlib.util.find_spec, ANY)) else []
