"""A model of a config as LangChain's ChatOpenAI."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError, MissingExtra
from .client import LLM
from .rollout_transport import RolloutTransport

__all__ = [
    "chat_model",
]


def chat_model(llm: Any) -> Any:
    """Make the ChatOpenAI of a model. Each of its calls goes to the rollout whose code makes it.

    Args:
        llm: The model.

    Returns:
        The chat model. It leaves temperature and the like to the model, where they are live.

    Raises:
        ConfigError: It is somebody else's component, which has no address of its own.
        MissingExtra: langchain-openai is not installed.
    """
    try:
        import httpx
        from langchain_openai import ChatOpenAI
    except ImportError as error:
        raise MissingExtra('get_llm(..., wrapper_type="langchain")', "langchain") from error
    if not isinstance(llm, LLM):
        raise ConfigError(
            f"wrapper_type='langchain' is for llms of type policy and openai; found {type(llm).__name__}. Leave wrapper_type "
            "out, and give llm.base_url and llm.api_key to the framework's OpenAI client in the workflow."
        )
    transport: Any = RolloutTransport(llm)
    return ChatOpenAI(
        model=llm.name,
        base_url=RolloutTransport.base_url,
        api_key="none",  # type: ignore[arg-type]  # the gateway's key is the transport's affair
        max_retries=0,
        http_async_client=httpx.AsyncClient(transport=transport),
        http_client=httpx.Client(transport=transport),
    )
