# pyright: reportMissingImports=false
"""The Toolkit's evaluation run, told how far its rollouts are, and cut down to one example where only that is tried.

What it returns is the Toolkit's; nouns.py makes ours of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nat.plugins.eval.runtime.evaluate import EvaluationRun as NatEvaluationRun

from ...errors import RunError
from ...evaluation.evaluate import progress
from ...observe import observe
from .nouns import was_dropped

__all__ = ["ALL", "EvaluationRun"]

ALL = object()


class EvaluationRun(NatEvaluationRun):
    """example: the only one that is run, by its id or its position in the dataset; all by default."""

    def __init__(self, config: Any, example: Any = ALL) -> None:
        super().__init__(config)
        self._example = example

    async def run_workflow_local(self, session_manager: Any, http_connection: Any = None) -> None:
        """Each item has a session of its own, whose end is the rollout's: what the Toolkit tells its callbacks leaves out
        those that failed."""
        self._choose()
        meter, items, ended = progress.get(), self.eval_input.eval_input_items, 0
        if meter is None:
            return await super().run_workflow_local(session_manager, http_connection)

        @asynccontextmanager
        async def session(original: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            nonlocal ended
            async with original(*args, **kwargs) as opened:
                try:
                    yield opened
                finally:
                    ended += 1
                    meter.done += 1

        observe(session_manager, "session", session)
        meter.total += len(items)
        await super().run_workflow_local(session_manager, http_connection)
        meter.done += len(items) - ended  # not begun, because another one failed
        meter.failed += sum(map(was_dropped, items))

    async def run_workflow_remote(self) -> None:
        self._choose()
        await super().run_workflow_remote()

    def _choose(self) -> None:
        """Raises RunError for an example that is not there."""
        if self._example is ALL:
            return
        items = self.eval_input.eval_input_items
        found = [item for item in items if item.id == self._example]
        if not found and isinstance(self._example, int) and -len(items) <= self._example < len(items):
            found = [items[self._example]]
        if not found:
            raise RunError(
                f"no example {self._example!r}: the dataset has {len(items)} rows, with ids like {items[0].id!r}."
            )
        self.eval_input.eval_input_items = found[:1]
