"""A run for the panel's tests, made in the kernel: a scripted policy that gets better with every version, rollouts that take
their time, an adapter that trains nothing. What a browser test waits for is noted through probe.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import finetune_nb as ft
from finetune_nb import TrainingJobRef, TrajectoryCollection
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

from . import probe


def chance(*parts: Any) -> float:
    """A number in [0, 1) that the parts decide."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest()) / 2**48


class Learning(ScriptedPolicy):
    """Right more often on easy questions than on hard ones, and with every version."""

    def __init__(self) -> None:
        super().__init__(self.answer)

    def answer(self, messages: list[dict[str, Any]], seed: int) -> str:
        question = messages[0]["content"]
        a, b = question.split("+")
        right = 0.55 * chance(question) ** 1.5 + 0.5 * (1 - 0.93**self.version)
        return str(int(a) + int(b)) if chance(question, seed) < right else "perhaps " + "9" * (seed % 5)


class Forgetful(FakeAdapter):
    """Keeps nothing of what it was given: a long run is measured with it."""

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        ref = await super().submit(trajectories)
        self.submitted.clear()
        return ref


def make_run(folder: str, seconds: float = 1.0, epochs: int = 20, rows: int = 40, **options: Any) -> ft.Run:
    """A run whose rollouts take about so many seconds an epoch. A question that is "bad" raises."""

    async def solve(question, llm):
        await asyncio.sleep(seconds / 5 * (0.5 + chance(question)))
        return (await llm.chat([{"role": "user", "content": question}])).content

    def right(item):
        return float(item.output_obj == item.expected_output_obj)

    policy = Learning()
    given: dict[str, Any] = {"curriculum": {"initial_percentile": 0.3, "expansion_interval": 4}, "name": "adder"}
    given |= {"validation": sums(20, seed=1), "validation_interval": 3, "generations": 8, "num_epochs": epochs}
    adapter = Forgetful(policy=policy, delay=seconds / 3)
    run = ft.Run(solve, right, sums(rows), adapter=adapter, output_dir=folder, max_concurrency=64, **given | options)
    note_changes(run)
    return run


def note_changes(run: ft.Run) -> None:
    """Notes every value that comes into the draft."""
    controls = run._settings
    draft_changes = controls.draft_changes

    def noted(changes, source="panel"):
        probe.note("draft", **{name.replace(".", "_"): value for name, value in changes.items()})
        return draft_changes(changes, source)

    controls.draft_changes = noted
