"""A process that runs what it is told in forked children and has them killed with SIGKILL: at a named point, the n-th time
that it is reached, or some time after their start. `python killed.py` reads tasks as JSON lines.
"""

import asyncio
import inspect
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy  # noqa: F401  # everything heavy is loaded before the fork
import pyarrow.parquet  # noqa: F401
from detached import Detached, Weights
from small_agents import guess, right

import finetune_nb as ft
from finetune_nb.engine import observer
from finetune_nb.engine import run_writer as recorder
from finetune_nb.store import checkpoints as rewind
from finetune_nb.store import checkpoints as saved_weights
from finetune_nb.store import folder as run_folder
from finetune_nb.store import json as jsonl
from finetune_nb.store import runs as shelf
from finetune_nb.store import store
from finetune_nb.store import trajectories as trajectory_files
from finetune_nb.store.store import RunStore
from finetune_nb.testing import sums
from finetune_nb.training import trainer

EPOCHS = 6
POINTS = {
    "create": (store, "migrate"),
    "begin": (store.RunStore, "begin_epoch"),
    "ahead": (trainer.EpochTrainer, "_begin_ahead"),
    "begun ahead": (observer.TrainerObserver, "_start_ahead"),
    "taken up": (observer.TrainerObserver, "take_ahead"),
    "rollout": (ft.EvalTrajectoryBuilder, "_episode"),
    "collected": (recorder.RunWriter, "on_collected"),
    "selected": (recorder.RunWriter, "on_selected"),
    "submit": (None, "submit"),
    "submitted": (recorder.RunWriter, "on_submitted"),
    "job": (None, "wait_until_complete"),
    "waited": (recorder.RunWriter, "on_job_status"),
    "validated": (recorder.RunWriter, "on_validation"),
    "log": (trainer, "append_jsonl"),
    "checkpoint": (None, "save_checkpoint"),
    "file": (trajectory_files, "write_durably"),
    "rename": (run_folder.os, "replace"),
    "append": (store.RunStore, "append"),
    "prune": (saved_weights.Checkpoints, "prune"),
    "forget": (jsonl, "write_durably"),
    "close": (recorder.RunWriter, "_close"),
    "copy": (shelf.shutil, "copytree"),
    "move": (shelf.os, "rename"),
    "remove": (shelf.shutil, "rmtree"),
    "share": (rewind, "_share"),
    "rewind": (store.RunStore, "rewind"),
}


def record_of(folder):
    """All that may not depend on when a run was killed."""
    return [
        {
            "index": epoch.index,
            "rewards": epoch.statistics.rewards.tolist(),
            "examples": list(epoch.statistics.example_ids),
            "kept": epoch.selection.kept.tolist(),
            "reasons": epoch.selection.reasons.tolist(),
            "curriculum": epoch.curriculum,
            "state": epoch.selection.state,
            "metrics": epoch.metrics,
            "versions": epoch.policy_versions,
            "validations": [(v.epoch, v.policy_version, v.mean_reward) for v in epoch.validations],
            "job": epoch.job and epoch.job.status,
            "texts": [[m.content for m in t.episode] for g in epoch.collection.trajectories for t in g],
        }
        for epoch in RunStore.open(folder).epochs
    ]


def die_at(point: str, when: str, nth: int, adapter: type) -> None:
    owner, name = POINTS[point]
    owner = owner or adapter
    original = getattr(owner, name)
    seen = 0

    def hit() -> None:
        nonlocal seen
        seen += 1
        if seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def point_reached(*args, **kwargs):
        if when == "before":
            hit()
        result = original(*args, **kwargs)
        if when == "after":
            hit()
        return result

    async def awaited(*args, **kwargs):
        if when == "before":
            hit()
        result = await original(*args, **kwargs)
        if when == "after":
            hit()
        return result

    setattr(owner, name, awaited if inspect.iscoroutinefunction(original) else point_reached)


def make(folder: Path, backend: str, resume="auto", name="run"):
    staleness = int(backend.endswith("ahead"))
    if backend.startswith("detached"):
        adapter = Detached(folder / "backend", staleness=staleness)
    else:
        adapter = Weights(delay=0.03 if staleness else 0.002, staleness=staleness)
    options = {
        "generations": 4,
        "output_dir": folder,
        "curriculum": dict(expansion_interval=2),
        "validation_interval": 2,
    }
    return ft.Run(
        guess, right, sums(6), validation=sums(3, seed=9), adapter=adapter, name=name, resume=resume, **options
    )


def tell(folder: Path, index: int) -> None:
    with open(folder / "told", "a") as told:
        told.write(f"{index}\n")


async def do(task: dict) -> None:
    folder = Path(task["folder"])
    run = make(folder, task["backend"])
    if task.get("act") == "fork":
        run.fork(epoch=1, name="branch", adapter=Weights())
        return
    if task.get("act") in ("archive", "delete"):
        getattr(run, task["act"])()
        return
    if task["backend"].endswith("ahead"):
        return await start(run, folder)
    every = task.get("every", 1)
    run.config.run.checkpoint_every = every
    while len(run) < EPOCHS:
        if len(run) == 2 and not run.changes and every == 1:
            run.curriculum = {"percentile": 0.6}
        epoch = await run.next_epoch()
        tell(folder, epoch.index)
    run.close()


async def start(run, folder: Path) -> None:
    """All epochs that are left, in the background: each is sampled while the one before it trains."""
    told = len(run)
    if told < EPOCHS:
        run.start(EPOCHS - told)
    while told < EPOCHS:
        while told < len(run):
            tell(folder, told)
            told += 1
        assert run.status.active or told == EPOCHS, run.error
        await asyncio.sleep(0.002)
    run.close()


def child(task: dict) -> None:
    if "point" in task:
        die_at(
            task["point"], task["when"], task["nth"], Detached if task["backend"].startswith("detached") else Weights
        )
    else:
        threading.Thread(
            target=lambda: (time.sleep(task["after"]), os.kill(os.getpid(), signal.SIGKILL)), daemon=True
        ).start()
    asyncio.run(do(task))


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                child(task)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
