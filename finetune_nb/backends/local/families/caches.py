"""What a model keeps of the tokens before, whatever it is: some of its rows, and several of them joined to one.

Attention layers keep keys and values, one a token; recurrent layers keep a state of one size. Keys of shorter rows are
padded on the left, where an attention mask hides them; states are never padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....errors import BackendError

__all__ = [
    "Tokens",
    "join",
    "kinds_of_layers",
    "select_rows",
]


class Tokens:
    """For a model that keeps nothing: the tokens themselves, one list a row."""

    def __init__(self, rows: Sequence[Sequence[int]] = ()) -> None:
        self.rows = [list(row) for row in rows]


def kinds_of_layers(model: Any) -> set[type]:
    """What transformers makes to keep what the model's layers keep; empty where the model's config does not say."""
    from transformers import DynamicCache

    try:
        return {type(layer) for layer in DynamicCache(config=model.config).layers}
    except (AttributeError, KeyError, TypeError, ValueError):
        return set()


def select_rows(cache: Any, rows_R: Tensor) -> Any:
    """What is kept for these rows, in their order; a row may come several times. The cache itself may change."""
    from transformers.cache_utils import Cache

    if isinstance(cache, Tokens):
        return Tokens([cache.rows[row] for row in rows_R.tolist()])
    if isinstance(cache, Cache):
        for layer in getattr(cache, "layers", ()):
            layer.reorder_cache(rows_R)
        for name, value in _beside_layers(cache).items():
            setattr(cache, name, select_rows(value, rows_R))
        return cache
    if isinstance(cache, Tensor) and cache.dim():
        return cache.index_select(0, rows_R)
    return _each([cache], lambda values: select_rows(values[0], rows_R))


def join(caches: Sequence[Any]) -> Any:
    """One cache of all rows, in the order of the caches. The caches themselves may change.

    Raises:
        BackendError: A layer keeps what nobody here knows how to join.
    """
    from transformers.cache_utils import Cache

    first = caches[0]
    if len(caches) == 1:
        return first
    if isinstance(first, Tokens):
        return Tokens([row for cache in caches for row in cache.rows])
    if isinstance(first, Cache):
        for layers in zip(*(getattr(cache, "layers", ()) for cache in caches), strict=True):
            _join_layers(layers)
        for name in _beside_layers(first):
            setattr(first, name, join([getattr(cache, name) for cache in caches]))
        return first
    if isinstance(first, Tensor) and first.dim():
        return torch.cat(list(caches))
    return _each(caches, join)


def _beside_layers(cache: Any) -> dict[str, Any]:
    """What a cache holds beside its layers: some models have their states in lists of tensors, or a cache in a cache."""
    from transformers.cache_utils import Cache

    return {
        name: value
        for name, value in vars(cache).items()
        if name != "layers" and isinstance(value, Tensor | list | tuple | dict | Cache)
    }


def _each(values: Sequence[Any], apply: Callable[[list[Any]], Any]) -> Any:
    """`apply` to what is in the same place of each: lists, tuples and dicts are gone into, anything else stays."""
    first = values[0]
    if isinstance(first, dict):
        return {key: apply([value[key] for value in values]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)([apply(list(items)) for items in zip(*values, strict=True)])
    return first


def _join_layers(layers: Sequence[Any]) -> None:
    """Puts the rows of all into the first."""
    from transformers import cache_utils

    first: Any = layers[0]
    recurrent = isinstance(first, cache_utils.LinearAttentionCacheLayerMixin)
    sliding = isinstance(first, cache_utils.DynamicSlidingWindowLayer)
    if type(first) not in _joinable():
        raise BackendError(f"layers of {type(first).__name__} cannot be joined")
    if recurrent:
        first.conv_states = join([layer.conv_states for layer in layers])
        first.recurrent_states = join([layer.recurrent_states for layer in layers])
    if getattr(first, "keys", None) is not None:
        first.keys = _padded_and_joined([layer.keys for layer in layers], dim=-2)
        first.values = _padded_and_joined([layer.values for layer in layers], dim=-2)
    if getattr(first, "indexer_keys", None) is not None:
        first.indexer_keys = _padded_and_joined([layer.indexer_keys for layer in layers], dim=1)
    if sliding:
        first.cumulative_length = max(layer.cumulative_length for layer in layers)


def _joinable() -> set[type]:
    """Kinds of layers of which all that they keep is known here."""
    from transformers import cache_utils

    return {
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        cache_utils.LinearAttentionLayer,
        cache_utils.LinearAttentionAndFullAttentionLayer,
        *_newer("DynamicIndexedLayer", "DummyLayer", "LinearAttentionAndSlidingWindowAttentionLayer"),
    }


def _newer(*names: str) -> list[type]:
    """Those of these kinds that this version of transformers has."""
    from transformers import cache_utils

    return [getattr(cache_utils, name) for name in names if hasattr(cache_utils, name)]


def _padded_and_joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Rows of all, the shorter ones padded on the left of `dim`."""
    longest = max(tensor.shape[dim] for tensor in tensors)
    return torch.cat([_padded(tensor, dim, longest - tensor.shape[dim]) for tensor in tensors])


def _padded(tensor: Tensor, dim: int, padding: int) -> Tensor:
    dimensions_behind = -dim - 1 if dim < 0 else tensor.dim() - dim - 1
    return pad(tensor, [0, 0] * dimensions_behind + [padding, 0])
