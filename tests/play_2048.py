"""The embedded model learns to play 2048, on the CPU: its scores in games that it was not trained on.

python tests/play_2048.py
"""

import random
import tempfile

import finetune_nb as ft
from finetune_nb.examples.game_2048 import MOVES, Game2048

MOVES_OF_A_GAME, EPOCHS = 24, 14


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = ft.Run(
            env=Game2048,
            env_options={"examples": 12, "validation": 24, "max_turns": MOVES_OF_A_GAME, "history": 0},
            generations=8,
            max_concurrency=200,
            sampling={"max_tokens": 2},
            training={"learning_rate": 1e-3},
            num_epochs=EPOCHS,
            validation_interval=EPOCHS,
            output_dir=folder,
        )
        run.start()
        run.wait()
        for epoch in run:
            for validation in epoch.validations:
                points = Game2048().points * validation.mean_reward
                print(f"held out, epoch {epoch.index}: {points:.0f} points in {MOVES_OF_A_GAME} moves")
        run.close()
    print(f"moves drawn at random: {points_at_random():.0f} points")


def points_at_random(games: int = 200) -> float:
    """The mean score of a player that draws its moves."""
    rng, total = random.Random(0), 0
    for seed in range(games):
        game = Game2048()
        game.reset(seed)
        for _ in range(MOVES_OF_A_GAME):
            if game.step(rng.choice(MOVES))[2]:
                break
        total += game.score
    return total / games


if __name__ == "__main__":
    main()
