"""A kernel on one of the hosts: `python host_kernel.py WHAT OPTIONS`, the options as JSON. It prints what it finds, in lines of
JSON."""

import asyncio
import importlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import small_agents

import finetune_nb as ft
from finetune_nb.examples import calculator
from finetune_nb.store.durable import write_durably
from finetune_nb.store.store import RunStore
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums


def tell(**found):
    print(json.dumps(found, default=str), flush=True)


def say(messages, seed):
    return messages[-1]["content"] + (" yes" if seed % 2 else " no")


def exists(path):
    return os.path.exists(path)


def leave_mark(folder):
    Path(folder, socket.gethostname()).touch()


def make(folder, engine, seconds=0.0, rows=6, marks=None, module=None, **options):
    """A run whose agents ask a scripted policy twice and wait in between. marks: a folder where each leaves its host's
    name. module: one that they need."""
    needed = importlib.import_module(module) if module else None

    async def ask(question, llm):
        first = await llm.chat([{"role": "user", "content": needed.loud(question) if needed else question}])
        await asyncio.sleep(seconds)
        if marks:
            leave_mark(marks)
        second = await llm.chat([{"role": "user", "content": question}, first, {"role": "user", "content": "sure?"}])
        if question.startswith("0"):
            raise ValueError("no zeros")
        return second.content

    def ends_well(item):
        return float(item.output_obj.endswith("yes"))

    adapter = FakeAdapter(policy=ScriptedPolicy(say))
    options = {"generations": 4, "output_dir": folder, "adapter": adapter, "engine": engine, **options}
    return ft.Run(ask, ends_well, sums(rows), **options)


def told(epoch):
    """All that is recorded of an epoch's rollouts, but for the seconds."""
    found = {}
    for trajectory in (t for group in epoch.collection.trajectories for t in group):
        items = [item.model_dump(mode="json") for item in trajectory.episode]
        for item in items:
            (item["metadata"] or {}).pop("seconds", None)
        found[f"{trajectory.metadata['id']}/{trajectory.metadata['generation']}"] = trajectory.reward, items
    return found, sorted((str(f.example_id), f.generation, f.error) for f in epoch.collection.failures)


async def an_epoch(folder, engine, **options):
    """One epoch, or the error that there is instead."""
    with closing(make(folder, engine, **options)) as run:
        began = time.perf_counter()
        try:
            epoch = await run.next_epoch()
        except ft.FinetuneError as error:
            tell(error=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - began)
        else:
            tell(told=told(epoch), seconds=epoch.seconds)


async def epochs_until(folder, engine, until, **options):
    """Epochs until there is a file `until`. Says of each how often which rollout is in it."""
    with closing(make(folder, engine, **options)) as run:
        while not exists(until):
            epoch = await run.next_epoch()
            names = [
                (str(t.metadata["id"]), t.metadata["generation"]) for g in epoch.collection.trajectories for t in g
            ]
            names += [(str(f.example_id), f.generation) for f in epoch.collection.failures]
            progress = run._driver.progress
            tell(
                epoch=epoch.index,
                rollouts=len(names),
                different=len(set(names)),
                failures=Counter(f.error for f in epoch.collection.failures),
                done=progress.done,
                total=progress.total,
                seconds=epoch.seconds["total"],
            )


def waiting(seconds, slots, marks):
    """An agent that waits in one of its worker's slots."""

    async def wait(question, llm):
        async with small_agents.slots(slots):
            await asyncio.sleep(seconds)
        leave_mark(marks)
        return (await llm.chat([{"role": "user", "content": question}])).content

    return wait


async def epochs_by_turns(folder, engine, sides, turns, epochs, seconds, slots, marks, rows):
    """What epochs take. sides: settings of Ray by name, which take turns. marks: a folder that has one for each side
    of each turn. The first epoch of a turn is left out, as workers import then."""
    options = {"generations": 4, "output_dir": folder, "engine": engine, "max_concurrency": 1000}
    for turn, (side, settings) in itertools.product(range(turns), sides.items()):
        agent, adapter = waiting(seconds, slots, Path(marks, f"{side}{turn}")), FakeAdapter(policy=ScriptedPolicy(say))
        with closing(ft.Run(agent, lambda item: 1.0, sums(rows), adapter=adapter, ray=settings, **options)) as run:
            await run.next_epoch()
            for _ in range(epochs):
                epoch = await run.next_epoch()
                rollouts = sum(map(len, epoch.collection.trajectories))
                tell(turn=turn, side=side, seconds=epoch.seconds["total"], rollouts=rollouts)


async def trained(folder, engine, epochs, trainer_cpus=2, orphan_timeout=3600.0, die=None, **overrides):
    """Epochs of the demo in `folder`/run, begun or continued, with its trainer in an actor. die: "job": the kernel is killed
    while a job trains."""
    ray_settings = {"workers": 1, "worker_cpus": 0.25, "trainer": True, "trainer_cpus": trainer_cpus}
    overrides = {"run__engine": engine, "run__ray": {**ray_settings, "orphan_timeout": orphan_timeout}, **overrides}
    overrides |= {"run__checkpoint_every": 1, "run__deterministic": False, "finetuning__output_dir": folder}
    overrides |= {"finetuning__run_configuration__validation_dataset": None}
    overrides |= {"trajectory_builders__my_builder__examples_per_epoch": 8}
    overrides |= {"trainer_adapters__my_adapter__inner_epochs": 6}
    with closing(ft.Run.from_config(calculator.CONFIG, name="run", resume="auto", **overrides)) as run:
        tell(opened=len(run))
        run.start(epochs=epochs)
        ending, training = asyncio.create_task(run.wait_async(progress=False)), None
        while not ending.done():
            await asyncio.sleep(0.05)
            left = run._stored().partial() if run._driver.progress.phase == "training" else None
            if left is not None and left.job is not None and training != left.index:  # it was handed over
                training = left.index
                tell(training=training, job=left.job.metadata["job_id"])
                if die == "job":
                    os.kill(os.getpid(), signal.SIGKILL)
        try:
            await ending
        except ft.FinetuneError as error:
            tell(error=f"{type(error).__name__}: {error}")
        for epoch in run:
            tell(
                epoch=epoch.index,
                job=epoch.job.metadata["job_id"],
                status=epoch.job.status,
                versions=epoch.policy_versions,
                rollouts=sum(map(len, epoch.collection.trajectories)) + len(epoch.collection.failures),
                gap=epoch.train_metrics.get("logprob_gap"),
            )


async def write_slowly(file, until):
    """Writes a file into a folder of runs, which takes until there is a file `until`."""

    def write(unfinished):
        tell(pid=os.getpid())
        while not exists(until):
            time.sleep(0.05)
        unfinished.write(b"whole")

    write_durably(Path(file), write)


async def sweep(folder):
    """Makes a run, which removes what dead processes left in the folder of runs."""
    RunStore.create(folder, "run", {}).close()
    tell(processes=sorted(int(name) for name in os.listdir("/proc") if name.isdigit()))


def main(what, options):
    logging.basicConfig(format="%(message)s", level=logging.INFO)  # to stderr
    asyncio.run(globals()[what](**options))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
