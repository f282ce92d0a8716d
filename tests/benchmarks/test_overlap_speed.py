"""An epoch that is sampled while the epoch before it trains takes as long as the longer of the two."""

import asyncio
import time

from measuring import by_turns
from small_agents import coin, right

import finetune_nb as ft
from finetune_nb.testing import FakeAdapter, FakeAdapterConfig, ScriptedPolicy, sums

EPOCHS, SECONDS = 5, 1.0


async def waits(question, llm):
    await asyncio.sleep(SECONDS)  # for a tool, or a server elsewhere
    return (await llm.chat([{"role": "user", "content": question}])).content


def test_the_shorter_of_rollouts_and_training_takes_no_time_of_its_own(tmp_path):
    def epochs(staleness):
        adapter = FakeAdapter(FakeAdapterConfig(max_staleness=staleness), policy=ScriptedPolicy(coin), delay=SECONDS)
        run = ft.Run(waits, right, sums(4), adapter=adapter, generations=4, output_dir=tmp_path, num_epochs=EPOCHS)
        ft.run_sync(run.rollout())
        started = time.perf_counter()
        run.start()
        run.wait(progress=False)
        seconds = (time.perf_counter() - started) / EPOCHS
        run.close()
        return seconds

    found = by_turns(1, after=lambda: epochs(0), ahead=lambda: epochs(1))
    print(
        f"rollouts of {SECONDS:g} s and jobs of {SECONDS:g} s, {EPOCHS} epochs: {found['after']:.2f} s an epoch one after the "
        f"other, {found['ahead']:.2f} s with max_staleness 1"
    )
    # At best (EPOCHS + 1) / (2 * EPOCHS) of it: the first rollouts and the last job have nothing beside them.
    assert found.ratio("ahead", "after") < 0.8
