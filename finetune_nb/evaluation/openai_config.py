"""The settings of an llm of type `openai`."""

from __future__ import annotations

from pydantic import AliasChoices, ConfigDict, Field, SecretStr

from ..config import LLMBaseConfig

__all__ = ["OpenAIModelConfig"]


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
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Likeliest tokens that are recorded in each place beside the sampled one; the views then show entropies."""
    return_token_ids: bool | None = None
    """Asks for token ids, an extension of vLLM and SGLang. None = wherever base_url is given."""
    tokenizer: str | None = None
    """Hugging Face directory or hub name of the model's tokenizer. With it conversations are rendered here and carried on
    behind the very ids that were sampled; the server gets token ids (`prompt` of /completions, as vLLM takes them). None =
    the server renders every turn anew."""
