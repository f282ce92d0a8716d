"""The clients that a workflow gets as `llm`. Every call is recorded in the rollout's CallRecorder.

`PolicyLLM` asks a policy of ours: messages in, reply out, token ids and logprobs kept exactly.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ..components.builder import Builder
from ..components.registry import register_llm_provider
from ..config.base import LLMBaseConfig
from ..errors import ConfigError, RunError, did_you_mean
from ..interfaces import Policy
from ..types import EpisodeKey, LLMCall, SamplingParams
from .call_recorder import TEXT_PROMPT, CallRecorder, arguments_of, current_episode, ids_of, without_stop
from .tool_parsers import checked_name

if TYPE_CHECKING:
    from .gateway import Endpoint

__all__ = [
    "ChatReply",
    "LLM",
    "PolicyLLM",
    "PolicyLLMConfig",
    "RolloutLLM",
    "SyncLLM",
    "ToolCall",
]


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


class LLM:
    """What a workflow gets as `llm`: one model, asked by `chat`, or by a client of any OpenAI-compatible library."""

    name: str
    """Of the model."""
    config_name: str | None = None
    """Its own, in the section `llms`."""
    policy: Policy | None = None
    sampling: SamplingParams = SamplingParams()
    takes_options: bool = False
    """Whether `call` passes on options of the OpenAI API that SamplingParams does not have."""

    async def chat(
        self,
        messages: Sequence[Any],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> ChatReply:
        """Ask for one turn.

        Args:
            messages: OpenAI messages, and replies as they came.
            tools: OpenAI tool schemas.
            chat_template_kwargs: Variables of the model's chat template for this call, such as enable_thinking=False, added to
                those of the run.
            **sampling: Fields of SamplingParams for this call alone. A text of `stop` is not part of the reply.

        Returns:
            The reply.

        Raises:
            ConfigError: There is no such sampling parameter, or the model's prompts are not rendered from a chat template.
            RunError: The rollout ended, or was begun again, before the answer came.
        """
        params = self.sampling
        if sampling:
            known = [f.name for f in fields(SamplingParams)]
            for name in sampling.keys() - set(known):
                raise ConfigError(f"chat() has no sampling parameter {name!r}. {did_you_mean(name, known)}")
            params = replace(params, **sampling)
        if params.reply_format is not None and not getattr(self.policy, "constrains", False):
            raise ConfigError(
                f"llm {self.name!r} holds no reply to a form, so reply_format cannot be kept. Leave it out, or sample with the "
                "policy of local_grpo."
            )
        prompt = [_message(m) for m in messages]
        episode = current_episode() or CallRecorder(EpisodeKey("try", 0, 0, 0), seed=time.time_ns())
        episode.require_running()
        options: dict[str, Any] = {}
        if chat_template_kwargs:
            _require(self._call, "chat_template_kwargs", f"llm {self.name!r}")
            options["chat_template_kwargs"] = dict(chat_template_kwargs)
        call = without_stop(await self.call(episode, prompt, list(tools) if tools else None, params, **options))
        if not episode.record(call):
            episode.require_running()
            raise _given_up(episode)
        return _reply(call)

    async def call(
        self,
        episode: CallRecorder,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
        **options: Any,
    ) -> LLMCall:
        """One call for that episode, which is left to record it. options: see `takes_options`."""
        started = time.perf_counter()
        call = await self._call(episode, messages, tools, params, **options)
        return replace(call, seconds=time.perf_counter() - started)

    async def complete(
        self, episode: CallRecorder, prompt: str | list[int], params: SamplingParams, **options: Any
    ) -> LLMCall:
        """The same for a prompt of plain text or token ids, without a chat template."""
        started = time.perf_counter()
        call = await self._complete(episode, prompt, params, **options)
        return replace(call, seconds=time.perf_counter() - started)

    async def _call(
        self,
        episode: CallRecorder,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
    ) -> LLMCall:
        raise NotImplementedError

    async def _complete(self, episode: CallRecorder, prompt: str | list[int], params: SamplingParams) -> LLMCall:
        raise ConfigError(f"llm {self.name!r} takes chat messages only, no plain prompts. Use chat completions.")

    @property
    def base_url(self) -> str:
        """Where any OpenAI client reaches this model for the current rollout: every rollout has an address of its own,
        and what is asked there is recorded in it. Raises RunError outside of a rollout."""
        return self._endpoint(current_episode()).base_url

    @property
    def api_key(self) -> str:
        """The key that `base_url` wants. Never show or store it."""
        return self._endpoint(current_episode()).api_key

    def openai(self, **options: Any) -> Any:
        """An `openai.AsyncOpenAI` at `base_url`, for the running event loop; its connections are shared and closed with
        the run. options: of the client, such as max_retries. Needs the extra "openai"."""
        return self._endpoint(current_episode()).openai(**options)

    def _endpoint(self, episode: CallRecorder | None) -> Endpoint:
        if episode is None or episode.ended:
            raise RunError(
                "an address of the llm (base_url, api_key, openai()) belongs to one rollout, and no rollout "
                f"{'runs here' if episode is None else 'is running here any more'}. Ask for it inside the workflow; in a "
                "thread that the workflow started by itself, hand it over."
            )
        from .gateway import gateway

        return gateway().endpoint(episode, self)


class PolicyLLM(LLM):
    """A client of a policy in this process."""

    tool_parser: str | None = None
    """The format of tool calls; None: the tokenizer's own."""
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})
    """Variables of the chat template in every call."""

    def __init__(self, policy: Policy, name: str = "policy", sampling: SamplingParams = SamplingParams()) -> None:
        self.policy, self.name, self.sampling = policy, name, sampling
        self.config: PolicyLLMConfig | None = None

    def configured(self) -> None:
        """Its config has been changed while it is in use."""
        if self.config is not None:
            self.sampling = self.config.sampling()
            self.tool_parser, self.chat_template_kwargs = self.config.tool_parser, self.config.chat_template_kwargs

    async def _call(
        self,
        episode: CallRecorder,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> LLMCall:
        policy: Any = self.policy
        sequence, seed = episode.next_call()
        previous = episode.previous(messages, tools)
        variables = {**self.chat_template_kwargs, **(chat_template_kwargs or {})}
        before = None if previous is None else previous.chat_template_kwargs
        options: dict[str, Any] = {}
        if variables or before:
            _require(policy.render, "chat_template_kwargs", f"the policy of llm {self.name!r}")
            options = {"chat_template_kwargs": variables, "previous_template_kwargs": before}
        previous_ids = None if previous is None else ids_of(previous)
        ids = policy.render(episode.with_thoughts(messages), tools, previous_ids, **options)
        sampled = await self._sample(episode, sequence, seed, messages, list(ids), params)
        reply = self._parse(sampled.response_ids or (), tools)
        for i, tool_call in enumerate(reply.get("tool_calls") or ()):
            tool_call["id"] = f"call_{sequence}_{i}"  # repeatable, unlike a random id
        return replace(sampled, tools=tools, reply=reply, chat_template_kwargs=variables or None)

    def _parse(self, ids: Sequence[int], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        """The message that a reply is."""
        policy: Any = self.policy
        if self.tool_parser is not None:
            _require(policy.parse, "tool_parser", f"the policy of llm {self.name!r}")
            return policy.parse(ids, tools or (), tool_parser=self.tool_parser)
        return policy.parse(ids, tools or ()) if _takes(policy.parse, "tools") else policy.parse(ids)

    async def _complete(
        self, episode: CallRecorder, prompt: str | list[int], params: SamplingParams, add_special_tokens: bool = True
    ) -> LLMCall:
        policy: Any = self.policy
        sequence, seed = episode.next_call()
        if isinstance(prompt, str):
            known, new = episode.previous_text(prompt) or ([], prompt)
            begins = add_special_tokens and not known and _takes(policy.encode, "add_special_tokens")
            text, ids = prompt, known + (policy.encode(new, add_special_tokens=True) if begins else policy.encode(new))
        else:
            text, ids = "".join(policy.tokens(prompt)), prompt
        sampled = await self._sample(episode, sequence, seed, [{"role": TEXT_PROMPT, "content": text}], ids, params)
        reply = {"role": "assistant", "content": policy.decode(sampled.response_ids or ())}
        return replace(sampled, reply=reply)

    async def _sample(
        self,
        episode: CallRecorder,
        sequence: int,
        seed: int,
        messages: list[dict[str, Any]],
        ids: list[int],
        params: SamplingParams,
    ) -> LLMCall:
        """The call, but for its reply as a message."""
        policy: Any = self.policy
        version, options = policy.version, {}
        if episode.version is not None:  # by name: a job may end, and change what is newest, while this is on its way
            _require(policy.sample, "version", f"the policy of llm {self.name!r}")
            version, options = episode.version, {"version": episode.version}
        sample = await policy.sample(ids, params, seed, **options)
        likeliest = None
        if sample.likeliest is not None:
            likeliest = [dict(zip(policy.tokens(list(top)), top.values(), strict=True)) for top in sample.likeliest]
        return LLMCall(
            episode=episode.key,
            sequence=sequence,
            model=self.name,
            llm=self.config_name,
            messages=messages,
            tools=None,
            reply={},
            prompt_ids=ids,
            response_ids=list(sample.ids),
            tokens=policy.tokens(sample.ids),
            logprobs=list(sample.logprobs),
            finish_reason=sample.finish_reason,
            policy_version=version,
            sampling=params,
            seconds=float("nan"),
            exact=True,
            top_logprobs=likeliest,
            entropies=None if sample.entropies is None else list(sample.entropies),
        )


class _Bound:
    """A model and the rollout that asks it. The rollout is known in every thread and on every event loop, with or without
    context variables."""

    def __init__(self, llm: LLM, episode: CallRecorder | None) -> None:
        self.llm, self.episode = llm, episode
        self._attempt = 0 if episode is None else episode.attempt

    def asking(self) -> CallRecorder | None:
        """The rollout that a call of the running code belongs to.

        Returns:
            The one that it was made for; None where it was made outside of rollouts.

        Raises:
            RunError: The rollout has ended or was begun again, or the code belongs to another one.
        """
        episode, here = self.episode, current_episode()
        if episode is None:
            return here
        if here is not None and here is not episode:
            # Code that kept an llm in a global calls it from its own rollout's task: there is no doubt who asks.
            if here.is_run_here():
                return here
            raise RunError(
                f"this llm belongs to the rollout of {episode.name}, and the call comes from a task or thread of the rollout "
                f"of {here.name}: it cannot be said in which it is to be recorded. Use the llm that the workflow gets anew "
                "in each rollout, in tasks of that rollout; do not keep it, or a client made of it, between rollouts."
            )
        episode.require_running()
        if self._attempt != episode.attempt:
            raise _given_up(episode)
        return episode

    def endpoint(self) -> Endpoint:
        """The address of the model for that rollout."""
        return self.llm._endpoint(self.asking())


class RolloutLLM(LLM):
    """The llm that an async workflow gets: its calls are recorded in its rollout wherever they are made.

    Tasks, executors, threads with event loops of their own and `asyncio.run` in a thread may use it. When the rollout has
    ended, every call is refused with a RunError and recorded nowhere.

    Args:
        llm: The model.
        episode: The rollout's recorder.
    """

    def __init__(self, llm: LLM, episode: CallRecorder) -> None:
        self._bound = _Bound(llm, episode)

    def __getattr__(self, name: str) -> Any:
        if name == "_bound":  # not made yet, as while it is copied
            raise AttributeError(name)
        return getattr(self._bound.llm, name)

    def __repr__(self) -> str:
        return f"RolloutLLM({self._bound.llm!r})"

    @property
    def name(self) -> str:  # type: ignore[override]  # attributes there
        return self._bound.llm.name

    @property
    def policy(self) -> Policy | None:  # type: ignore[override]
        return self._bound.llm.policy

    @property
    def sampling(self) -> SamplingParams:  # type: ignore[override]
        return self._bound.llm.sampling

    @property
    def takes_options(self) -> bool:  # type: ignore[override]
        return self._bound.llm.takes_options

    async def chat(
        self, messages: Sequence[Any], tools: Sequence[dict[str, Any]] | None = None, **sampling: Any
    ) -> ChatReply:
        episode = self._bound.asking()
        assert episode is not None
        with episode.current():
            return await self._bound.llm.chat(messages, tools, **sampling)

    async def call(self, *args: Any, **options: Any) -> LLMCall:
        return await self._bound.llm.call(*args, **options)

    async def complete(self, *args: Any, **options: Any) -> LLMCall:
        return await self._bound.llm.complete(*args, **options)

    @property
    def base_url(self) -> str:
        return self._bound.endpoint().base_url

    @property
    def api_key(self) -> str:
        return self._bound.endpoint().api_key

    def openai(self, **options: Any) -> Any:
        return self._bound.endpoint().openai(**options)

    def _endpoint(self, episode: CallRecorder | None) -> Endpoint:
        return self._bound.llm._endpoint(episode)


class SyncLLM:
    """The same client for a sync workflow, which runs in a thread of its own: `chat` blocks that thread. Threads that the
    workflow starts may use it too."""

    def __init__(self, llm: LLM, loop: asyncio.AbstractEventLoop, episode: CallRecorder | None = None) -> None:
        self._bound, self._loop = _Bound(llm, episode), loop

    def chat(
        self, messages: Sequence[Any], tools: Sequence[dict[str, Any]] | None = None, **sampling: Any
    ) -> ChatReply:
        """See LLM.chat."""
        episode = self._bound.asking()
        if _running_loop() is self._loop:
            raise RunError(
                "llm.chat blocks, and it was called on the run's own event loop, which would wait for itself. Make the "
                "workflow an `async def`: it gets an llm whose chat is awaited."
            )

        async def ask() -> ChatReply:
            if episode is None:
                return await self._bound.llm.chat(messages, tools, **sampling)
            with episode.current():
                return await self._bound.llm.chat(messages, tools, **sampling)

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result()

    @property
    def name(self) -> str:
        return self._bound.llm.name

    @property
    def base_url(self) -> str:
        """See LLM.base_url."""
        return self._bound.endpoint().base_url

    @property
    def api_key(self) -> str:
        """See LLM.api_key."""
        return self._bound.endpoint().api_key

    def openai(self, **options: Any) -> Any:
        """An `openai.OpenAI`, the sync client; see LLM.openai."""
        return self._bound.endpoint().sync_openai(**options)


@functools.cache
def _parameters_of(function: Any) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return frozenset({"*"})
    return frozenset(parameter.name for parameter in parameters)


def _takes(method: Any, name: str) -> bool:
    """Whether a method has that parameter: policies of other people may have those of the protocol alone."""
    known = _parameters_of(getattr(method, "__func__", method))
    return name in known or "*" in known


def _require(method: Any, name: str, owner: str) -> None:
    if not _takes(method, name):
        raise ConfigError(f"{owner} takes no {name}. Leave it out, or use a policy that renders a chat template.")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _given_up(episode: CallRecorder) -> RunError:
    return RunError(
        f"the rollout of {episode.name} was begun again: calls of its earlier attempt are not recorded. Await what the "
        "workflow starts, or cancel it, before the workflow raises."
    )


class PolicyLLMConfig(LLMBaseConfig, name="policy"):
    """The policy that a trainer adapter trains: one set of weights, sampled and trained."""

    adapter: str
    """Name of the trainer adapter."""
    temperature: float = Field(default=1.0, ge=0, json_schema_extra={"live": "rollouts"})
    max_tokens: int = Field(default=256, ge=1, json_schema_extra={"live": "rollouts"})
    stop: list[str] = []
    """Texts that end a reply."""
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Likeliest tokens that are recorded in each place beside the sampled one; the views then show entropies."""
    tool_parser: str | None = None
    """The format in which the model calls tools, by the name that vLLM gives it: "hermes", "llama3_json", "mistral",
    "pythonic", "qwen3_coder", ... None: the tokenizer's response template, else as the chat template writes calls."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {"enable_thinking": False}. A call may add its own."""

    @field_validator("tool_parser")
    @classmethod
    def check_tool_parser(cls, name: str | None) -> str | None:
        return checked_name(name)

    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.max_tokens, tuple(self.stop), self.top_logprobs)


@register_llm_provider(config_type=PolicyLLMConfig)
async def policy_llm(config: PolicyLLMConfig, builder: Builder):
    adapter = await builder.get_trainer_adapter(config.adapter)
    if adapter.policy is None:
        raise ConfigError(
            f"llm of type 'policy' names the trainer adapter {config.adapter!r}, which offers no policy to sample from. "
            "Use an adapter that does (local_grpo), or an llm of type 'openai'."
        )
    llm = PolicyLLM(adapter.policy, config.adapter)
    llm.config_name = builder.config.name_of_llm(config)
    llm.config = config
    llm.configured()
    yield llm
    await close_clients()


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, ChatReply):
        return message.message
    if isinstance(message, Mapping) and "role" in message:
        return dict(message)
    raise TypeError(
        f"a message is a dict with a role, or a reply as it came; got {type(message).__name__}: {message!r:.80}"
    )


async def close_clients() -> None:
    """Closes the OpenAI clients that workflows got on the running event loop."""
    from .gateway import running_gateway

    gateway = running_gateway()
    if gateway is not None:
        await gateway.close_clients()


def _reply(call: LLMCall) -> ChatReply:
    calls = []
    for tool_call in call.reply.get("tool_calls") or ():
        function = tool_call["function"]
        arguments = arguments_of(function)
        calls.append(ToolCall(tool_call["id"], function["name"], arguments if isinstance(arguments, dict) else {}))
    return ChatReply(call.reply.get("content") or "", calls, call.finish_reason, call.reply)
