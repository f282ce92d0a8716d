"""Plots of a run, drawn with matplotlib on a given `ax` or on a new figure."""

from __future__ import annotations

from .curves import plot_rewards, plot_scores, plot_training
from .distributions import plot_advantages, plot_lengths, plot_reward_distribution
from .groups import plot_curriculum, plot_groups

__all__ = [
    "plot_advantages",
    "plot_curriculum",
    "plot_groups",
    "plot_lengths",
    "plot_reward_distribution",
    "plot_rewards",
    "plot_scores",
    "plot_training",
]
