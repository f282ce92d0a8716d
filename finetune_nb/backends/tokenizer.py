"""What transformers knows of a model's tokenizer, also where the model itself is somewhere else. Needs no torch."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

__all__ = ["load_tokenizer", "response_template"]


def load_tokenizer(name_or_dir: str) -> tuple[Any, list[int]]:
    """A tokenizer from a Hugging Face directory or hub name, and the tokens that end a turn. Raises ConfigError, and
    ImportError without transformers."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer of {name_or_dir!r} cannot be loaded: {error} Name a Hugging Face directory or hub model in "
            "`tokenizer` where the service calls the model otherwise."
        ) from error
    found = {tokenizer.eos_token_id}
    try:
        ends = GenerationConfig.from_pretrained(name_or_dir).eos_token_id
        found.update(ends if isinstance(ends, list) else [ends])
    except (OSError, ValueError):  # not every tokenizer has a model beside it
        pass
    return tokenizer, sorted(token for token in found if isinstance(token, int))


def response_template(tokenizer: Any) -> Any:
    """The tokenizer's response template, compiled once where `parse_response` would do it for every reply; None without
    one. Raises whatever transformers does where it is not one."""
    template = getattr(tokenizer, "response_template", None)
    if not template:
        return None
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError:  # it is not transformers' public API
        return template
    return load_response_template(template)
