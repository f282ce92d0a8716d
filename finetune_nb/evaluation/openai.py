"""`_type: openai`: a client of any OpenAI-compatible server (vLLM, SGLang, OpenAI itself), recorded like every model call.

It asks for logprobs and for token ids; a server that does not give ids leaves calls that are not exact, and one that gives
no logprobs leaves turns that cannot be trained on. Training such a model is the backend's affair.
"""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, ConfigDict, Field, SecretStr

from ..config import LLMBaseConfig
from ..errors import MissingExtra
from ..registry import Builder, register_llm_provider
from ..types import LLMCall, SamplingParams, logprob_values
from .recording import LLM, Episode

__all__ = ["OpenAILLM", "OpenAIModelConfig"]


class OpenAIModelConfig(LLMBaseConfig, name="openai"):
    """A model behind an OpenAI-compatible server."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    model_name: str = Field(validation_alias=AliasChoices("model_name", "model"))
    base_url: str | None = None
    """None = OpenAI's own."""
    api_key: SecretStr | None = None
    """None = OPENAI_API_KEY, or for a server of your own none at all."""
    seed: int | None = None
    """Base of the requests' seeds; None = derived from the run's seed."""
    max_retries: int = Field(default=10, ge=0)
    temperature: float | None = Field(default=None, ge=0.0)
    """None = 1.0: logprobs are trained on as those of the distribution that was sampled from."""
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    max_tokens: int = Field(default=1024, ge=1)
    request_timeout: float | None = Field(default=None, gt=0.0)
    """Seconds; None = the client's own."""
    logprobs: bool = True
    return_token_ids: bool | None = None
    """Asks for token ids, an extension of vLLM and SGLang. None = wherever base_url is given."""


class OpenAILLM(LLM):
    """Every call goes to the server; the policy version is unknown here."""

    def __init__(self, config: OpenAIModelConfig, client: Any) -> None:
        self.name = config.model_name
        self.sampling = SamplingParams(1.0 if config.temperature is None else config.temperature, config.max_tokens)
        self._config, self._client = config, client

    async def _call(
        self,
        episode: Episode,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        params: SamplingParams,
    ) -> LLMCall:
        config = self._config
        sequence, seed = episode.begin()
        options: dict[str, Any] = {
            "model": config.model_name,
            "messages": messages,
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "seed": (seed if config.seed is None else config.seed + sequence) % 2**31,
        }
        if config.top_p is not None:
            options["top_p"] = config.top_p
        if config.logprobs:
            options["logprobs"] = True
        if params.stop:
            options["stop"] = list(params.stop)
        if tools:
            options["tools"] = tools
        asks = config.base_url is not None if config.return_token_ids is None else config.return_token_ids
        if asks:
            options["extra_body"] = {"return_token_ids": True}
        response = await self._client.chat.completions.create(**options)
        choice = response.choices[0]
        content = choice.logprobs.content if choice.logprobs else None
        prompt_ids = getattr(response, "prompt_token_ids", None)
        response_ids = getattr(choice, "token_ids", None)
        return LLMCall(
            episode=episode.key,
            sequence=sequence,
            model=self.name,
            messages=messages,
            tools=tools,
            reply=choice.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            tokens=[entry.token for entry in content] if content is not None else None,
            logprobs=logprob_values(content),
            finish_reason=choice.finish_reason,
            policy_version=None,
            sampling=params,
            seconds=float("nan"),
            exact=prompt_ids is not None and response_ids is not None,
        )


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
    # A server of one's own mostly wants no key, but the client insists on one.
    client = AsyncOpenAI(api_key=key or ("none" if config.base_url else None), base_url=config.base_url, **options)
    yield OpenAILLM(config, client)
    await client.close()
