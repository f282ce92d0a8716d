"""Misspelt keys: compares a tree of raw data with the pydantic models that it is meant for, before anything is
validated.

pydantic would drop an unknown key in silence, also deep inside a user's own model; here every one is found, with the
keys that are known at its place.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, RootModel

from .redaction import KeyPath, load_keys

__all__ = ["unknown_keys"]


def unknown_keys(annotation: Any, raw: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, list[str]]]:
    """Yields the path of every key in `raw` that no model in `annotation` knows, with the keys that are known there.

    A model with extra="allow", a plain dict, and what is validated already (a model instance) know every key.
    """
    choices = list(_choices(annotation))
    if isinstance(raw, dict):
        models = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
        values = [args[-1] for choice in choices if (args := _arguments(choice, Mapping))]
        known: dict[str, list[Any]] = {}
        for model in models:
            for name, field in model.model_fields.items():
                for key in load_keys(model, name):
                    known.setdefault(key, []).append(field.annotation)
        closed = bool(models) and all(model.model_config.get("extra") != "allow" for model in models)
        closed = closed and not values and not any(choice in (dict, Any, BaseModel) for choice in choices)
        for key, child in raw.items():
            if key in known or values:
                child_type = typing.Union[(*known.get(key, ()), *values)]
                yield from unknown_keys(child_type, child, (*path, key))
            elif closed:
                yield (*path, key), sorted({"_type" if name == "type" and "_type" in known else name for name in known})
    elif isinstance(raw, list):
        for choice in choices:
            args = _arguments(choice, Sequence) or _arguments(choice, Set)
            for position, child in enumerate(raw) if args else ():
                yield from unknown_keys(args[min(position, len(args) - 1)], child, (*path, position))


def _choices(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, without what is wrapped around them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _choices(get_args(annotation)[0])
    elif origin is typing.Union or origin is types.UnionType:
        for choice in get_args(annotation):
            yield from _choices(choice)
    elif isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, RootModel):
        yield from _choices(annotation.model_fields["root"].annotation)
    else:
        yield annotation


def _arguments(annotation: Any, kind: type) -> tuple[Any, ...]:
    """The parameters of a container type such as dict[str, X], without `...`; empty for anything else."""
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, kind):
        return tuple(arg for arg in get_args(annotation) if arg is not Ellipsis)
    return ()
