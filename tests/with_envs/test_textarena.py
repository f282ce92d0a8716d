"""TextArena's games as they are installed."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy

pytestmark = pytest.mark.slow
GAMES = """
    Bandit-v0 Blackjack-v0 Cryptarithm-v0 FifteenPuzzle-v0 FrozenLake-v0 2048-v0 GuessTheNumber-v0 Klondike-v0 LightsOut-v0
    LogicPuzzle-v0 Mastermind-v0 Minesweeper-v0 PegJump-v0 RushHour-v0 Secretary-v0 Slitherlink-v0 Sokoban-v0 Sudoku-v0
    ThreeCardMonte-v0 TowerOfHanoi-v0
"""
THEIRS = {
    "Cryptarithm-v0": "gave the reward 'Bad action format",  # it passes the reason of an invalid move as its reward
    "Klondike-v0": r"raised in making it: SyntaxError",  # written for Python 3.12
    "Slitherlink-v0": "gave the reward 'Bad action format",
    "ThreeCardMonte-v0": "gave the reward '(Bad action|Index out of range)",
}
"""Game -> what goes wrong in it, whoever plays it."""


def wild(messages: list[dict[str, Any]], seed: int) -> str:
    """A reply in square brackets that some game takes: often the example that the game itself gives."""
    shown = re.findall(r"\[[^\]\n]{1,12}\]", messages[-1]["content"])
    choices = [f"[{seed % 20 + 1}]", "[up]", "[A C]", "[0 0]", "[hit]", "nothing", *shown]
    return choices[seed % len(choices)]


def playing(game: str, script: Any = wild, **settings: Any) -> ft.Run:
    options = {"examples": 2, "max_turns": 12, "unfinished_reward": 0.0, **settings.pop("env_options", {})}
    adapter = FakeAdapter(policy=ScriptedPolicy(script))
    return ft.Run(env=f"textarena:{game}", env_options=options, adapter=adapter, generations=4, **settings)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("game", GAMES.split())
async def test_a_game_goes_through_a_run(game):
    run = playing(game)
    await run.next_epoch()
    frame = run.trajectories()
    errors = frame.error.dropna().tolist()
    rewards = frame.reward.dropna()
    low, high = (rewards.min(), rewards.max()) if len(rewards) else ("", "")
    print(f"\n| {game} | {len(rewards)} of 8 | {low} to {high} | {'; '.join(Counter(errors)) or '-'} |")
    assert len(frame) == 8
    # What goes wrong in a game is a row that names the game.
    assert all(re.search(f"{game} {THEIRS.get(game, 'has none')}", error) for error in errors)
    assert (game in THEIRS) == bool(errors)
    run.close()


async def test_a_seed_is_one_game_for_a_whole_group():
    run = playing("Sudoku-v0", env_options={"examples": 4, "max_turns": 1})
    await run.next_epoch()
    boards = run.messages(columns=["example", "role", "content"]).query("role == 'user'")
    assert boards.groupby("example").content.nunique().tolist() == [1] * 4
    assert boards.content.nunique() == 4
    run.close()


async def test_only_what_is_new_is_shown():
    run = playing("TowerOfHanoi-v0", lambda messages, seed: "[A B]", env_options={"max_turns": 2, "examples": 1})
    await run.next_epoch()
    shown = run.messages(example="seed-0").query("generation == 0 and role == 'user'").content.tolist()
    assert shown[0].count("You are playing Tower of Hanoi") == 1
    assert "You are playing" not in shown[1] and "You moved disk 1 from A to B" in shown[1]
    run.close()


def test_mistakes_say_what_is_known():
    with pytest.raises(ConfigError, match="no game 'TowerOfHanoi'. Did you mean 'TowerOfHanoi-v0'"):
        playing("TowerOfHanoi")
