"""What storing a run costs. Absolute figures are printed, in CPU seconds on one core; a test fails on ratios alone."""

import math
import os
import random
import struct
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from factories import collected, make_epoch, make_trajectory
from measuring import by_turns, cpu

from finetune_nb.frames import trajectories
from finetune_nb.store.store import RunStore
from finetune_nb.types import EpisodeItem, Trajectory

GROUPS, GENERATIONS, TOKENS, VOCABULARY = 1250, 8, 64, 32_000


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def sampled(draw: random.Random, example: int, generation: int) -> Trajectory:
    """64 sampled tokens with ids, texts, logprobs and the ids of their prompt, as the local backend records them."""
    ids = [min(int(draw.expovariate(1 / 3000)), VOCABULARY - 1) for _ in range(TOKENS)]
    texts = [f" tok{i}" for i in ids]
    metadata = {
        "finish_reason": "stop",
        "temperature": 1.0,
        "token_ids": ids,
        "tokens": texts,
        "prompt_token_ids": [(example * 7 + place) % VOCABULARY for place in range(32)],
        "exact": True,
    }
    logprobs = [float32(-draw.expovariate(1)) for _ in ids]
    return Trajectory(
        episode=[
            EpisodeItem(role="user", content=f"question {example}"),
            EpisodeItem(role="assistant", content="".join(texts), logprobs=logprobs, metadata=metadata),
        ],
        reward=draw.random(),
        metadata={"id": f"q{example}", "generation": generation, "policy_version": 0, "scores": {"reward": 0.5}},
    )


def epoch_of(groups, index=0):
    from finetune_nb.training.curriculum import group_statistics
    from finetune_nb.types import TrajectoryCollection

    base = make_epoch([[t.reward for t in group] for group in groups], index)
    collection = TrajectoryCollection.model_construct(trajectories=groups, run_id="run", failures=[])
    return replace(base, collection=collection, statistics=group_statistics(groups))


@pytest.mark.proof
@pytest.mark.benchmark(group="store")
def test_an_epoch_of_10000_trajectories_is_saved_smaller_than_its_json(benchmark, tmp_path):
    draw = random.Random(0)
    epoch = epoch_of([[sampled(draw, e, g) for g in range(GENERATIONS)] for e in range(GROUPS)])
    text = tmp_path / "epoch.json"
    folders = iter(range(100))

    def save():
        with RunStore.create(tmp_path / f"run{next(folders)}", "run", {}) as store:
            return cpu(lambda: store.append(epoch, {}))

    names = ["generation", "error", "turns", "tokens", "policy_version", "finish_reason", "scores"]
    found = by_turns(3, own=save, plain=lambda: text.write_text(epoch.collection.model_dump_json()))
    benchmark.pedantic(save, rounds=1)
    store = RunStore.open(tmp_path / "run0")
    reading = by_turns(
        3,
        columns=lambda: store.columns(0, names).to_pandas(),
        frame=lambda: trajectories(RunStore.open(tmp_path / "run0").epochs),
        everything=lambda: RunStore.open(tmp_path / "run0").epochs[0].collection,
    )
    megabytes, plain_megabytes = store.size() / 1e6, text.stat().st_size / 1e6
    rollouts = [t for group in epoch.collection.trajectories[:100] for t in group]
    with RunStore.create(tmp_path / "partial", "run", {}) as partial:
        partial.begin_epoch(0, 0.0, 0)
        single = cpu(lambda: [partial.add_rollouts(0, collected([t])) for t in rollouts[:200]]) / 200
        batched = (
            cpu(lambda: [partial.add_rollouts(0, collected(rollouts[i : i + 16])) for i in range(0, 800, 16)]) / 800
        )
    figures = {f"{side}_s": of[side] for of in (found, reading) for side in of.seconds} | {"MB": megabytes}
    benchmark.extra_info |= {**figures, "json_MB": plain_megabytes, "target_s": 0.4, "target_MB": 8}
    print(
        f"\n10,000 trajectories x {TOKENS} tokens: saved in {found['own']:.2f} s CPU, {megabytes:.1f} MB "
        f"(JSON: {found['plain']:.2f} s, {plain_megabytes:.1f} MB); columns read in {reading['columns']:.3f} s, "
        f"the trajectories frame, opening included, in {reading['frame']:.3f} s, all of it in "
        f"{reading['everything']:.2f} s; "
        f"a rollout as it comes in {single * 1e3:.1f} ms, in batches of 16 {batched * 1e3:.2f} ms"
    )
    assert megabytes < plain_megabytes / 3
    assert found.ratio("own", "plain") < 5
    assert reading.ratio("everything", "columns") > 5
    assert reading.ratio("everything", "frame") > 5


@pytest.mark.benchmark(group="store")
def test_prompts_that_share_prefixes_are_stored_little_more_than_once(benchmark, tmp_path):
    draw = random.Random(0)
    turns, added = 20, 100

    def episode(example):
        ids, items = [draw.randrange(VOCABULARY) for _ in range(500)], []
        for _ in range(turns):
            reply = [draw.randrange(VOCABULARY) for _ in range(added)]
            metadata = {"prompt_token_ids": list(ids), "token_ids": reply}
            items.append(EpisodeItem(role="assistant", content="x", logprobs=[-0.5] * added, metadata=metadata))
            ids = ids + reply
        return Trajectory(episode=items, reward=draw.random(), metadata={"id": example, "generation": 0})

    groups = [[episode(e)] for e in range(200)]
    with RunStore.create(tmp_path / "run", "run", {}) as store:
        seconds = benchmark.pedantic(lambda: cpu(lambda: store.append(epoch_of(groups), {})), rounds=1)
        size = store.size()
    once = 200 * 4 * (500 + 2 * turns * added)  # bytes of all ids, each stored once as prompt and once as reply
    everything = 200 * 4 * sum(500 + turn * added for turn in range(turns))
    written_out = f"{everything / 1e6:.1f} MB of ids written out"
    print(f"\nprompts of {turns} turns: {size / 1e6:.1f} MB ({written_out}) in {seconds:.2f} s CPU")
    assert size < 2 * once < everything


OPENING = """
import resource, sys, time
import numpy, pydantic
from finetune_nb.frames import trajectories
from finetune_nb.store.store import RunStore
before, started = int(open("/proc/self/statm").read().split()[1]) * 4096, time.process_time()
store = RunStore.open(sys.argv[1])
epochs = store.epochs
seconds = time.process_time() - started
rewards = sum(len(epoch.statistics.rewards) for epoch in epochs)
print(seconds, int(open("/proc/self/statm").read().split()[1]) * 4096 - before, len(epochs), rewards)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory from /proc")
@pytest.mark.benchmark(group="store")
def test_opening_a_long_run_costs_little_beside_reading_its_trajectories(benchmark, tmp_path):
    epochs, groups = 1000, 125
    folder = tmp_path / "run"
    draw = random.Random(0)
    one = epoch_of([[make_trajectory(draw.random(), f"q{e}", g) for g in range(8)] for e in range(groups)])
    with RunStore.create(folder, "run", {}) as store:
        for index in range(epochs):
            store.append(replace(one, index=index), {"index": index})

    def opened():
        done = subprocess.run([sys.executable, "-c", OPENING, str(folder)], capture_output=True, text=True, check=True)
        seconds, memory, count, rewards = map(float, done.stdout.split())
        assert (count, rewards) == (epochs, epochs * groups * 8)
        return seconds, memory

    seconds, memory = benchmark.pedantic(opened, rounds=1)
    stored = RunStore.open(folder).epochs
    read = cpu(lambda: [epoch.collection for epoch in stored[:20]]) / 20 * epochs
    benchmark.extra_info |= {"open_s": seconds, "MB": memory / 1e6, "target_s": 0.5, "target_MB": 100}
    print(
        f"\n1,000 epochs x 1,000 trajectories opened in {seconds:.2f} s CPU, {memory / 1e6:.0f} MB more; "
        f"reading all trajectories would take {read:.0f} s"
    )
    assert not math.isnan(seconds) and seconds < read / 5


WRITES = [
    "begin_epoch",
    "add_rollouts",
    "record_selection",
    "record_job",
    "record_status",
    "add_validation",
    "record_change",
    "record_event",
    "set_state",
]


def test_recording_costs_little_beside_an_epoch_of_the_demo(tmp_path, benchmark, monkeypatch):
    """CPU seconds of everything that is written while an epoch runs and at its end, checkpoint included, beside those of the
    whole epoch; in one run."""
    import asyncio

    import finetune_nb as ft
    from finetune_nb.engine.run_writer import RunWriter
    from finetune_nb.examples import calculator

    pytest.importorskip("torch")
    spent, ending = [], []

    def in_its_thread(write):
        def measured(*args, **kwargs):
            begun = time.thread_time()  # the epoch's own work goes on beside it
            try:
                return write(*args, **kwargs)
            finally:
                if not ending:
                    spent.append(time.thread_time() - begun)

        return measured

    async def measured(recorder, *args):
        begun = time.process_time()  # nothing else is at work then
        ending.append(True)
        try:
            return await ended(recorder, *args)
        finally:
            ending.clear()
            spent.append(time.process_time() - begun)

    async def epochs():
        run = ft.Run.from_config(calculator.CONFIG, finetuning__output_dir=str(tmp_path))
        for _ in range(2):  # warm up
            await run.next_epoch()
        spent.clear()
        begun = time.process_time()
        for _ in range(4):
            await run.next_epoch()
        whole = time.process_time() - begun
        await asyncio.to_thread(run.close)
        return whole

    ended = RunWriter.store_epoch
    monkeypatch.setattr(RunWriter, "store_epoch", measured)
    for name in WRITES:
        monkeypatch.setattr(RunStore, name, in_its_thread(getattr(RunStore, name)))
    whole = benchmark.pedantic(lambda: asyncio.run(epochs()), rounds=1, iterations=1)
    print(f"\nrecording: {1000 * sum(spent) / 4:.0f} ms CPU an epoch, {sum(spent) / whole:.1%} of it")
    assert sum(spent) < 0.08 * whole
