"""Where a model's positions change with the length of what it is given.

LongRoPE turns keys by other factors once a sequence is longer than what the model was first trained on, and it does so for
all rows of a batch by the longest of them. Here a token's factors are those of the tokens before it and nothing else: what
a plain pass over exactly these tokens takes. So they are the same when it is sampled and when it is trained.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "borders_of",
    "last_length",
]


def borders_of(model: Any) -> tuple[int, ...]:
    """Lengths in tokens up to which positions are one thing and above which they are another, in order; mostly none."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    # One dictionary for all layers, or one for each kind of layer.
    by_kind = [parameters] if "rope_type" in parameters else list(parameters.values())
    found = set()
    for of_kind in by_kind:
        if isinstance(of_kind, dict) and of_kind.get("rope_type") == "longrope":
            border = of_kind.get("original_max_position_embeddings")
            found.add(border or config.original_max_position_embeddings)
    return tuple(sorted(found))


def last_length(length: int, borders: tuple[int, ...]) -> int | None:
    """The longest sequence whose positions are as in one of `length` tokens; None where they never change again."""
    return next((border for border in borders if length <= border), None)
