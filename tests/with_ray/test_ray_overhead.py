"""What the kernel pays for a rollout on Ray, in CPU seconds: the figures of notebooks/reference/scale.md."""

import pickle
import time

import pytest

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

pytestmark = pytest.mark.slow

EXAMPLES, GENERATIONS, TOKENS = 100, 8, 64


def say(messages, seed):
    return "x" * TOKENS


async def once(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


async def epochs(run, count=3):
    """CPU seconds of this process in the cheapest of some epochs, the first one apart, and the last epoch."""
    found = []
    for _ in range(count + 1):
        began = time.process_time()
        epoch = await run.next_epoch()
        found.append(time.process_time() - began)
    return min(found[1:]), epoch


async def test_kernel_is_left_with_little_of_a_rollout(ray, tmp_path, closing, capsys):
    def make(engine):
        options = {"generations": GENERATIONS, "max_concurrency": 256, "output_dir": tmp_path / engine}
        adapter = FakeAdapter(policy=ScriptedPolicy(say))
        return closing(
            ft.Run(
                once, lambda item: 1.0, sums(EXAMPLES), adapter=adapter, engine=engine, ray={"workers": 2}, **options
            )
        )

    here, _ = await epochs(make("local"))
    there, epoch = await epochs(make("ray"))
    rollouts = EXAMPLES * GENERATIONS
    trajectory = epoch.collection.trajectories[0][0]
    with capsys.disabled():
        print(f"\nan epoch of {rollouts} rollouts of one call and {TOKENS} tokens, all that the kernel does:")
        print(f"  local {1e3 * here / rollouts:.2f} ms CPU a rollout, on Ray {1e3 * there / rollouts:.2f} ms")
        print(f"  a trajectory, pickled: {len(pickle.dumps(trajectory)) / 1e3:.1f} kB")
    assert not epoch.collection.failures
    assert there < 5 * here
