"""Samplers that differ from what is trained: with importance sampling the demo is learned, without it there is a warning, or
training stops.

    SEEDS=3 python -m pytest tests/backends/test_importance_learns.py -m slow -s

prints, over three seeds in place of one, the mean reward of what was trained and what the two differ by: the reference's figures.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from planted_faults import SEEDS, OtherSampler, other_sampler

import finetune_nb as ft
from finetune_nb.errors import JobFailed

EPOCHS = 8
SAMPLERS = {
    "other weights": {"nudge": 0.05},
    "1.5 times the temperature": {"heat": 1.5},
    "bfloat16": {"rounded": True},
}
CORRECTIONS = {
    "none": {},
    "none, unguarded": {"max_logprob_gap": None},
    "token, truncated": {"importance_cap": 2.0},
    "token, masked": {"importance_cap": 2.0, "importance_floor": 0.5, "importance_beyond": "mask"},
}
CASES = [
    *[("other weights", correction) for correction in CORRECTIONS],
    *[("1.5 times the temperature", correction) for correction in ("none", "none, unguarded", "token, truncated")],
    *[("bfloat16", correction) for correction in ("none", "token, truncated")],
]


def after_training(run: ft.Run, policy: OtherSampler) -> tuple[float, float]:
    """Mean reward in validation before and after so many epochs, sampled from the weights that are trained."""
    rewards = []
    for epochs in (0, EPOCHS):
        for _ in range(epochs):
            with suppress(JobFailed):
                ft.run_sync(run.next_epoch())
        policy.off = True
        rewards.append(ft.run_sync(run.validate()).mean_reward)
        policy.off = False
    return rewards[0], rewards[1]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "correction"), CASES)
def test_a_sampler_that_differs(sampler, correction, tmp_path):
    rewards, said, measured = [], set(), []
    for seed in range(SEEDS):
        policy = OtherSampler.of(**SAMPLERS[sampler])
        run = other_sampler(tmp_path, policy, seed, EPOCHS, CORRECTIONS[correction])
        rewards.append(after_training(run, policy))
        said |= {finding.kind for finding in run.diagnose() if finding.severity != "info"}
        measured += [epoch.train_metrics for epoch in run]
        run.close()
    before, after = np.mean(rewards, axis=0)
    names = ("logprob_gap", "effective_samples", "importance_ratio_max", "importance_bounded")
    gap, effective, largest, bounded = (np.mean([each.get(name, np.nan) for each in measured]) for name in names)
    print(
        f"\n| {sampler} | {correction} | {before:.2f} | {after:.2f} | {gap:.3f} | {effective:.3f} | {largest:.2f} | "
        f"{bounded:.3f} | {', '.join(sorted(said)) or '-'} |"
    )
    if sampler == "bfloat16":  # rounding is no fault
        assert not said
    elif correction == "none":
        assert "training_failed" in said and after == before
        return
    elif correction == "none, unguarded":
        assert said & {"logprob_gap", "sampler_differs"}
        return
    assert after >= before + 0.15
