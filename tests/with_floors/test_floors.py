"""The lowest versions that pyproject.toml accepts are those that are installed here, so that what runs here runs with them."""

from importlib.metadata import version

import pytest
from packaging.version import Version
from requirements import floors

import finetune_nb as ft
from finetune_nb.examples import calculator

NOT_HERE = {"torch"}
"""In the version of .venv: its lowest one is not on PyPI without CUDA."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(floors("lab", "local")) - NOT_HERE))
def test_the_lowest_version_is_the_one_that_is_tested(name):
    assert Version(version(name)) == floors("lab", "local")[name]


@pytest.mark.slow
async def test_the_embedded_model_calls_its_tool_and_is_trained(tmp_path):
    run = ft.Run.from_config(calculator.CONFIG, finetuning__output_dir=str(tmp_path))
    try:
        epoch = await run.next_epoch()
        assert epoch.job.status == "completed"
        assert (run.messages(epoch=0).role == "tool").any()
    finally:
        run.close()
