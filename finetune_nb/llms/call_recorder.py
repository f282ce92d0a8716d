"""The recorder: a CallRecorder holds one LLMCall for every call of a language model that one rollout makes.

The rollout's context names its episode, so that concurrent agents, their tasks and their threads each write into their
own.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..components.functions import WORKFLOW, current_function
from ..errors import RunError
from ..interfaces import Policy
from ..types import (
    EpisodeKey,
    IntermediateStep,
    IntermediateStepPayload,
    IntermediateStepType,
    InvocationNode,
    LLMCall,
    StreamEventData,
)
from .chat_messages import same_message

__all__ = [
    "Address",
    "CallRecorder",
    "TEXT_PROMPT",
    "arguments_of",
    "current_episode",
    "ids_of",
    "without_stop",
]

TEXT_PROMPT = "other"
"""The role under which a prompt without a chat template is recorded."""
_numbers = itertools.count(1)
_episode: ContextVar[CallRecorder | None] = ContextVar("finetune_nb_episode", default=None)


def current_episode() -> CallRecorder | None:
    """The episode that the running code belongs to, if any."""
    return _episode.get()


class Address(Protocol):
    """An address that a gateway serves for one rollout and one model."""

    @property
    def llm(self) -> Any:
        """The model that is asked there."""
        ...

    def close(self) -> None:
        """Nothing is answered there any more."""
        ...


@dataclass(eq=False)
class CallRecorder:
    """The calls of one rollout, in order of their start. May be written to from any thread."""

    key: EpisodeKey
    seed: int = 0
    """The run's seed."""
    calls: list[LLMCall] = field(default_factory=list)
    endpoints: list[Address] = field(default_factory=list, repr=False)
    """The addresses at which the gateway serves it, one a model."""
    llm: Any = field(default=None, repr=False)
    """The model that the rollout's workflow got, if it got one."""
    ignore: frozenset[str] = frozenset()
    """Parameters of requests that the run says to ignore."""
    version: int | None = None
    """The policy version that is sampled; None: the newest one at each call."""
    number: int = field(default_factory=_numbers.__next__, repr=False)
    """Of this recorder among all of this process."""
    ended: bool = False
    attempt: int = 0
    """Counts how often the rollout was begun again."""
    task: asyncio.Task[Any] | None = field(default=None, repr=False)
    """The task that runs the rollout's workflow."""
    functions: dict[int, InvocationNode] = field(default_factory=dict, repr=False)
    """By sequence: which function made the call, where it was not the workflow itself."""
    _begun: int = 0
    _restarted: int = 0
    _ended_at: dict[int, float] = field(default_factory=dict, repr=False)
    """By sequence: seconds since 1970."""
    _pushed: list[tuple[int, IntermediateStep]] = field(default_factory=list, repr=False)
    """The workflow's own steps, each with the sequence of the last call before it."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def name(self) -> str:
        """What messages call the rollout."""
        key = self.key
        return f"example {key.example}, generation {key.generation} ({key.phase}, epoch {key.epoch})"

    def require_running(self) -> None:
        """Checks that calls are still recorded.

        Raises:
            RunError: The rollout has ended.
        """
        if self.ended:
            raise RunError(
                f"the rollout of {self.name} has ended: its llm is not asked any more, and nothing is recorded in it. "
                "Await what the workflow starts, or cancel it, before the workflow returns."
            )

    def next_call(self) -> tuple[int, int]:
        """Sequence number and seed of the next call: the seed is a hash of run seed, episode and sequence."""
        with self._lock:
            sequence, self._begun = self._begun, self._begun + 1
            function = current_function()
            if function is not WORKFLOW:
                self.functions[sequence] = function
        digest = hashlib.blake2b(repr((self.seed, *self.key, sequence)).encode(), digest_size=8).digest()
        return sequence, int.from_bytes(digest, "big") >> 1

    def record(self, call: LLMCall) -> bool:
        """Writes a call down. False for one that comes too late: the rollout has ended, or is tried again by now."""
        with self._lock:
            in_time = not self.ended and call.sequence >= self._restarted
            if in_time:
                self.calls.append(call)
                self._ended_at[call.sequence] = time.time()
        return in_time

    def push(self, step: IntermediateStep) -> None:
        """Writes a step of the workflow's own down, after the calls that have ended by now.

        Raises:
            RunError: The rollout has ended.
        """
        with self._lock:
            self.require_running()
            last = max((call.sequence for call in self.calls), default=-1)
            self._pushed.append((last, step))

    def restart(self) -> None:
        """The rollout is tried again: what was recorded of it, and what is still on its way, is forgotten."""
        with self._lock:
            self.calls.clear()
            self._pushed.clear()
            self._restarted = self._begun
            self.attempt += 1

    def previous(self, messages: Sequence[dict[str, Any]], tools: Any) -> LLMCall | None:
        """The call that `messages` carries on from, with its ids; None at a start."""
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        for call in reversed(self.calls):
            if (
                len(call.messages) == last
                and call.prompt_ids is not None
                and call.response_ids is not None
                and call.tools == tools
                and all(same_message(a, b) for a, b in zip((*call.messages, call.reply), messages, strict=False))
            ):
                return call
        return None

    def previous_ids(self, messages: Sequence[dict[str, Any]], tools: Any) -> list[int] | None:
        """Ids of the turn that `messages` carries on from, exactly as they were seen and sampled; None at a start."""
        call = self.previous(messages, tools)
        return None if call is None else ids_of(call)

    def with_thoughts(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with what was thought in the replies among them: most client libraries do not send it back."""
        restored = messages
        for call in self.calls:
            thought, at = call.reply.get("reasoning_content"), len(call.messages)
            if not thought or at >= len(messages) or messages[at].get("reasoning_content"):
                continue
            if all(same_message(a, b) for a, b in zip((*call.messages, call.reply), messages, strict=False)):
                restored = [*restored[:at], {**messages[at], "reasoning_content": thought}, *restored[at + 1 :]]
        return restored

    def previous_text(self, prompt: str) -> tuple[list[int], str] | None:
        """The same for a text prompt that begins with an earlier one and all that was sampled after it: its ids, and
        the text that is new."""
        for call in reversed(self.calls):
            if call.prompt_ids is None or call.response_ids is None or call.messages[0]["role"] != TEXT_PROMPT:
                continue
            so_far = call.messages[0]["content"] + "".join(call.tokens or ())
            if prompt.startswith(so_far):
                return [*call.prompt_ids, *call.response_ids], prompt[len(so_far) :]
        return None

    def steps(self) -> list[IntermediateStep]:
        """Calls and the workflow's own steps, the form in which evaluators and builders see them: in order of the calls'
        start, each followed by the steps that were pushed after it."""
        found: list[tuple[int, IntermediateStep]] = []
        for call in self.calls:
            function = self.functions.get(call.sequence, WORKFLOW)
            ended_at = self._ended_at.get(call.sequence)
            found.append((call.sequence, _step(call, function, time.time() if ended_at is None else ended_at)))
        found += self._pushed
        found.sort(key=lambda each: each[0])  # stable: a call goes before what was pushed after it
        return [step for _, step in found]

    @contextmanager
    def current(self) -> Iterator[CallRecorder]:
        """Code inside belongs to this episode."""
        token = _episode.set(self)
        try:
            yield self
        finally:
            _episode.reset(token)

    @contextmanager
    def recording(self, policies: Sequence[Policy] = ()) -> Iterator[CallRecorder]:
        """The rollout, from its start to its end: its policies wait for it when they form batches."""
        with self.current(), ExitStack() as stack:
            for policy in policies:
                stack.enter_context(policy.episode(self.key))
            stack.callback(self.end)
            yield self

    def begin_workflow(self, llm: Any) -> None:
        """The running task calls the rollout's workflow, which gets that model."""
        self.llm, self.task = llm, _current_task()

    def is_run_here(self) -> bool:
        """Whether the running code is in the workflow's own task, not in one that was started on the way."""
        return self.task is not None and self.task is _current_task()

    def end(self) -> None:
        """Nothing is recorded any more, and what the gateway still has of it is dropped."""
        with self._lock:
            self.ended = True
        self.task = None
        for endpoint in self.endpoints:
            endpoint.close()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


def ids_of(call: LLMCall) -> list[int]:
    """The ids of a call's prompt and reply."""
    return [*(call.prompt_ids or ()), *(call.response_ids or ())]


def without_stop(call: LLMCall) -> LLMCall:
    """The call with its text cut before a stop text, as the OpenAI API has it. The ids stay those that were sampled."""
    content = call.reply.get("content")
    if not call.sampling.stop or not content:
        return call
    end = min((at for text in call.sampling.stop if (at := content.find(text)) >= 0), default=len(content))
    return replace(call, reply={**call.reply, "content": content[:end]})


def arguments_of(function: Mapping[str, Any]) -> Any:
    """A tool call's arguments, read where they are JSON; else as they stand there."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            pass
    return arguments


def _step(call: LLMCall, function: InvocationNode, ended_at: float) -> IntermediateStep:
    data = StreamEventData(input=call.messages, output=call.reply.get("content"), payload=call)
    metadata: dict[str, Any] = {}
    if call.tools:
        metadata["tools"] = call.tools
    if call.ignored:
        metadata["ignored"] = list(call.ignored)
    payload = IntermediateStepPayload(
        event_type=IntermediateStepType.LLM_END,
        event_timestamp=ended_at,
        name=call.llm or call.model,
        data=data,
        metadata=metadata or None,
        UUID=f"{'/'.join(map(str, call.episode or ()))}/{call.sequence}",
    )
    return IntermediateStep(parent_id="root", function_ancestry=function, payload=payload)
