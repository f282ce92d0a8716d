"""The example that the demo and the first notebooks train on: a calculator agent that learns to use its tool."""

from __future__ import annotations

from pathlib import Path

CONFIG = Path(__file__).parent / "config.yml"
"""The example's YAML; its datasets lie beside it."""
