"""Calling a workflow: any sync or async callable, its parameters filled by name from the dataset row.

`question` gets the row's input, `item` the whole EvalInputItem, `llm` the client of the model, every other parameter the
row's column of that name. A workflow with a single parameter gets the input, whatever the parameter is called.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import WorkflowError, did_you_mean
from ..llms.call_recorder import current_episode
from ..llms.client import LLM, RolloutLLM, SyncLLM
from ..threads import in_daemon_thread
from ..types import EvalInputItem
from ..user_code import LEFT_OUT, Parameters

__all__ = [
    "Workflow",
]


class Workflow:
    """A callable bound to its model. Raises WorkflowError where it cannot be called with the dataset's rows."""

    def __init__(self, function: Callable[..., Any], llm: LLM | None = None, question_key: str = "question") -> None:
        if not callable(function):
            raise WorkflowError(f"a workflow is a function; got {type(function).__name__}.")
        self.function, self.llm = function, llm
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self._parameters = Parameters(function)
        self._inputs = {"question", question_key}
        if self._parameters.single not in (None, "item", "llm"):
            self._inputs.add(self._parameters.single)

    @property
    def name(self) -> str:
        """What messages call it."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    async def __call__(self, item: EvalInputItem) -> Any:
        """What the workflow returns. Sync code runs in a thread of its own; its `llm.chat` blocks."""
        llm: Any = self.llm
        episode = current_episode()
        if episode is not None:
            episode.begin_workflow(llm)
        if self.is_async:
            if episode is not None and isinstance(llm, LLM):
                llm = RolloutLLM(llm, episode)
            args, kwargs = self._arguments(item, llm)
            return await self.function(*args, **kwargs)
        if llm is not None:
            llm = SyncLLM(llm, asyncio.get_running_loop(), episode)
        args, kwargs = self._arguments(item, llm)
        output = await in_daemon_thread(lambda: self.function(*args, **kwargs))
        return await output if inspect.isawaitable(output) else output

    def _arguments(self, item: EvalInputItem, llm: Any) -> tuple[list[Any], dict[str, Any]]:
        row = item.full_dataset_entry if isinstance(item.full_dataset_entry, dict) else {}

        def find(parameter: inspect.Parameter) -> Any:
            name, optional = parameter.name, parameter.default is not inspect.Parameter.empty
            if name in self._inputs and item.input_obj is not None:
                return item.input_obj
            if name == "item":
                return item
            if name == "llm":
                if llm is None and not optional:
                    raise WorkflowError(f"workflow {self.name!r} wants `llm`, but the config names no llm for it.")
                return llm
            if name in row and (name not in self._inputs or row[name] is not None):
                return row[name]
            if optional:
                return LEFT_OUT
            if name in self._inputs:
                columns = ", ".join(map(str, row)) or "none"
                if name in row:
                    raise WorkflowError(f"row {item.id!r} has no question. Its columns: {columns}.")
                raise WorkflowError(
                    f"workflow {self.name!r} wants {name!r}, and there is no such column for the question. "
                    f"{did_you_mean(name, row)} Name it: question=... of Run, "
                    "eval.general.dataset.structure.question_key in a config."
                )
            known = ["question", "item", "llm", *map(str, row)]
            raise WorkflowError(
                f"workflow {self.name!r} wants {name!r}, which row {item.id!r} does not have. {did_you_mean(name, known)}"
            )

        return self._parameters.arguments(find, row)

    def check(self, items: Sequence[EvalInputItem]) -> None:
        """Raises WorkflowError if the workflow cannot be called with rows like these (the first hundred are looked at)."""
        rows = [item.full_dataset_entry for item in items[:100] if isinstance(item.full_dataset_entry, dict)]
        row = {column: value for row in rows for column, value in row.items()}
        question = next((item.input_obj for item in items[:100] if item.input_obj is not None), None)
        self._arguments(items[0].model_copy(update={"input_obj": question, "full_dataset_entry": row}), self.llm)
