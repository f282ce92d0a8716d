"""Anything with reset() and step(text): the loop around it, its seeds, and that it is closed whatever happens."""

from __future__ import annotations

import asyncio
import functools
import pickle
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

import finetune_nb as ft
from finetune_nb.components.environments import environment_from
from finetune_nb.environments import thread
from finetune_nb.environments.text import Play, TextOptions, step_of
from finetune_nb.errors import ConfigError, WorkflowError
from finetune_nb.testing import FakeAdapter, ScriptedPolicy


class Counting:
    """Shows a number; the right reply is the next one. It is over after `length` right replies."""

    made: list[Counting] = []

    def __init__(self, length: int = 3) -> None:
        self.length, self.closed, self.threads = length, 0, {threading.get_ident()}
        Counting.made.append(self)

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self.threads.add(threading.get_ident())
        self.now = self.first = seed or 0
        return str(self.now), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.threads.add(threading.get_ident())
        right = action.strip() == str(self.now + 1)
        self.now += right
        return str(self.now), float(right), self.now - self.first == self.length, False, {"right": right, "board": [1]}

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed += 1


@pytest.fixture(autouse=True)
def forget():
    Counting.made.clear()
    Ragged.seen.clear()


def counts(messages: list[dict[str, Any]], seed: int) -> str:
    return str(int(messages[-1]["content"]) + 1)


def playing(env: Any, script: Any = counts, generations: int = 2, **settings: Any) -> ft.Run:
    options = {"examples": 3, "seed": 5, **settings.pop("env_options", {})}
    return ft.Run(
        env=env,
        env_options=options,
        adapter=FakeAdapter(policy=ScriptedPolicy(script)),
        generations=generations,
        **settings,
    )


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


async def outputs(run: ft.Run) -> list[Any]:
    epoch = await run.next_epoch()
    found = [trajectory.metadata["output"] for group in epoch.collection.trajectories for trajectory in group]
    run.close()
    return found


async def test_an_episode_is_a_conversation_with_a_reward_at_each_step():
    run = playing(Counting)
    epoch = await run.next_epoch()
    first = epoch.collection.trajectories[0][0]
    assert [item.content for item in first.episode] == ["5", "6", "6", "7", "7", "8"]
    assert (first.reward, first.shaped_rewards) == (3.0, [1.0, 1.0, 1.0])
    assert first.metadata["output"] == {
        "reward": 3.0,
        "step_rewards": [1.0, 1.0, 1.0],
        "turns": 3,
        "ended": "done",
        "observation": "8",
        "info": {"right": True},
    }
    assert run.epochs().drifted_turns.tolist() == [0]
    rescored = run.rescore(lambda output: -output["turns"])
    assert set(rescored.rollouts().new_reward if "new_reward" in rescored.rollouts() else [-3.0]) == {-3.0}
    run.close()


async def test_all_rollouts_of_an_example_begin_with_its_seed_and_each_has_an_instance_and_a_thread():
    await outputs(playing(Counting, generations=4))
    assert sorted(game.first for game in Counting.made) == [5] * 4 + [6] * 4 + [7] * 4
    assert {game.closed for game in Counting.made} == {1}
    assert {len(game.threads) for game in Counting.made} == {1}
    assert threading.get_ident() not in set().union(*(game.threads for game in Counting.made))


async def test_a_thread_is_used_again_and_ends_when_nobody_has_it(monkeypatch):
    monkeypatch.setattr(thread, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(thread._Thread, "_idle", [])  # without those of other tests
    before = threading.active_count()
    run = playing(Counting, max_concurrency=1)
    await run.next_epoch()
    assert len(Counting.made) == 6
    threads = set().union(*(game.threads for game in Counting.made))
    assert len(threads) < 6
    await until(lambda: not thread._Thread._idle)
    run.close()
    await until(lambda: threading.active_count() <= before)


async def test_the_turns_are_limited_and_the_sum_can_be_the_reward():
    run = playing(Counting, lambda messages, seed: "wrong", env_options={"max_turns": 2, "shaped": False})
    epoch = await run.next_epoch()
    trajectory = epoch.collection.trajectories[0][0]
    assert (trajectory.reward, trajectory.shaped_rewards) == (0.0, None)
    assert trajectory.metadata["output"]["ended"] == "turn limit"
    assert trajectory.metadata["output"]["turns"] == 2
    run.close()


@pytest.mark.parametrize(("history", "lengths"), [(None, [2, 4, 6]), (0, [2, 2, 2]), (1, [2, 4, 4])])
async def test_the_model_sees_as_many_earlier_turns_as_are_asked_for(history, lengths):
    seen = []

    def script(messages, seed):
        seen.append(len(messages))
        assert messages[0] == {"role": "system", "content": "Count."}
        return counts(messages, seed)

    await outputs(playing(Counting, script, 1, env_options={"examples": 1, "history": history, "system": "Count."}))
    assert seen == lengths


async def test_held_out_episodes_have_seeds_of_their_own():
    run = playing(Counting, env_options={"validation": 2})
    await run.validate()
    assert sorted({game.first for game in Counting.made}) == [8, 9]
    run.close()


class Old(Counting):
    """The older interface, without a seed."""

    def reset(self):  # type: ignore[override]
        return super().reset(0)[0]

    def step(self, action):  # type: ignore[override]
        observation, reward, done, _, info = super().step(action)
        return observation, reward, done, info


class Coroutines(Counting):
    async def reset(self, seed=None):  # type: ignore[override]
        await asyncio.sleep(0)
        return super().reset(seed)

    async def step(self, action):  # type: ignore[override]
        await asyncio.sleep(0)
        return super().step(action)

    async def close(self):  # type: ignore[override]
        await asyncio.sleep(0)
        super().close()


@pytest.mark.parametrize("env", [Old, Coroutines, lambda: Counting(length=2), "text:test_text:Counting"])
async def test_other_shapes_of_the_interface(env, monkeypatch):
    monkeypatch.syspath_prepend(str(__file__).rpartition("/")[0])
    import test_text

    test_text.Counting.made.clear()
    found = await outputs(playing(env))
    assert [each["reward"] for each in found] == [found[0]["turns"]] * 6
    made = Counting.made + test_text.Counting.made
    assert {game.closed for game in made} == {1}


async def test_what_an_environment_raises_is_a_failed_rollout_and_it_is_closed():
    class Crashing(Counting):
        def step(self, action):
            if self.first == 6:
                raise SystemExit(3) if len(self.made) % 2 else ValueError("no such move")
            return super().step(action)

    run = playing(Crashing)
    await run.next_epoch()
    frame = run.trajectories()
    assert frame.error.notna().tolist().count(True) == 2
    assert (
        frame.error.dropna().str.contains(r"Crashing raised in step\(\): (?:ValueError|RuntimeError: SystemExit)").all()
    )
    assert {game.closed for game in Counting.made} == {1}
    run.close()


async def test_an_environment_that_cannot_be_made_or_closed_harms_nobody_else():
    class Half(Counting):
        def __init__(self):
            super().__init__()
            if len(self.made) == 1:
                raise OSError("no display")

        def close(self):
            super().close()
            raise ValueError("never opened")

    run = playing(Half)
    await run.next_epoch()
    frame = run.trajectories()
    assert frame.error.dropna().tolist()[0].startswith("WorkflowError: ") and frame.error.count() == 1
    assert "raised in making it: OSError: no display" in frame.error.dropna().iloc[0]
    run.close()


@pytest.mark.slow
@pytest.mark.proof
async def test_one_that_hangs_is_closed_when_it_returns_and_blocks_nobody(monkeypatch):
    monkeypatch.setattr(thread, "TURN_SECONDS", 0.05)
    released, returned = threading.Event(), []

    class Hanging(Counting):
        def step(self, action):
            if self.first == 6:
                returned.append(released.wait(60))
            return super().step(action)

    run = playing(Hanging, item_timeout=5, env_options={"own_random": True})
    await run.next_epoch()
    assert not returned  # nobody waited for it
    frame = run.trajectories()
    assert frame.error.dropna().str.contains("RolloutTimeout").tolist() == [True, True]
    assert frame.reward.dropna().tolist() == [3.0] * 4  # although it took its turn at the random generators
    hanging = [game for game in Counting.made if game.first == 6]
    assert {game.closed for game in hanging} == {0}
    released.set()
    await until(lambda: {game.closed for game in hanging} == {1})
    run.close()


async def test_an_abort_closes_all_of_them():
    begun = threading.Event()

    def script(messages, seed):
        begun.set()
        return counts(messages, seed)

    run = playing(lambda: Counting(length=10**9), script, env_options={"max_turns": 10**6})
    run.start(1)
    assert await asyncio.to_thread(begun.wait, 20)
    run.abort()
    await until(lambda: {game.closed for game in Counting.made} == {1})
    run.close()


async def until(holds: Any) -> None:
    for _ in range(400):
        if holds():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come to that")


async def test_a_sync_environment_does_not_block_the_event_loop():
    going_on = threading.Event()

    class Waiting(Counting):
        def step(self, action):
            assert going_on.wait(20), "the event loop stood still"
            return super().step(action)

    play = Play(environment_from(Waiting, {}).maker(), "Waiting", TextOptions(max_turns=2), isolated=False)  # type: ignore[attr-defined]
    row = {"id": "a", "seed": 1}
    item = ft.EvalInputItem(id="a", input_obj=None, expected_output_obj=None, full_dataset_entry=row)

    class Reply:
        async def chat(self, messages):
            return type("Reply", (), {"content": "2"})()

    episodes = asyncio.gather(*(play(item, Reply()) for _ in range(8)))
    await asyncio.sleep(0.05)
    going_on.set()
    assert len(await episodes) == 8


class Ragged:
    """Draws from the global generators at every step, as many games do, and ignores its seed."""

    seen: dict[int, list[tuple[float, ...]]] = {}

    def reset(self, seed):
        self.seed, self.drawn = seed, [random.random()]
        return "go"

    def step(self, action):
        time.sleep(0.001)
        self.drawn.append(random.random())
        if len(self.drawn) == 5:
            self.seen.setdefault(self.seed, []).append(tuple(self.drawn))
        return "go", 0.0, len(self.drawn) == 5, {}


async def test_with_a_random_state_of_its_own_a_seed_is_one_episode():
    await outputs(playing(Ragged, lambda messages, seed: "x", 6, env_options={"own_random": True}))
    assert {seed: len(set(drawn)) for seed, drawn in Ragged.seen.items()} == {5: 1, 6: 1, 7: 1}
    assert len({drawn[0] for drawn in Ragged.seen.values()}) == 3


def test_the_global_generators_are_given_back():
    def draw() -> tuple[float, float]:
        return random.random(), float(np.random.random())

    random.seed(7)
    np.random.seed(7)
    expected = [draw(), draw(), draw()]
    random.seed(7)
    np.random.seed(7)
    own, twin = thread.OwnRandom(3), thread.OwnRandom(3)
    drawn = {own: [], twin: []}
    found = []
    for _ in range(3):
        found.append(draw())
        for each in (own, twin):
            with each.in_force():
                drawn[each].append(draw())
    assert found == expected
    assert drawn[own] == drawn[twin]
    assert len(set(drawn[own])) == 3


def test_a_turn_at_the_generators_is_handed_on_in_order_and_passes_whoever_gave_up(monkeypatch):
    monkeypatch.setattr(thread, "TURN_SECONDS", 0.05)
    state = random.getstate()
    first, second, third = (thread.OwnRandom(seed) for seed in range(3))
    begun = []
    for each in (first, second, third):
        each.ask(functools.partial(begun.append, each))
    assert begun == [first]
    second.abandon()
    with first.in_force():
        random.random()
    assert begun == [first, third]
    with second.in_force():  # third never comes: it has lost its turn
        random.random()
    assert random.getstate() == state
    assert not thread.OwnRandom._waiting and thread.OwnRandom._holder is None


async def test_a_reward_that_never_comes_is_missing_and_says_what_to_do():
    class Unscored(Counting):
        def step(self, action):
            observation, _, done, truncated, info = super().step(action)
            return observation, None, done, truncated, info

    run = playing(Unscored, env_options={"max_turns": 2})
    await run.next_epoch()
    assert run.trajectories().reward.isna().all()
    assert run.trajectories().error.str.contains("not over after 2 turns.*max_turns.*unfinished_reward").all()
    run.close()
    found = await outputs(playing(Unscored, env_options={"max_turns": 2, "unfinished_reward": -1}))
    assert [each["reward"] for each in found] == [-1.0] * 6


async def test_a_reward_that_is_no_number_fails_the_rollout():
    class Wild(Counting):
        def step(self, action):
            return "", float("nan"), True, {}

    run = playing(Wild)
    await run.next_epoch()
    assert run.trajectories().error.str.contains("gave the reward nan; expected a finite number").all()
    run.close()


def test_mistakes_are_said_when_the_run_is_made():
    with pytest.raises(ConfigError, match="env_options has no 'turns'.*max_turns"):
        playing(Counting, env_options={"turns": 3})
    with pytest.raises(ConfigError, match="max_turns: Input should be greater"):
        playing(Counting, env_options={"max_turns": 0})
    with pytest.raises(ConfigError, match="env is an object of Counting.*each needs one of its own.*env=Counting"):
        playing(Counting())
    with pytest.raises(ConfigError, match='"text:nowhere:Game" cannot be imported'):
        playing("text:nowhere:Game")
    with pytest.raises(WorkflowError, match=r"step\(\) returned a tuple of 3"):
        step_of(("a", 1.0, True))


def test_the_agent_can_be_pickled():
    environment = environment_from(Counting, {"examples": 2})
    for part in (environment.workflow, environment.reward):
        assert pickle.loads(pickle.dumps(part)) is not None
