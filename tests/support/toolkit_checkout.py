"""A checkout of NVIDIA/NeMo-Agent-Toolkit, whose documents and examples some tests run as they stand there.

FINETUNE_NB_TOOLKIT_CHECKOUT names its folder. Nothing of it is copied into this project.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

__all__ = ["code_of_page", "toolkit_checkout"]

VARIABLE = "FINETUNE_NB_TOOLKIT_CHECKOUT"


def toolkit_checkout() -> Path:
    """The folder. Skips the test where there is none."""
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"{VARIABLE} names no checkout of NVIDIA/NeMo-Agent-Toolkit: this did not run")
    folder = Path(named)
    assert (folder / "docs" / "source").is_dir(), f"{VARIABLE} is {named!r}, which is no checkout of the Toolkit"
    return folder


def code_of_page(page: str) -> list[str]:
    """The Python samples of a page, in order. page: its path below docs/source."""
    text = (toolkit_checkout() / "docs" / "source" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
