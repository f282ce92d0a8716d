"""What the loop around text environments costs beside the same loop written by hand, and what many games at once do to memory."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from measuring import by_turns

import finetune_nb as ft
from finetune_nb.environments.thread import IDLE_SECONDS
from finetune_nb.testing import FakeAdapter, ScriptedPolicy

pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.measures]


class Sums:
    """Three sums, one after the other."""

    def reset(self, seed: int) -> str:
        self.random, self.turn = random.Random(seed), 0
        return self._next()

    def step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        right = action == f"={eval(self.shown)}"
        self.turn += 1
        return self._next(), float(right), self.turn == 3, {}

    def _next(self) -> str:
        self.shown = f"{self.random.randint(1, 20)}+{self.random.randint(1, 20)}"
        return self.shown


async def by_hand(seed: int, llm: Any) -> list[float]:
    game, rewards, messages, done = Sums(), [], [], False
    shown = game.reset(seed)
    while not done:
        messages.append({"role": "user", "content": shown})
        reply = await llm.chat(messages)
        messages.append(reply)
        shown, reward, done, _ = game.step(reply.content)
        rewards.append(reward)
    return rewards


@pytest.mark.parametrize("own_random", [False, True])
@pytest.mark.parametrize(("model", "limit"), [("embedded", 1.5), ("scripted", 4.0)])
def test_the_loop_adds_little_to_a_rollout(tmp_path, own_random, model, limit):
    """Rollouts without their training: 128 episodes of three turns. What a scripted model says costs nothing, so that its ratio
    is that of the two loops."""
    rows = [{"id": str(seed), "seed": seed} for seed in range(128)]

    def settings() -> dict[str, Any]:
        scripted = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "=12"))
        return {
            "adapter": scripted if model == "scripted" else None,
            "validation_interval": 10**6,
            "max_concurrency": 128,
            "output_dir": tmp_path,
            "sampling": {"max_tokens": 8},
        }

    options = {"examples": 1, "own_random": own_random}
    bridge = ft.Run(env=Sums, env_options=options, validation=rows, **settings())
    plain = ft.Run(by_hand, lambda output: output, rows[:1], validation=rows, **settings())
    measured = by_turns(
        7, bridge=lambda: ft.run_sync(bridge.validate()) and None, plain=lambda: ft.run_sync(plain.validate()) and None
    )
    ratio = measured.ratio("bridge", "plain")
    by_bridge, plainly = (1000 * measured[side] / len(rows) for side in ("bridge", "plain"))
    print(
        f"\n{model}, own random {own_random}: {plainly:.2f} ms CPU a rollout by hand, {by_bridge:.2f} by the bridge, "
        f"{ratio:.3f} times (target 1.05)"
    )
    bridge.close()
    plain.close()
    assert ratio < limit


def test_256_games_at_once_leave_nothing_behind(tmp_path):
    class Counted(Sums):
        open = most = 0

        def __init__(self) -> None:
            Counted.open += 1
            Counted.most = max(Counted.most, Counted.open)

        def close(self) -> None:
            Counted.open -= 1

    adapter = FakeAdapter(policy=ScriptedPolicy(lambda messages, seed: "=1"))
    options = {"examples": 32}
    run = ft.Run(
        env=Counted, env_options=options, adapter=adapter, generations=8, max_concurrency=256, output_dir=tmp_path
    )
    sizes = []
    for epoch in range(25):
        ft.run_sync(run.next_epoch())
        adapter.submitted.clear()
        if epoch in (4, 24):
            sizes.append(resident())
    print(f"\n{Counted.most} games at once; {(sizes[1] - sizes[0]):.1f} MB more after 20 epochs of 256 games")
    assert Counted.open == 0
    assert Counted.most > 128
    deadline = time.monotonic() + 6 * IDLE_SECONDS
    while threading.active_count() >= 40 and time.monotonic() < deadline:
        time.sleep(0.5)  # threads of ended games wait that long for another one
    assert threading.active_count() < 40
    assert sizes[1] - sizes[0] < 20
    run.close()


def resident() -> float:
    """Memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000
