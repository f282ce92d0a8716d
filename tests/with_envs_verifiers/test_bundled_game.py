"""An environment that verifiers ships is learned: its tasks, its loop and its reward, with a word list in place of NLTK's, which
is not in any package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import verifiers.v1 as vf
from intervals import reward_interval
from phrase_models import phrase_model

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedPolicy

pytestmark = pytest.mark.slow
WORDS = "tea eat ate net ten tan ant sea seat east nest neat"
LETTERS = [f"[{letter}]" for letter in "EATNSOIRLUCD"]
TASKS = 12


def hangman() -> vf.Env:
    taskset = {"id": "textarena", "game": "Hangman-v0"}
    harness = {"id": "vf_sums", "tools": False}  # in this process: the bundled ones start a program for every turn
    player = {"runtime": {"type": "subprocess"}, "harness": harness}
    return vf.load_environment(vf.resolve_env_config({"taskset": taskset, "player": player}))


async def games_of_random_letters(folder: Path) -> list[list[dict[str, Any]]]:
    """Conversations of a player that draws its letters, and now and then says something else."""
    said = [*LETTERS, "no letter"]
    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: said[seed % len(said)]))
    run = ft.Run(env=hangman(), env_options={"examples": TASKS}, generations=2, adapter=adapter, output_dir=folder)
    await run.next_epoch(progress=False)
    games = run.messages().groupby(["example", "generation"])[["role", "content"]]
    found = [game.to_dict("records") for _, game in games]
    run.close()
    return found


async def learned(folder: Path, seed: int = 0) -> ft.Run:
    """A run of four epochs, after a warm-up on random letters."""
    games = await games_of_random_letters(folder / "games")
    texts = {message["content"] for game in games for message in game}
    run = ft.Run(
        env=hangman(),
        env_options={"examples": TASKS},
        model=str(phrase_model(folder / "model", texts, LETTERS, seed, positions=2048)),
        generations=6,
        sampling={"max_tokens": 2},
        training={"learning_rate": 2e-3},
        max_concurrency=72,
        seed=seed,
        output_dir=folder,
    )
    await run.warm_up(games, learning_rate=5e-3, epochs=3, progress=False)
    for _ in range(4):
        await run.next_epoch(progress=False)
    frame = run.trajectories()
    print(frame.groupby("epoch").reward.mean().round(3).to_dict(), [reward_interval(frame, epoch) for epoch in (1, 4)])
    return run


@pytest.fixture
def words(tmp_path, monkeypatch):
    """NLTK's corpus of words, as the game looks it up."""
    corpus = tmp_path / "nltk" / "corpora" / "words"
    corpus.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (corpus / name).write_text("\n".join(WORDS.split()) + "\n")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])


async def test_hangman_is_won_more_often_after_three_epochs(tmp_path, words):
    run = await learned(tmp_path)
    frame = run.trajectories()
    assert frame.error.isna().all()
    before, after = (reward_interval(frame, epoch) for epoch in (1, 4))
    assert after[0] > before[1]
    assert (frame.reward == frame.score_game_reward).all()
    run.close()
