"""Learning curves of all losses: the embedded model learns its calculator, on the CPU.

    python tests/loss_curves.py --plot notebooks/images/losses.png

prints the table of notebooks/reference/losses.md and draws its picture.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "support"))

from planted_faults import demo

import finetune_nb as ft
from finetune_nb.backends.local.config import LOSSES

EPOCHS, SEEDS = 8, 3


def curves(loss: str, folder: Path, seeds: int = SEEDS) -> np.ndarray:
    """(seeds, EPOCHS) mean rewards."""
    rewards = []
    for seed in range(seeds):
        run = demo(folder, seed=seed, training={"loss": loss}, num_epochs=EPOCHS)
        for _ in range(EPOCHS):
            ft.run_sync(run.next_epoch())
        rewards.append(run.epochs().mean_reward.tolist())
        run.close()
    return np.array(rewards)


def line(loss: str, rewards: np.ndarray) -> str:
    """The loss's line of the table."""
    return f"| `{loss}` | {' | '.join(f'{value:.2f}' for value in rewards.mean(axis=0))} |"


def plot(rewards_of: Mapping[str, np.ndarray], path: Path) -> None:
    """A panel for each loss: the mean over the seeds, from the lowest to the highest of them, and the others in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 5.6), layout="constrained")
    grid = figure.subplots(3, 3, sharex=True, sharey=True).flat
    for axes, (loss, rewards) in zip(grid, rewards_of.items(), strict=True):
        for other in rewards_of.values():
            axes.plot(other.mean(axis=0), color="0.8", linewidth=0.8)
        axes.fill_between(
            range(EPOCHS), rewards.min(axis=0), rewards.max(axis=0), color="#0072B2", alpha=0.2, linewidth=0
        )
        axes.plot(rewards.mean(axis=0), color="#0072B2", linewidth=1.8)
        axes.set(title=loss, ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.supxlabel("epoch")
    figure.supylabel("mean reward")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rewards_of = {}
    with tempfile.TemporaryDirectory() as folder:
        for loss in LOSSES:
            rewards_of[loss] = curves(loss, Path(folder) / loss)
            print(line(loss, rewards_of[loss]), flush=True)
    if arguments.plot:
        plot(rewards_of, arguments.plot)


if __name__ == "__main__":
    main()
