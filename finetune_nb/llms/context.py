"""What code of a workflow tells the rollout that it runs in: intermediate steps of its own."""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from typing import Any

from ..components.functions import current_function
from ..errors import RunError
from ..types import (
    IntermediateStep,
    IntermediateStepPayload,
    IntermediateStepState,
    IntermediateStepType,
    InvocationNode,
)
from .call_recorder import CallRecorder, current_episode

__all__ = [
    "Context",
    "IntermediateStepManager",
    "push_step",
]

ROOT = "root"
"""The parent of a step that no other one is open around."""
_open: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("finetune_nb_open_steps", default=())
"""UUID and parent of each step that was started here and has not ended, innermost last."""


class Context:
    """The rollout that the running code belongs to, as in the NeMo Agent Toolkit. `Context.get()` gives it."""

    def __init__(self, episode: CallRecorder | None) -> None:
        self._episode = episode

    @classmethod
    def get(cls) -> Context:
        """Look up the rollout of the running code.

        Returns:
            Its context; outside of a rollout one that takes no steps.
        """
        return cls(current_episode())

    @property
    def intermediate_step_manager(self) -> IntermediateStepManager:
        """Takes the workflow's own steps."""
        return IntermediateStepManager(self._episode)

    @property
    def active_function(self) -> InvocationNode:
        """The function that is running."""
        return current_function()


class IntermediateStepManager:
    """Takes a workflow's own steps.

    Args:
        episode: The rollout. One that the calling code belongs to goes before it.
    """

    def __init__(self, episode: CallRecorder | None) -> None:
        self._episode = episode

    def push_intermediate_step(self, payload: IntermediateStepPayload) -> None:
        """Add a step to the rollout, after the model calls that have ended by now.

        Evaluators find it in `item.trajectory`, with the function that pushed it and, as its parent, the step that was open.
        An END without its START is kept, too.

        Args:
            payload: What happened.

        Raises:
            TypeError: It is no IntermediateStepPayload.
            RunError: No rollout is running here, or it has ended.
        """
        if not isinstance(payload, IntermediateStepPayload):
            raise TypeError(f"push_intermediate_step takes an IntermediateStepPayload; found {type(payload).__name__}")
        episode = current_episode() or self._episode
        if episode is None:
            raise RunError(
                f"step {payload.name!r} was pushed where no rollout is running. Expected code of a workflow that a run rolls out "
                "(`await run.rollout(...)` tries it on one example); a thread of the workflow's own needs its context: "
                "asyncio.to_thread hands it over."
            )
        opened, parent = _open.get(), ROOT
        if payload.event_state == IntermediateStepState.START:
            parent = opened[-1][0] if opened else ROOT
            _open.set((*opened, (payload.UUID, parent)))
        else:
            parent = dict(opened).get(payload.UUID, ROOT)
        if payload.event_state == IntermediateStepState.END:
            _open.set(tuple(each for each in opened if each[0] != payload.UUID))
        episode.push(IntermediateStep(parent_id=parent, function_ancestry=current_function(), payload=payload))


def push_step(name: str, value: float | None = None, **metadata: Any) -> None:
    """Note from within a workflow that a step of it is done, and what it was worth.

        async def play(question, llm):
            ...
            ft.push_step("move", value=worth_of(board), board=str(board))

    The step is a CUSTOM_END in `item.trajectory`, with `value` in its metadata: what `ft.step_rewards` adds up.

    Args:
        name: What the step is called.
        value: Its reward; any finite number.
        **metadata: Further details, as plain data.

    Raises:
        RunError: No rollout is running here, or it has ended.
    """
    details = dict(metadata) if value is None else {"value": value, **metadata}
    about: dict[str, Any] = {"name": name, "UUID": str(uuid.uuid4())}
    push = Context.get().intermediate_step_manager.push_intermediate_step
    push(IntermediateStepPayload(event_type=IntermediateStepType.CUSTOM_START, **about))
    push(IntermediateStepPayload(event_type=IntermediateStepType.CUSTOM_END, metadata=details, **about))
