"""What hosted notebooks have installed is what pyproject.toml accepts: installing finetune_nb there replaces nothing."""

import re
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from requirements import floors, requirements

FOLDER = Path(__file__).parent / "with_hosted"
TORCH = {"colab": "2.11.0", "kaggle": "2.10.0"}
"""Of the image; it is not in the list of packages that the tests install."""
ADDED = {"ruamel.yaml"}
"""Named in notebooks/reference/notebooks.md: neither has it."""
REPLACED = {"colab": set(), "kaggle": {"transformers", "safetensors"}}
"""What the extra "local" replaces. Named there, too."""
LOCAL_ONLY = {"peft"}
"""Theirs is not in the list, because it needs torch."""


def frozen(platform: str) -> dict[str, str]:
    """Version by canonical name."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (FOLDER / f"{platform}.txt").read_text(encoding="utf-8"), re.M)
    return {canonicalize_name(name): version for name, version in lines}


@pytest.mark.parametrize("platform", ["colab", "kaggle"])
def test_what_a_hosted_notebook_has_is_accepted(platform):
    there = frozen(platform) | {"torch": TORCH[platform]}
    missing, refused = set(), set()
    for requirement in requirements("local"):
        name = canonicalize_name(requirement.name)
        if name not in there:
            missing.add(requirement.name)
        elif there[name] not in requirement.specifier:
            refused.add(requirement.name)
    assert missing - LOCAL_ONLY == ADDED
    assert refused == REPLACED[platform]


def test_every_requirement_has_a_lowest_version():
    assert {"ipywidgets", "torch", "jupyterlab"} <= set(floors("lab", "local"))
