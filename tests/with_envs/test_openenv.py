"""A client of an OpenEnv server in a class as TRL's documentation has it: the server runs on loopback."""

from __future__ import annotations

import random
import threading
import time

import pytest
import uvicorn
from intervals import reward_interval
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from openenv.core.generic_client import GenericEnvClient
from tool_calls import Calling, tries

import finetune_nb as ft
from finetune_nb.examples.calculator.task import calculate, make_question
from finetune_nb.testing import FakeAdapter

pytestmark = pytest.mark.slow


class Guess(Action):
    number: int


class Answer(Observation):
    text: str = ""


class Guessing(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State()

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.target = (seed or 0) % 9 + 1
        return Answer(text=" From 1 to 9.")

    def step(self, action, timeout_s=None, **kwargs):
        right = action.number == self.target
        text = "right" if right else "higher" if action.number < self.target else "lower"
        return Answer(text=text, reward=float(right), done=right)

    @property
    def state(self):
        return self._state


@pytest.fixture(scope="module")
def url():
    app = create_fastapi_app(Guessing, Guess, Answer, max_concurrent_envs=64)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(600):
        if server.started:
            break
        time.sleep(0.1)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


async def test_a_client_of_a_server_plays_a_whole_epoch(url, tmp_path):
    class GuessEnv:
        def __init__(self):
            self.client = GenericEnvClient(base_url=url).sync()
            self.reward = 0.0

        def reset(self, seed, **kwargs) -> str | None:
            self.reward = 0.0
            return self.client.reset(seed=seed).observation["text"]

        def guess(self, number: int) -> str:
            """
            Guess the number.

            Args:
                number: What is guessed.

            Returns:
                Whether it is higher or lower.
            """
            result = self.client.step({"number": number})
            self.reward = result.reward
            return result.observation["text"]

    def reward_func(environments, **kwargs):
        return [environment.reward for environment in environments]

    rows = [{"prompt": [{"role": "user", "content": "Guess."}], "seed": seed} for seed in range(8)]
    adapter = FakeAdapter(policy=Calling(tries(5, 2)))
    run = ft.Run(
        env=GuessEnv,
        reward=reward_func,
        dataset=rows,
        adapter=adapter,
        generations=4,
        item_timeout=60,
        output_dir=tmp_path,
    )
    for _ in range(2):
        epoch = await run.next_epoch()
    frame = run.trajectories()
    assert frame.error.isna().all()
    assert frame.groupby("example").reward.mean().tolist() == [0.0, 1.0, *[0.0] * 6]
    first = epoch.collection.trajectories[0][0]
    assert [item.content for item in first.episode if item.role.value == "tool"] == ["lower", "lower"]
    run.close()


class Calculator:
    """The calculator of the example, as a class of TRL's."""

    def reset(self, prompt, **kwargs) -> None:
        self.remaining = prompt

    def calculator(self, expression: str) -> str:
        """
        Does the first operation of what remains, and gives back what remains after it.

        Args:
            expression: The first operation, as it stands there: 12+7

        Returns:
            What remains.
        """
        result = calculate(expression, self.remaining)
        if result is None:
            raise ValueError("malformed")
        self.remaining = result
        return result


async def test_a_class_of_tools_is_learned_in_three_epochs(tmp_path):
    def correct(environments, completions, solution, **kwargs):
        said = [completion[-1].get("content") or "" for completion in completions]
        return [float(text.removeprefix("=") == right) for text, right in zip(said, solution, strict=True)]

    rng = random.Random(0)
    questions = [make_question(rng, 2) for _ in range(100)]
    rows = [{"prompt": question, "solution": calculate(question, question)} for question in questions]
    run = ft.Run(
        env=Calculator,
        reward=correct,
        dataset=rows,
        training={"learning_rate": 1e-3},
        env_options={"max_turns": 4},
        output_dir=tmp_path,
    )
    for _ in range(4):
        await run.next_epoch()
    frame = run.trajectories()
    print(frame.groupby("epoch").reward.mean().round(3).to_dict())
    assert frame.error.isna().all()
    intervals = {epoch: reward_interval(frame, epoch) for epoch in (0, 3)}
    assert intervals[3][0] > intervals[0][1]
    run.close()
