"""A kernel with a vLLM server of its own, in bfloat16: `python own_server.py MODEL FOLDER`. It tells its steps, one a line, and
is killed in the end: nobody closes anything.
"""

import asyncio
import os
import sys
import time

import finetune_nb as ft

WORDS = ("one", "two", "three", "four")


async def answer(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def reward(output):
    return float(sum(map(ord, output)) % 7)


def told(*words):
    print(*words, flush=True)


async def main(model, folder):
    run = ft.Run(
        answer,
        reward,
        [{"question": word} for word in WORDS],
        model=model,
        training={"lora": {"rank": 8}, "learning_rate": 0.01, "importance_cap": 2.0},
        sampler={"dtype": "bfloat16"},
        sampling={"max_tokens": 12},
        generations=6,
        output_dir=folder,
        name="run",
    )
    started = time.monotonic()
    epochs = [await run.next_epoch()]
    process = run._driver.adapter._vllm.process
    told("server", process.pid, f"{time.monotonic() - started:.1f}")
    # Its engine is killed while an epoch is sampled: the server is started again, and the epoch ends as if nothing had been.
    under_way = asyncio.create_task(run.next_epoch())
    await asyncio.sleep(0.05)
    os.killpg(process.pid, 9)
    epoch = await under_way
    epochs.append(epoch)
    told(
        "again", process.pid, sum(len(group) for group in epoch.collection.trajectories), len(epoch.collection.failures)
    )
    measured = [each.job.metadata["metrics"] for each in epochs]
    told("ratios", *(each["importance_ratio"] for each in measured))
    told("gaps", *(each["logprob_gap"] for each in measured))
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
