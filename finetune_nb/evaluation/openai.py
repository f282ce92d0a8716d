"""`_type: openai`: a client of any OpenAI-compatible server (vLLM, SGLang, OpenAI itself), recorded like every model call.

It asks for logprobs and for token ids; a server that does not give ids leaves calls that are not exact, and one that gives
no logprobs leaves turns that cannot be trained on. Training such a model is the backend's affair.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import AliasChoices, ConfigDict, Field, SecretStr

from ..config import LLMBaseConfig
from ..errors import MissingExtra
from ..redaction import redacting_logger
from ..registry import Builder, register_llm_provider
from ..types import LLMCall, SamplingParams, logprob_values
from .episode import TEXT_PROMPT, Episode
from .recording import LLM, close_clients

__all__ = ["OpenAILLM", "OpenAIModelConfig"]

logger = redacting_logger(__name__)


class OpenAIModelConfig(LLMBaseConfig, name="openai"):
    """A model behind an OpenAI-compatible server."""

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
    return_token_ids: bool | None = None
    """Asks for token ids, an extension of vLLM and SGLang. None = wherever base_url is given."""


class OpenAILLM(LLM):
    """Every call goes to the server; the policy version is unknown here.

    connect: makes a client. Each event loop that asks gets one of its own, for connections belong to a loop.
    """

    takes_options = True

    def __init__(self, config: OpenAIModelConfig, connect: Callable[[], Any]) -> None:
        self.name = config.model_name
        self.sampling = SamplingParams(1.0 if config.temperature is None else config.temperature, config.max_tokens)
        self._config, self._connect = config, connect
        self._clients: dict[asyncio.AbstractEventLoop, Any] = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_clients": {}}  # connections do not go to other processes

    async def _call(
        self,
        episode: Episode,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
        **options: Any,
    ) -> LLMCall:
        sequence, asked = self._options(episode, params, options, logprobs=True)
        if tools:
            asked["tools"] = tools
        response = await self._client().chat.completions.create(messages=messages, **asked)
        choice = response.choices[0]
        content = choice.logprobs.content if choice.logprobs else None
        tokens = [entry.token for entry in content] if content is not None else None
        reply = choice.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})
        prompt_ids = getattr(response, "prompt_token_ids", None)
        call = self._recorded(episode, sequence, messages, params, choice, prompt_ids, tokens, logprob_values(content))
        return replace(call, tools=tools, reply=reply)

    async def _complete(
        self, episode: Episode, prompt: str | list[int], params: SamplingParams, **options: Any
    ) -> LLMCall:
        sequence, asked = self._options(episode, params, options, logprobs=1)
        response = await self._client().completions.create(prompt=prompt, **asked)
        choice = response.choices[0]
        found = choice.logprobs
        tokens, logprobs = (found.tokens, found.token_logprobs) if found is not None else (None, None)
        prompt_ids = prompt if isinstance(prompt, list) else getattr(choice, "prompt_token_ids", None)
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        messages = [{"role": TEXT_PROMPT, "content": text}]
        call = self._recorded(episode, sequence, messages, params, choice, prompt_ids, tokens, logprobs)
        return replace(call, reply={"role": "assistant", "content": choice.text})

    def _options(
        self, episode: Episode, params: SamplingParams, options: dict[str, Any], logprobs: Any
    ) -> tuple[int, dict[str, Any]]:
        """The call's sequence number, and what is asked for beside the prompt."""
        config = self._config
        sequence, seed = episode.begin()
        asked: dict[str, Any] = {
            "model": config.model_name,
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "seed": (seed if config.seed is None else config.seed + sequence) % 2**31,
        }
        if config.top_p is not None:
            asked["top_p"] = config.top_p
        if config.logprobs:
            asked["logprobs"] = logprobs
        if params.stop:
            asked["stop"] = list(params.stop)
        extra = dict(options)
        if config.base_url is not None if config.return_token_ids is None else config.return_token_ids:
            extra["return_token_ids"] = True
        if extra:
            asked["extra_body"] = extra
        return sequence, asked

    def _recorded(
        self,
        episode: Episode,
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
    llm = OpenAILLM(config, connect)
    yield llm
    await llm.aclose()
    await close_clients()
