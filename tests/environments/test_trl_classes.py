"""Classes as TRL's `environment_factory` takes them: reset, tools as methods, get_reward, functions of `environments`."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from tool_calls import Calling, tries

import finetune_nb as ft
from finetune_nb.components.environments import environment_from
from finetune_nb.environments.trl import tools_of
from finetune_nb.errors import ConfigError
from finetune_nb.testing import FakeAdapter


class Guessing:
    """Guess a number: it says higher or lower."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.reward = 0.0

    def reset(self, target, **kwargs) -> str | None:
        self.target, self.reward, self.kwargs = target, 0.0, kwargs
        return " From 1 to 9."

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: What is guessed.

        Returns:
            Whether it is higher or lower.
        """
        if self.reward:
            raise ValueError("Game over.")
        self.reward = float(number == self.target)
        return "right" if self.reward else "higher" if number < self.target else "lower"

    def _secret(self) -> int:
        return self.target


def reward_func(environments, **kwargs) -> list[float]:
    return [environment.reward for environment in environments]


ROWS = [{"prompt": [{"role": "user", "content": "Guess."}], "target": target} for target in (2, 7)]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Guessing.made = 0


def playing(env: Any, script: Any, **settings: Any) -> ft.Run:
    return ft.Run(env=env, adapter=FakeAdapter(policy=Calling(script)), generations=2, **settings)


async def test_the_class_of_the_documentation_is_taken_with_its_reward_function():
    run = playing(Guessing, tries(5, 2), reward=reward_func, dataset=ROWS)
    epoch = await run.next_epoch()
    first = epoch.collection.trajectories[0][0]
    assert [(item.role.value, item.content) for item in first.episode if item.role.value in ("user", "tool")] == [
        ("user", "Guess. From 1 to 9."),
        ("tool", "lower"),
        ("tool", "right"),
    ]
    assert first.metadata["tools"][0]["function"]["name"] == "guess"
    assert first.metadata["tools"][0]["function"]["parameters"]["required"] == ["number"]
    assert first.metadata["output"] == {
        "reply": "done",
        "rewards": {"reward_func": 1.0},
        "turns": 3,
        "tool_calls": 2,
        "failed_calls": 0,
    }
    assert run.trajectories().reward.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert ROWS[0]["prompt"][0]["content"] == "Guess."
    assert run.rescore(lambda output: output["tool_calls"]).rollouts() is not None
    run.close()


async def test_what_a_tool_raises_and_a_tool_that_is_not_there_are_answers():
    def script(messages, seed):
        turn = sum(message["role"] == "assistant" for message in messages)
        return ['guess {"number": 2}', 'guess {"number": 2}', "leap {}", "_secret {}", "guess {}", "done"][turn]

    run = playing(Guessing, script, reward=reward_func, dataset=ROWS[:1])
    epoch = await run.next_epoch()
    answers = [item.content for item in epoch.collection.trajectories[0][0].episode if item.role.value == "tool"]
    assert answers[:4] == [
        "right",
        "{'error': 'Game over.'}",
        "{'error': 'Tool leap not found.'}",
        "{'error': 'Tool _secret not found.'}",
    ]
    assert "missing 1 required positional argument" in answers[4]
    assert epoch.collection.trajectories[0][0].metadata["output"]["failed_calls"] == 4
    run.close()


async def test_instances_are_made_once_and_reset_often():
    run = playing(Guessing, tries(2), reward=reward_func, dataset=ROWS, max_concurrency=1)
    for _ in range(3):
        await run.next_epoch()
    assert Guessing.made <= 2
    run.close()


class Scoring(Guessing):
    def reset(self, target=4, seed=0) -> None:  # type: ignore[override]
        self.target, self.reward, self.seed = target, 0.0, seed

    def get_reward(self) -> float:
        return self.reward + 0.5


async def test_get_reward_is_the_reward_and_adds_to_others():
    run = playing(Scoring, tries(4), env_options={"examples": 2, "seed": 3, "prompt": "Guess."})
    await run.next_epoch()
    assert run.trajectories().reward.tolist() == [1.5] * 4
    assert run.trajectories().example.unique().tolist() == ["seed-3", "seed-4"]
    run.close()

    def of_completions(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    run = playing(Scoring, tries(4), reward=[reward_func, of_completions], env_options={"examples": 1})
    await run.next_epoch()
    frame = run.trajectories()
    assert frame.reward.tolist() == [1.0 + 1.5 + len("done")] * 2
    assert frame.score_of_completions.tolist() == [4.0, 4.0]
    run.close()


async def test_a_mapping_of_environments_is_chosen_by_a_column_and_none_leaves_a_reward_out():
    class Other(Guessing):
        def reset(self, **kwargs):
            self.target, self.reward = 1, 0.0
            assert "environment" not in kwargs

    def first(environments, **kwargs):
        return [each.reward if type(each) is Guessing else None for each in environments]

    async def other(environments, **kwargs):
        return [each.reward + 10 if type(each) is Other else None for each in environments]

    rows = [{**ROWS[0], "environment": "first"}, {"prompt": "Guess.", "environment": "other"}]
    run = playing({"first": Guessing, "other": Other}, tries(2), reward=[first, other], dataset=rows)
    await run.next_epoch()
    assert run.trajectories().reward.tolist() == [1.0, 1.0, 10.0, 10.0]
    run.close()
    run = playing({"first": Guessing}, tries(2), reward=reward_func, dataset=[{"prompt": "a", "environment": "second"}])
    await run.next_epoch()
    assert run.trajectories().error.str.contains("`environment` is 'second'; expected one of 'first'").all()
    run.close()


async def test_the_turns_are_limited():
    run = playing(Guessing, tries(*[1] * 50), reward=reward_func, dataset=ROWS, env_options={"max_turns": 3})
    epoch = await run.next_epoch()
    assert epoch.collection.trajectories[0][0].metadata["output"]["turns"] == 3
    run.close()


async def test_a_run_continues_with_the_class_and_the_function_passed_again():
    run = playing(Guessing, tries(2), reward=reward_func, dataset=ROWS, name="games", output_dir=".")
    await run.next_epoch()
    run.close()
    adapter = FakeAdapter(policy=Calling(tries(2)))
    again = ft.Run.open("games", env=Guessing, reward=reward_func, dataset=ROWS, adapter=adapter)
    await again.next_epoch()
    assert again.trajectories().reward.tolist() == [1.0, 1.0, 0.0, 0.0] * 2
    assert not again.changes
    again.close()


async def test_mistakes_are_said_before_the_first_rollout():
    class Untyped:
        def reset(self):
            return None

        def look(self, where):
            return ""

    with pytest.raises(ConfigError, match=r"Untyped.look' has no schema.*docstring"):
        playing(Untyped, tries(), reward=reward_func)
    with pytest.raises(ConfigError, match="env is a mapping of environments: give dataset="):
        playing({"a": Guessing}, tries(), reward=reward_func)
    run = playing(Guessing, tries(), dataset=ROWS)
    with pytest.raises(ConfigError, match=r"no reward.*get_reward\(\).*`environments`"):
        await run.next_epoch()
    run.close()

    def wrong(environments):
        return 1.0

    run = playing(Guessing, tries(), reward=wrong, dataset=ROWS)
    await run.next_epoch()
    assert run.trajectories().error.str.contains("'wrong' returned 1.0; expected a list with one number").all()
    run.close()


def test_tools_are_the_public_methods_and_the_agent_can_be_pickled():
    assert tools_of(Scoring) == ["guess"]
    environment = environment_from(Guessing, {})
    environment.adapt_reward(reward_func)
    assert pickle.loads(pickle.dumps(environment.workflow)).environment.functions == {"reward_func": reward_func}
