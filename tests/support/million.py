"""Epochs of very many trajectories, really run: what each stage takes, of a process of its own.

    python tests/support/million.py FOLDER --trajectories 100000 --epochs 10

Only the policy is made up: its replies are random tokens, and it takes as long over each as a real one did, on a clock that is
a thousand times as fast. Everything else is what a run does: rollouts, trajectories, curriculum, record, frames, exports.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import functools
import json
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import finetune_nb as ft
from finetune_nb.analysis.browse_index import browse_index, least_likely
from finetune_nb.interfaces import Policy
from finetune_nb.store.store import RunStore
from finetune_nb.testing import FakeAdapter
from finetune_nb.training.trainer import EpochTrainer
from finetune_nb.types import Sample, SamplingParams

GENERATIONS, TOKENS, VOCABULARY = 8, 64, 32_000
LATENCIES = [0.05, 0.19, 0.23, 0.24, 0.26, 0.28, 0.3, 0.32, 0.34, 0.37, 0.39, 0.4, 0.42, 0.44, 0.45, 0.48, 0.53]
"""Seconds of a model call, as quantiles: measured with the embedded model, two epochs of the demo, 64 agents at once."""
TIMES_AS_FAST = 1000
TEXTS = [f" tok{token}" for token in range(VOCABULARY)]


class RandomPolicy(Policy):
    """Replies of 64 random tokens, which take as long as those of a real policy did."""

    def __init__(self) -> None:
        self.version = 0
        draw = np.random.default_rng(0)
        self._ids = draw.integers(VOCABULARY, size=1_000_003)
        self._logprobs = -draw.exponential(size=1_000_003).astype(np.float32).astype(np.float64)

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, previous_ids: Any = None) -> list[int]:
        return [zlib.crc32(word.encode()) % VOCABULARY for message in messages for word in message["content"].split()]

    async def sample(self, ids: Sequence[int], params: SamplingParams, seed: int, version: int | None = None) -> Sample:
        await asyncio.sleep(LATENCIES[seed % len(LATENCIES)] / TIMES_AS_FAST)
        those = slice(start := seed % (1_000_003 - TOKENS), start + TOKENS)
        return Sample(self._ids[those].tolist(), self._logprobs[those].tolist(), "stop")

    def parse(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"role": "assistant", "content": "".join(self.tokens(ids))}

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [TEXTS[token] for token in ids]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("every prompt is a chat")

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.tokens(ids))

    def episode(self, key: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


async def agent(question: str, llm: Any) -> str:
    return (await llm.chat([{"role": "user", "content": question}])).content


def reward(output: str, id: str) -> float:
    """Quarters; a fourth of the groups have no spread."""
    return (zlib.crc32(output.encode()) % (1 + zlib.crc32(id.encode()) % 4)) / 4


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


class Stages:
    """CPU seconds of each stage, and the most memory that the process had meanwhile."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.megabytes: dict[str, float] = collections.defaultdict(float)
        self._inside = ""

    @contextlib.contextmanager
    def stage(self, name: str, clock: Callable[[], float] = time.process_time) -> Iterator[None]:
        """A stage. clock: time.thread_time where something else is at work meanwhile."""
        outside, self._inside = self._inside, name
        self._note(outside)
        started = clock()
        try:
            yield
        finally:
            spent = clock() - started
            self.seconds[name] += spent
            if outside:
                self.seconds[outside] -= spent
            self._note(name)
            self._inside = outside

    def _note(self, name: str) -> None:
        """Notes the peak since it was asked for last."""
        status = Path("/proc/self/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None
        self.megabytes[name] = max(self.megabytes[name], int(peak.group(1)) / 1000)
        Path("/proc/self/clear_refs").write_text("5")

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.seconds[name]:.2f} s {self.megabytes[name]:.0f} MB" for name in self.seconds)

    def wrap(self, owner: type, method: str, name: Callable[..., str]) -> None:
        """Each call of a method is a stage. name: of it, from the arguments."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name(*args, **kwargs), time.thread_time):
                return original(*args, **kwargs)

        setattr(owner, method, measured)


def measure(folder: Path, trajectories: int, epochs: int, megabytes: float) -> dict[str, Any]:
    """Runs the epochs, looks at the newest one, and exports them.

    Args:
        folder: An empty folder.
        trajectories: Of each epoch.
        epochs: How many.
        megabytes: Of the rollouts in the report.

    Returns:
        `seconds` and `megabytes` by stage, those of epochs for all epochs together; `disk` in MB by file.
    """
    stages = Stages()
    stages.wrap(EpochTrainer, "apply_curriculum_learning", lambda *_: "selection")
    stages.wrap(RunStore, "append", lambda *_: "record")
    stages.wrap(RunStore, "add_rollouts", lambda store, index, rollouts, whole=False: "kept whole" if whole else "kept")
    rows = [{"id": f"q{i}", "question": f"what is {i} plus {i + 1} ?"} for i in range(trajectories // GENERATIONS)]
    adapter = FakeAdapter(policy=RandomPolicy())
    adapter.submitted = collections.deque(maxlen=0)  # type: ignore[assignment]  # the fake itself keeps what it is given
    with stages.stage("start"):
        run = ft.Run(agent, reward, rows, adapter=adapter, generations=GENERATIONS, output_dir=folder, max_concurrency=512,
                     curriculum={}, num_epochs=epochs)  # fmt: skip
    for epoch in range(epochs):
        with stages.stage("collection"):
            ft.run_sync(run.next_epoch())
        print(f"epoch {epoch}: {stages}", file=sys.stderr)
    newest, earlier = run[-1], [run[place] for place in range(epochs - 1)]
    with stages.stage("preview"):
        found = run.preview(percentile=0.5)
        assert len(found.groups)
    with stages.stage("preview again"):
        run.preview(percentile=0.6)
    with stages.stage("browse index"):
        index = browse_index(newest, earlier)
        assert len(index) == trajectories
    with stages.stage("least likely token"):
        least_likely(newest)
    with stages.stage("frame"):
        assert len(run.trajectories(epoch=-1)) == trajectories
    with stages.stage("frame of all epochs"):
        assert len(run.trajectories()) == trajectories * epochs
    with stages.stage("export .parquet"):
        run.export(folder / "all.parquet")
    with stages.stage("export .jsonl"):
        run.export(folder / "newest.jsonl", epoch=-1)
    with stages.stage("export .html"):
        run.export(folder / "report.html", max_megabytes=megabytes)
    place = run.folder
    run.close()
    with stages.stage("opened"):
        opened = RunStore.open(place).epochs
        assert sum(len(each.statistics.rewards) for each in opened) == trajectories * epochs
    files = {"trajectories": sum(file.stat().st_size for file in (place / "trajectories").iterdir()),
             "run.db": (place / "run.db").stat().st_size}  # fmt: skip
    files |= {name: (folder / name).stat().st_size for name in ("all.parquet", "newest.jsonl", "report.html")}
    return {"trajectories": trajectories, "epochs": epochs, "seconds": dict(stages.seconds),
            "megabytes": dict(stages.megabytes), "disk": {name: size / 1e6 for name, size in files.items()}}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=10.0)
    given = parser.parse_args()
    if given.trajectories % GENERATIONS:
        parser.error(f"--trajectories {given.trajectories}: expected a multiple of {GENERATIONS}, the size of a group.")
    print(json.dumps(measure(given.folder, given.trajectories, given.epochs, given.megabytes)))
