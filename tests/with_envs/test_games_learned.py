"""A game of TextArena is learned: its own reset, step and reward, and a model that has seen random moves."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from intervals import reward_interval
from phrase_models import phrase_model

import finetune_nb as ft
from finetune_nb.environments.textarena import TextArena

pytestmark = pytest.mark.slow
GAME = "TowerOfHanoi-v0"
OPTIONS = {"examples": 24, "max_turns": 8, "make": {"num_disks": 2}, "unfinished_reward": 0.0}
MOVES = [f"[{source} {target}]" for source, target in itertools.permutations("ABC", 2)]


def game_of_random_moves(seed: int) -> list[dict[str, Any]]:
    """A game as its player saw it: one move in three is legal, and two in a row that are not end it."""
    moves = random.Random(seed)
    game = TextArena(GAME, OPTIONS).maker()({})
    shown, messages = game.reset(seed, {}), []
    for _ in range(OPTIONS["max_turns"]):
        reply = moves.choice(MOVES)
        messages += [{"role": "user", "content": shown}, {"role": "assistant", "content": reply}]
        step = game.step(reply)
        if step.done:
            break
        shown = step.observation
    game.close()
    return messages


@pytest.mark.proof
async def test_the_tower_of_hanoi_is_solved_more_often_after_three_epochs(tmp_path):
    games = [game_of_random_moves(seed) for seed in range(60)]
    texts = {message["content"] for game in games for message in game}
    run = ft.Run(
        env=f"textarena:{GAME}",
        env_options=OPTIONS,
        model=str(phrase_model(tmp_path / "model", texts, MOVES)),
        generations=12,
        sampling={"max_tokens": 2},
        training={"learning_rate": 2e-3},
        max_concurrency=288,
        output_dir=tmp_path,
    )
    await run.warm_up(games, learning_rate=5e-3, epochs=3, progress=False)
    for _ in range(4):
        await run.next_epoch(progress=False)
    frame = run.trajectories()
    print(frame.groupby("epoch").reward.mean().round(3).to_dict())
    assert frame.error.isna().mean() > 0.99
    before, after = (reward_interval(frame, epoch) for epoch in (1, 4))
    assert after[0] > before[1]
    run.close()
