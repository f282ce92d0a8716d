"""`_type: openai`: a client of any OpenAI-compatible server (vLLM, SGLang, OpenAI itself), recorded like every model call.

It asks for logprobs and for token ids. A server that gives no ids leaves calls that are not exact; one that gives no logprobs
leaves turns that cannot be trained on. If it is given the model's tokenizer, it sends token ids, too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import AliasChoices, ConfigDict, Field, SecretStr, field_validator, model_validator

from ..components.builder import Builder
from ..components.registry import register_llm_provider
from ..config.base import LLMBaseConfig
from ..errors import MissingExtra
from ..redaction import redacting_logger
from ..threads import in_daemon_thread
from ..types import LLMCall, SamplingParams, logprob_values
from .call_recorder import TEXT_PROMPT, CallRecorder, ids_of
from .chat_tokenizer import ChatTokenizer, load_tokenizer
from .client import LLM, close_clients
from .tool_parsers import checked_name

__all__ = [
    "OpenAILLM",
    "OpenAIModelConfig",
    "TokenPrompts",
]


class OpenAIModelConfig(LLMBaseConfig, name="openai"):
    """A model served by an OpenAI-compatible server."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    model_name: str = Field(validation_alias=AliasChoices("model_name", "model"))
    """As the server calls it."""
    base_url: str | None = None
    """None = OpenAI's own."""
    api_key: SecretStr | None = None
    """None = OPENAI_API_KEY, or for a server of your own none at all."""
    seed: int | None = None
    """Base of the requests' seeds; None = derived from the run's seed."""
    max_retries: int = Field(default=10, ge=0)
    """Attempts after a transient failure of one request."""
    temperature: float | None = Field(default=None, ge=0.0)
    """None = 1.0: logprobs are trained on as those of the distribution that was sampled from."""
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    """None = the server's own; below 1 the logprobs are no longer those of what was sampled."""
    max_tokens: int = Field(default=1024, ge=1)
    """Of one reply."""
    request_timeout: float | None = Field(default=None, gt=0.0)
    """Seconds; None = the client's own."""
    logprobs: bool = True
    """Asks for the logprobs of the sampled tokens; without them nothing can be trained."""
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Likeliest tokens that are recorded in each place beside the sampled one; the views then show entropies."""
    return_token_ids: bool | None = None
    """Asks for token ids, an extension of vLLM and SGLang. None = wherever base_url is given."""
    tokenizer: str | None = None
    """Hugging Face directory or hub name of the model's tokenizer. With it conversations are rendered here and carried on
    after the very ids that were sampled; the server gets token ids (`prompt` of /completions, as vLLM takes them). None =
    the server renders every turn anew."""
    tool_parser: str | None = None
    """With `tokenizer`: the format in which the model calls tools, such as "hermes". None: the tokenizer's response template,
    else as the chat template writes calls."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {"enable_thinking": False}. Sent to the server where it renders."""

    @field_validator("tool_parser")
    @classmethod
    def check_tool_parser(cls, name: str | None) -> str | None:
        return checked_name(name)

    @model_validator(mode="after")
    def check_top_logprobs(self) -> OpenAIModelConfig:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(
                f"top_logprobs is {self.top_logprobs} and logprobs is False, so none would be recorded. Set logprobs to True."
            )
        return self


logger = redacting_logger(__name__)

_SAMPLING = {
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "bad_words",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "return_token_ids",
}
"""Options that mean the same in completions as in chat completions."""
_NOT_TAKEN = (400, 404, 405, 415, 422, 501)
"""How servers answer that they have no completions, or take no ids there."""


class TokenPrompts:
    """tokenizer: of the server's model. name: of the llm, for messages. tool_parser: the format of tool calls; None: the
    tokenizer's own."""

    def __init__(self, tokenizer: ChatTokenizer, name: str, tool_parser: str | None = None) -> None:
        self.tokenizer, self._name, self._tool_parser = tokenizer, name, tool_parser
        self._taken: bool | None = None

    def fit(self, messages: Sequence[Mapping[str, Any]], tools: Any, options: Mapping[str, Any]) -> bool:
        """Whether such a call can be made with token ids."""
        return (
            self._taken is not False
            and (not tools or self._tool_parser is not None or self.tokenizer.reads_tool_calls)
            and options.keys() <= _SAMPLING
            and all(isinstance(message.get("content"), str | None) for message in messages)
        )

    def may_be_refused(self, error: Exception) -> bool:
        """Whether the error of a call may mean that the server takes no ids, so that its chat is worth a try. Once it has
        taken some it never does."""
        return self._taken is None and getattr(error, "status_code", None) in _NOT_TAKEN

    def taken(self) -> None:
        """The server has answered a call with token ids."""
        self._taken = True

    def refused(self, error: Exception) -> None:
        """It has refused one, and answered the same as messages: from now on it gets messages."""
        self._taken = False
        logger.warning(
            "the server of llm %r takes no token ids (%s: %s): it renders every turn itself, and turns that it tokenizes "
            "otherwise than it sampled them are trained on by themselves (drifted_turns in run.epochs()).",
            self._name, type(error).__name__, error,
        )  # fmt: skip

    def reply(self, ids: Sequence[int] | None, text: str, sequence: int, tools: Any) -> dict[str, Any]:
        """The assistant message of what was sampled; without ids, of its text."""
        if ids is None:
            return {"role": "assistant", "content": text}
        reply = self.tokenizer.parse(ids, tools or (), self._tool_parser)
        for i, tool_call in enumerate(reply.get("tool_calls") or ()):
            tool_call["id"] = f"call_{sequence}_{i}"  # that of the parser comes again with the same reply
        return reply


class OpenAILLM(LLM):
    """Every call goes to the server; the policy version is unknown here.

    connect: makes a client. Each event loop that asks gets one of its own, for connections belong to a loop. tokenizer: the
    model's, to ask with token ids.
    """

    takes_options = True

    def __init__(
        self, config: OpenAIModelConfig, connect: Callable[[], Any], tokenizer: ChatTokenizer | None = None
    ) -> None:
        self.name = config.model_name
        self.sampling = SamplingParams(1.0 if config.temperature is None else config.temperature, config.max_tokens)
        self._config, self._connect = config, connect
        self._prompts = None if tokenizer is None else TokenPrompts(tokenizer, self.name, config.tool_parser)
        self._clients: dict[asyncio.AbstractEventLoop, Any] = {}
        self._warned = False
        self._warned_of_alternatives = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_clients": {}}  # connections do not go to other processes

    async def _call(
        self,
        episode: CallRecorder,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
        **options: Any,
    ) -> LLMCall:
        sequence, seed = episode.next_call()
        variables = {**self._config.chat_template_kwargs, **options.pop("chat_template_kwargs", {})}
        asked, top = self._options(sequence, seed, params, options)
        prompts, refusal = self._prompts, None
        if prompts is not None and prompts.fit(messages, tools, options):
            try:
                call = await self._call_with_ids(
                    prompts, episode, sequence, messages, tools, params, asked, top, variables
                )
                prompts.taken()
                return call
            except Exception as error:
                if not prompts.may_be_refused(error):
                    raise
                refusal = error
        if variables:
            asked["extra_body"] = {**asked.get("extra_body", {}), "chat_template_kwargs": variables}
        if self._config.logprobs:
            asked |= {"logprobs": True, **({"top_logprobs": top} if top else {})}
        if tools:
            asked["tools"] = tools
        response = await self._client().chat.completions.create(messages=messages, **asked)
        if prompts is not None and refusal is not None:
            prompts.refused(refusal)
        choice = response.choices[0]
        content = choice.logprobs.content if choice.logprobs else None
        tokens = [entry.token for entry in content] if content is not None else None
        prompt_ids = getattr(response, "prompt_token_ids", None)
        call = self._recorded(episode, sequence, messages, params, choice, prompt_ids, tokens, logprob_values(content))
        likeliest = _top_of_chat(content)
        self._require_alternatives(likeliest, top)
        return replace(call, tools=tools, reply=_message(choice.message), top_logprobs=likeliest)

    async def _call_with_ids(
        self,
        prompts: TokenPrompts,
        episode: CallRecorder,
        sequence: int,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
        asked: dict[str, Any],
        top: int,
        variables: dict[str, Any],
    ) -> LLMCall:
        """The same turn, asked for with token ids that follow those of the turn before."""
        previous = episode.previous(messages, tools)
        ids = prompts.tokenizer.render(
            episode.with_thoughts(messages),
            tools,
            None if previous is None else ids_of(previous),
            variables,
            None if previous is None else previous.chat_template_kwargs,
        )
        choice, call = await self._completed(episode, sequence, ids, messages, params, asked, top)
        reply = prompts.reply(call.response_ids, choice.text, sequence, tools)
        return replace(call, tools=tools, reply=reply, chat_template_kwargs=variables or None)

    async def _complete(
        self, episode: CallRecorder, prompt: str | list[int], params: SamplingParams, **options: Any
    ) -> LLMCall:
        sequence, seed = episode.next_call()
        asked, top = self._options(sequence, seed, params, options)
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        messages = [{"role": TEXT_PROMPT, "content": text}]
        choice, call = await self._completed(episode, sequence, prompt, messages, params, asked, top)
        return replace(call, reply={"role": "assistant", "content": choice.text})

    async def _completed(
        self,
        episode: CallRecorder,
        sequence: int,
        prompt: str | list[int],
        messages: list[dict[str, Any]],
        params: SamplingParams,
        asked: dict[str, Any],
        top: int,
    ) -> tuple[Any, LLMCall]:
        """A completion as the server gave it, and as a call without tools and reply."""
        if self._config.logprobs:
            asked = {**asked, "logprobs": max(1, top)}
        response = await self._client().completions.create(prompt=prompt, **asked)
        choice = response.choices[0]
        found = choice.logprobs
        tokens, logprobs = (found.tokens, found.token_logprobs) if found is not None else (None, None)
        prompt_ids = prompt if isinstance(prompt, list) else getattr(choice, "prompt_token_ids", None)
        call = self._recorded(episode, sequence, messages, params, choice, prompt_ids, tokens, logprobs)
        likeliest = found.top_logprobs if found is not None and top else None
        self._require_alternatives(likeliest, top)
        return choice, replace(call, top_logprobs=[dict(each or {}) for each in likeliest] if likeliest else None)

    def _require_alternatives(self, likeliest: Any, top: int) -> None:
        """Warns, once, if the likeliest tokens were asked for and the server returned none."""
        if not top or any(likeliest or ()) or self._warned_of_alternatives:
            return
        self._warned_of_alternatives = True
        logger.warning(
            "the server of llm %r was asked for top_logprobs=%d and returned none: no alternatives, and so no entropy, are "
            "recorded. Use a server that returns them, or leave top_logprobs out.",
            self.name,
            top,
        )

    def _options(
        self, sequence: int, seed: int, params: SamplingParams, options: dict[str, Any]
    ) -> tuple[dict[str, Any], int]:
        """What is asked for beside prompt, tools and logprobs, and how many of the likeliest tokens are."""
        config = self._config
        asked: dict[str, Any] = {
            "model": config.model_name,
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "seed": (seed if config.seed is None else config.seed + sequence) % 2**31,
        }
        if config.top_p is not None:
            asked["top_p"] = config.top_p
        if params.stop:
            asked["stop"] = list(params.stop)
        extra = dict(options)
        top = extra.pop("top_logprobs", None) or params.top_logprobs or config.top_logprobs
        if config.base_url is not None if config.return_token_ids is None else config.return_token_ids:
            extra["return_token_ids"] = True
        if extra:
            asked["extra_body"] = extra
        return asked, top if config.logprobs else 0

    def _recorded(
        self,
        episode: CallRecorder,
        sequence: int,
        messages: list[dict[str, Any]],
        params: SamplingParams,
        choice: Any,
        prompt_ids: list[int] | None,
        tokens: list[str] | None,
        logprobs: list[float] | None,
    ) -> LLMCall:
        """The call, but for tools and reply."""
        response_ids = getattr(choice, "token_ids", None)
        exact = prompt_ids is not None and response_ids is not None
        if not exact and not self._warned:
            self._warned = True
            logger.warning(
                "the server of llm %r gives no token ids: its replies are recorded, but are not exact, and cannot be "
                "trained on. vLLM gives them (return_token_ids).",
                self.name,
            )
        return LLMCall(
            episode=episode.key,
            sequence=sequence,
            model=self.name,
            llm=self.config_name,
            messages=messages,
            tools=None,
            reply={},
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            tokens=tokens,
            logprobs=logprobs,
            finish_reason=choice.finish_reason,
            policy_version=None,
            sampling=params,
            seconds=float("nan"),
            exact=exact,
        )

    def _client(self) -> Any:
        """The client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = self._connect()
        return self._clients[loop]

    async def aclose(self) -> None:
        """Closes all clients, each on its own loop, where that still runs."""
        here, clients = asyncio.get_running_loop(), list(self._clients.items())
        self._clients.clear()
        for loop, client in clients:
            if loop is here:
                await client.close()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(client.close(), loop))


def _tokenizer(config: OpenAIModelConfig) -> ChatTokenizer | None:
    if config.tokenizer is None:
        return None
    try:
        tokenizer, end_ids = load_tokenizer(config.tokenizer)
    except ImportError as error:
        raise MissingExtra("`tokenizer` of an llm of type 'openai'", "local") from error
    return ChatTokenizer(tokenizer, end_ids, config.tokenizer, samples=False)


def _message(message: Any) -> dict[str, Any]:
    """The reply as an OpenAI message. What the model thought is called `reasoning_content`, or, by newer servers,
    `reasoning`."""
    reply = message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})
    for name in ("reasoning_content", "reasoning"):
        thought = getattr(message, name, None)
        if isinstance(thought, str) and thought:
            return {**reply, "reasoning_content": thought}
    return reply


def _top_of_chat(content: Any) -> list[dict[str, float]] | None:
    """Text -> logprob of the likeliest tokens, one mapping a token; None where the server gave none."""
    found = [{top.token: top.logprob for top in entry.top_logprobs or ()} for entry in content or ()]
    return found if any(found) else None


@register_llm_provider(config_type=OpenAIModelConfig)
async def openai_llm(config: OpenAIModelConfig, builder: Builder):
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise MissingExtra("An llm of type 'openai'", "openai") from error
    key = config.api_key.get_secret_value() if config.api_key else None
    options: dict[str, Any] = {"max_retries": config.max_retries}
    if config.request_timeout is not None:
        options["timeout"] = config.request_timeout

    def connect() -> AsyncOpenAI:
        # A server of one's own mostly wants no key, but the client insists on one.
        return AsyncOpenAI(api_key=key or ("none" if config.base_url else None), base_url=config.base_url, **options)

    connect()  # what is wrong with the settings is said now
    llm = OpenAILLM(config, connect, await in_daemon_thread(_tokenizer, config))
    llm.config_name = builder.config.name_of_llm(config)
    yield llm
    await llm.aclose()
    await close_clients()
