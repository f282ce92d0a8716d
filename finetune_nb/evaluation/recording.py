"""The recorder: one LLMCall for every call of a language model, written down where the call is made.

An Episode collects the calls of one rollout; the rollout's context names it, so that concurrent agents, their tasks and
their threads each write into their own. `PolicyLLM` is the client that a workflow gets for a policy of ours: messages
in, reply out, token ids and logprobs kept exactly. Trajectories are made from the calls elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pydantic import Field

from ..config import LLMBaseConfig
from ..errors import ConfigError, did_you_mean
from ..interfaces import Policy
from ..registry import Builder, register_llm_provider
from ..types import (
    EpisodeKey,
    IntermediateStep,
    IntermediateStepPayload,
    IntermediateStepType,
    InvocationNode,
    LLMCall,
    SamplingParams,
    StreamEventData,
)

__all__ = ["LLM", "ChatReply", "Episode", "PolicyLLM", "PolicyLLMConfig", "SyncLLM", "ToolCall", "current_episode"]

_WORKFLOW = InvocationNode(function_id="<workflow>", function_name="<workflow>")
_episode: ContextVar[Episode | None] = ContextVar("finetune_nb_episode", default=None)


def current_episode() -> Episode | None:
    """The episode that the running code belongs to, if any."""
    return _episode.get()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model asks for."""

    id: str
    name: str
    arguments: dict[str, Any]
    """Empty where the model wrote something that is no JSON object."""


@dataclass(frozen=True, slots=True)
class ChatReply:
    """The assistant's turn. Append it to the messages as it is."""

    content: str
    tool_calls: list[ToolCall]
    finish_reason: str | None
    message: dict[str, Any] = field(repr=False)
    """The turn as an OpenAI message."""


@dataclass
class Episode:
    """The calls of one rollout, in order of their start."""

    key: EpisodeKey
    seed: int = 0
    """The run's seed."""
    calls: list[LLMCall] = field(default_factory=list)
    _begun: int = 0

    def begin(self) -> tuple[int, int]:
        """Sequence number and seed of the next call: the seed is a hash of run seed, episode and sequence."""
        sequence, self._begun = self._begun, self._begun + 1
        digest = hashlib.blake2b(repr((self.seed, *self.key, sequence)).encode(), digest_size=8).digest()
        return sequence, int.from_bytes(digest, "big") >> 1

    def previous_ids(self, messages: Sequence[dict[str, Any]], tools: Any) -> list[int] | None:
        """Ids of the turn that `messages` carries on from, exactly as they were seen and sampled; None at a start."""
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        for call in reversed(self.calls):
            if (
                len(call.messages) == last
                and call.prompt_ids is not None
                and call.response_ids is not None
                and call.tools == tools
                and _same(call.reply, messages[last])
                and list(messages[:last]) == call.messages
            ):
                return [*call.prompt_ids, *call.response_ids]
        return None

    def steps(self) -> list[IntermediateStep]:
        """The calls as intermediate steps, the form in which evaluators and builders see them."""
        return [_step(call) for call in sorted(self.calls, key=lambda call: call.sequence)]

    @contextmanager
    def live(self, policies: Sequence[Policy] = ()) -> Iterator[Episode]:
        """The episode is the current one inside, and its policies wait for it when they form batches."""
        token = _episode.set(self)
        try:
            with ExitStack() as stack:
                for policy in policies:
                    stack.enter_context(policy.episode(self.key))
                yield self
        finally:
            _episode.reset(token)


class LLM:
    """What a workflow gets as `llm`."""

    name: str
    policy: Policy | None = None
    sampling: SamplingParams = SamplingParams()

    async def chat(
        self, messages: Sequence[Any], tools: Sequence[dict[str, Any]] | None = None, **sampling: Any
    ) -> ChatReply:
        """One turn.

        messages: OpenAI messages, and replies as they came. tools: OpenAI tool schemas. sampling: fields of
        SamplingParams for this call alone. Raises ConfigError for an unknown one.
        """
        params = self.sampling
        if sampling:
            known = [f.name for f in fields(SamplingParams)]
            for name in sampling.keys() - set(known):
                raise ConfigError(f"chat() has no sampling parameter {name!r}. {did_you_mean(name, known)}")
            params = replace(params, **sampling)
        prompt = [_message(m) for m in messages]
        episode = current_episode() or Episode(EpisodeKey("try", 0, 0, 0), seed=time.time_ns())
        started = time.perf_counter()
        call = await self._call(episode, prompt, list(tools) if tools else None, params)
        call = replace(call, seconds=time.perf_counter() - started)
        episode.calls.append(call)
        return _reply(call)

    async def _call(
        self,
        episode: Episode,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
    ) -> LLMCall:
        raise NotImplementedError


class PolicyLLM(LLM):
    """A client of a policy in this process."""

    def __init__(self, policy: Policy, name: str = "policy", sampling: SamplingParams = SamplingParams()) -> None:
        self.policy, self.name, self.sampling = policy, name, sampling
        self.config: PolicyLLMConfig | None = None

    def configured(self) -> None:
        """Its config has been changed while it is in use."""
        if self.config is not None:
            self.sampling = self.config.sampling()

    async def _call(
        self,
        episode: Episode,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
    ) -> LLMCall:
        policy = self.policy
        assert policy is not None
        sequence, seed = episode.begin()
        ids = policy.render(messages, tools, episode.previous_ids(messages, tools))
        version = policy.version
        sample = await policy.sample(ids, params, seed)
        reply = policy.parse(sample.ids)
        for i, tool_call in enumerate(reply.get("tool_calls") or ()):
            tool_call["id"] = f"call_{sequence}_{i}"  # repeatable, unlike a random id
        return LLMCall(
            episode=episode.key,
            sequence=sequence,
            model=self.name,
            messages=messages,
            tools=tools,
            reply=reply,
            prompt_ids=list(ids),
            response_ids=list(sample.ids),
            tokens=policy.tokens(sample.ids),
            logprobs=list(sample.logprobs),
            finish_reason=sample.finish_reason,
            policy_version=version,
            sampling=params,
            seconds=float("nan"),
            exact=True,
        )


class SyncLLM:
    """The same client for a sync workflow, which runs in a thread of its own: `chat` blocks that thread."""

    def __init__(self, llm: LLM, loop: asyncio.AbstractEventLoop) -> None:
        self._llm, self._loop = llm, loop

    def chat(
        self, messages: Sequence[Any], tools: Sequence[dict[str, Any]] | None = None, **sampling: Any
    ) -> ChatReply:
        return asyncio.run_coroutine_threadsafe(self._llm.chat(messages, tools, **sampling), self._loop).result()


class PolicyLLMConfig(LLMBaseConfig, name="policy"):
    """The policy that a trainer adapter trains: one set of weights, sampled and trained."""

    adapter: str
    """Name of the trainer adapter."""
    temperature: float = Field(default=1.0, ge=0, json_schema_extra={"live": "rollouts"})
    max_tokens: int = Field(default=256, ge=1, json_schema_extra={"live": "rollouts"})
    stop: list[str] = []

    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.max_tokens, tuple(self.stop))


@register_llm_provider(config_type=PolicyLLMConfig)
async def policy_llm(config: PolicyLLMConfig, builder: Builder):
    adapter = await builder.get_trainer_adapter(config.adapter)
    if adapter.policy is None:
        raise ConfigError(
            f"llm of type 'policy' names the trainer adapter {config.adapter!r}, which offers no policy to sample from. "
            "Use an adapter that does (local_grpo), or an llm of type 'openai'."
        )
    llm = PolicyLLM(adapter.policy, config.adapter, config.sampling())
    llm.config = config
    yield llm


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, ChatReply):
        return message.message
    if isinstance(message, Mapping) and "role" in message:
        return dict(message)
    raise TypeError(
        f"a message is a dict with a role, or a reply as it came; got {type(message).__name__}: {message!r:.80}"
    )


def _same(reply: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether a message of the next prompt is that reply, however its empty parts are written."""

    def essence(m: dict[str, Any]) -> tuple[Any, ...]:
        calls = m.get("tool_calls") or ()
        return m.get("content") or "", [(c["function"]["name"], c["function"]["arguments"]) for c in calls]

    return essence(reply) == essence(message)


def _reply(call: LLMCall) -> ChatReply:
    calls = []
    for tool_call in call.reply.get("tool_calls") or ():
        function = tool_call["function"]
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = {}
        calls.append(ToolCall(tool_call["id"], function["name"], arguments if isinstance(arguments, dict) else {}))
    return ChatReply(call.reply.get("content") or "", calls, call.finish_reason, call.reply)


def _step(call: LLMCall) -> IntermediateStep:
    data = StreamEventData(input=call.messages, output=call.reply.get("content"), payload=call)
    payload = IntermediateStepPayload(
        event_type=IntermediateStepType.LLM_END,
        event_timestamp=time.time(),
        name=call.model,
        data=data,
        metadata={"tools": call.tools} if call.tools else None,
        UUID=f"{'/'.join(map(str, call.episode or ()))}/{call.sequence}",
    )
    return IntermediateStep(parent_id="root", function_ancestry=_WORKFLOW, payload=payload)
