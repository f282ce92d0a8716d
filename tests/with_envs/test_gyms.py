"""GEM, skyrl-gym and gymnasium as they are installed."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy

pytestmark = pytest.mark.slow


def playing(env: Any, script: Any, **settings: Any) -> ft.Run:
    adapter = FakeAdapter(policy=ScriptedPolicy(script))
    return ft.Run(env=env, adapter=adapter, generations=3, **settings)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["GuessTheNumber", "Mastermind", "FifteenPuzzle", "Minesweeper", "TowerofHanoi"])
async def test_a_game_of_gem_goes_through_a_run(name):
    run = playing(
        f"gem:game:{name}-v0-easy", lambda messages, seed: f"\\boxed{{{seed % 9 + 1}}}", env_options={"examples": 4}
    )
    await run.next_epoch()
    assert run.trajectories().error.isna().all()
    assert run.trajectories().reward.notna().all()
    shown = run.messages().query("role == 'user'").groupby(["example", "generation"]).content.first()
    assert shown.groupby("example").nunique().tolist() == [1] * 4
    run.close()


async def test_gsm8k_of_skyrl_gym_scores_the_rows_of_a_dataset():
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} + 1? End with #### and the number."}],
            "reward_spec": {"ground_truth": str(n + 1)},
        }
        for n in range(3)
    ]
    run = playing("skyrl_gym:gsm8k", lambda messages, seed: "#### 2", dataset=rows)
    await run.next_epoch()
    assert run.trajectories().groupby("example").reward.mean().tolist() == [0.0, 1.0, 0.0]
    run.close()
    with pytest.raises(ConfigError, match="no tasks of its own: give dataset="):
        playing("skyrl_gym:gsm8k", lambda messages, seed: "")


class Echoing(gymnasium.Env):
    """Wants its own word back; the word is drawn with gymnasium's generator."""

    action_space = gymnasium.spaces.Text(20)
    observation_space = gymnasium.spaces.Text(20)

    def __init__(self, length: int = 4) -> None:
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.word = "".join("ab"[n] for n in self.np_random.integers(0, 2, self.length))
        return self.word, {}

    def step(self, action):
        return "", float(action == self.word), True, False, {}


async def test_a_registered_environment_of_gymnasium_and_its_class():
    gymnasium.register("Echoing-v0", entry_point=Echoing, disable_env_checker=True)
    options = {"examples": 3, "make": {"length": 6}}
    for env in ("gymnasium:Echoing-v0", Echoing):
        run = playing(env, lambda messages, seed: messages[-1]["content"], env_options=options)
        await run.next_epoch()
        assert run.trajectories().reward.tolist() == [1.0] * 9
        words = run.messages().query("role == 'user'").content
        assert words.str.len().unique().tolist() == [6]
        run.close()
    with pytest.raises(ConfigError, match=r"CartPole-v1' takes actions of Discrete\(2\); expected texts"):
        playing("gymnasium:CartPole-v1", lambda messages, seed: "")
    with pytest.raises(ConfigError, match="gymnasium cannot make 'Nowhere-v0'"):
        playing("gymnasium:Nowhere-v0", lambda messages, seed: "")
