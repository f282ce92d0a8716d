"""Whether a reward rose."""

from __future__ import annotations

import numpy as np


def reward_interval(frame, epoch: int) -> tuple[float, float]:
    """A 95 % bootstrap interval of an epoch's mean reward, drawn by example. frame: `run.trajectories()`."""
    means = frame[frame.epoch == epoch].groupby("example").reward.mean().to_numpy()
    drawn = np.random.default_rng(0).choice(means, (2000, len(means))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return low, high
