"""The 2048 example: the game's rules, and a policy that learns to play it."""

from __future__ import annotations

import random

import pytest
from intervals import reward_interval

import finetune_nb as ft
from finetune_nb.examples.game_2048 import MOVES, Game2048, move_in, moved, moves_of


def test_equal_tiles_merge_once_and_from_the_side_that_is_moved_to():
    board = [2, 2, 2, 0, 4, 0, 4, 8, 2, 2, 4, 4, 0, 0, 0, 2]
    assert moved(board, "left") == ([4, 2, 0, 0, 8, 8, 0, 0, 4, 8, 0, 0, 2, 0, 0, 0], 4 + 8 + 4 + 8)
    assert moved(board, "right") == ([0, 0, 2, 4, 0, 0, 8, 8, 0, 0, 4, 8, 0, 0, 0, 2], 4 + 8 + 4 + 8)
    column = [2, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0]
    assert moved(column, "up")[0][::4] == [4, 8, 0, 0] and moved(column, "down")[0][::4] == [0, 0, 4, 8]
    assert moves_of([2, 4, 2, 4, 4, 2, 4, 2] * 2) == []


@pytest.mark.parametrize(
    ("reply", "move"),
    [("left", "left"), ("I go DOWN, then up", "down"), ("=3", "right"), ("4", "up"), ("7", None), ("", None)],
)
def test_a_reply_names_a_move_by_word_or_number(reply, move):
    assert move_in(reply) == move


def test_a_seed_gives_one_game_and_every_tile_comes_from_a_move():
    def play(seed):
        game, rng = Game2048(), random.Random(1)
        shown = [game.reset(seed)[0]]
        rewards = 0.0
        for _ in range(2000):
            text, reward, done, truncated, info = game.step(rng.choice(MOVES))
            shown.append(text)
            rewards += reward
            if done:
                break
        assert done and not truncated and moves_of(game.board) == []
        assert rewards * game.points == info["score"] and info["largest"] == max(game.board)
        return shown

    assert play(3) == play(3) != play(4)


def test_a_reply_without_a_move_leaves_the_board():
    game = Game2048()
    before, _ = game.reset(0)
    assert game.step("well")[:2] == (before, 0.0)


@pytest.mark.slow
def test_the_embedded_model_learns_to_play(tmp_path):
    pytest.importorskip("torch")
    run = ft.Run(
        env=Game2048,
        env_options={"examples": 24, "max_turns": 16, "history": 0},
        generations=8,
        max_concurrency=192,
        deterministic=True,
        sampling={"max_tokens": 2},
        training={"learning_rate": 1e-3},
        output_dir=tmp_path,
    )
    for _ in range(12):
        ft.run_sync(run.next_epoch())
    frame = run.trajectories()
    run.close()

    assert reward_interval(frame, 11)[0] > reward_interval(frame, 0)[1]
