"""The Toolkit's own tests of its interfaces and of its two training plugins, from a checkout, on finetune_nb's three classes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REFUSED = {
    "test_trainer_run_validation_evaluation_error_handling": "a validation that failed has no mean, and its error has a type",
    "test_trainer_calculate_validation_metrics_no_rewards": "without a reward the mean is NaN, and not 0",
    "test_builder_run_eval": "it puts a mock in place of the Toolkit's evaluation; our builder runs finetune_nb's",
}
"""Tests that do not pass, and why they should not."""


@pytest.mark.parametrize(
    ("files", "least"),
    [
        ("nvidia_nat_core/tests/nat/finetuning/interfaces", 49),
        ("nvidia_nat_openpipe_art/tests", 63),
        ("nvidia_nat_nemo_customizer/tests", 123),
    ],
)
def test_the_toolkits_tests_pass_on_our_classes(checkout, files, least, tmp_path):
    options = ["-p", "our_bases", "-c", os.devnull, "--rootdir", str(tmp_path), "--import-mode=importlib"]
    options += ["-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "-p", "no:warnings", "-q", "-rf"]
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(checkout / "packages" / files)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(done.stdout[-3000:])
    failed = set(re.findall(r"^FAILED \S*::(\w+)", done.stdout, re.MULTILINE))
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout)}
    assert failed == {name for name in REFUSED if f"{name}(" in source_of(checkout / "packages" / files)}
    assert counts.get("passed", 0) + len(failed) >= least
    assert not counts.keys() & {"error", "errors"}


def source_of(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py"))
