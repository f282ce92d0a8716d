"""Keeping secrets out of what is shown or stored: which keys name a credential, the secret values met so far, and
`plain_data`, the one walk that turns a config into dicts and lists.

A secret is a string whose key names a credential (`api_key`, `hf_token`, `password`, ...), a pydantic SecretStr, or a
value that came from the environment through `${NAME}`.
"""

from __future__ import annotations

import enum
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeGuard
from urllib.parse import quote

from pydantic import AliasChoices, AliasPath, BaseModel, SecretBytes, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from .text import plain, text_of

__all__ = [
    "KeyPath",
    "MASK",
    "SHORTEST_SECRET",
    "error_text",
    "is_credential",
    "is_text",
    "known_secrets",
    "load_keys",
    "names_credential",
    "plain_data",
    "redact",
    "redact_exception",
    "redact_text",
    "redact_texts",
    "redacting_logger",
    "remember_secret",
]

MASK = "**********"
SHORTEST_SECRET = 6
"""Shorter values are not searched for in texts: masking every "3" or "true" would only make the text unreadable."""

KeyPath = tuple[str | int, ...]
"""The path of a value: mapping keys and list positions, from the root."""

_CREDENTIAL = re.compile(
    r"(^|_)(api_?key|access_key|secret_key|private_key|token|secret|password|passwd|authorization)$"
)
_VOCABULARY = re.compile(r"(^|_)(pad|eos|bos|unk|cls|sep|mask|stop|start|end)_token$")
"""Names of a tokenizer's special tokens, which are no secrets."""


def is_credential(key: Any) -> bool:
    """Whether a key names a credential: `api_key`, `X-Api-Key`, `hf_token`, `clientSecret`; never `max_tokens`,
    `token_ids`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key)).lower().replace("-", "_")
    return bool(_CREDENTIAL.search(name)) and not _VOCABULARY.search(name)


class _Secrets:
    """The secret values of this process. Grows while configs are loaded; read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.values: frozenset[str] = frozenset()
        self.pattern: re.Pattern[str] | None = None

    def add(self, value: str) -> None:
        # A secret inside a JSON text or a URL is spelt differently; all spellings are hidden.
        spellings = {value, json.dumps(value)[1:-1], quote(value, safe="")}
        with self._lock:
            if spellings <= self.values:
                return
            self.values |= spellings
            self.pattern = _any_of(self.values)


def _any_of(values: Iterable[str]) -> re.Pattern[str] | None:
    # Longest first, so that a secret which begins with another one is hidden whole.
    ordered = sorted((value for value in values if len(value) >= SHORTEST_SECRET), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


_secrets = _Secrets()


def remember_secret(value: str) -> None:
    """From now on `redact_text` hides `value`, if it has at least 6 characters and is not the mask itself."""
    if len(value) >= SHORTEST_SECRET and value != MASK:
        _secrets.add(value)


def known_secrets() -> list[str]:
    """The secret values that were met so far, for a process that is to hide them too. Never show or store them."""
    return sorted(_secrets.values)


def redact_text(text: str) -> str:
    """`text` with every secret value that was met so far in this process replaced by asterisks."""
    return _secrets.pattern.sub(MASK, text) if _secrets.pattern else text


def redact_texts(texts: Sequence[Any]) -> list[Any]:
    """`redact_text` of each, None stays; where there is no secret in any of them, in one look."""
    together = "\n".join(filter(None, texts))
    if redact_text(together) == together:
        return list(texts)
    return [text and redact_text(text) for text in texts]


def error_text(error: BaseException) -> str:
    """An error's type and message, without the secrets in it: "ValueError: ..."."""
    return redact_text(f"{type(error).__name__}: {text_of(error)}")


def redact_exception(error: BaseException) -> bool:
    """Takes the secrets out of an exception's messages and of those that caused it, in place. False where that does not
    help, because it makes its text of something else: do not show it."""
    clean = True
    seen: set[int] = set()  # an exception may be its own cause
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        said = text_of(following)
        if redact_text(said) != said:
            following.args = tuple(redact_text(part) if isinstance(part, str) else part for part in following.args)
            said = text_of(following)
            clean = clean and redact_text(said) == said
        following = following.__cause__ or following.__context__
    return clean


def redacting_logger(name: str) -> logging.Logger:
    """The logger of a module of ours: what it logs, tracebacks included, names no secret and sends no control character
    to a terminal. Line breaks and tabs stay."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Redact) for known in logger.filters):
        logger.addFilter(_Redact())
    return logger


class _Redact(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and not record.exc_text:
            record.exc_text = _formatter.formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = plain(redact_text(record.exc_text))
            record.exc_info = None  # the text replaces it: a handler must not format the exception again
        if record.stack_info:
            record.stack_info = plain(redact_text(record.stack_info))
        record.msg, record.args = plain(redact_text(record.getMessage())), ()
        return True


_formatter = logging.Formatter()


def redact(value: Any, secrets: Iterable[str] = ()) -> Any:
    """`value` (a model, a mapping, a list, a scalar) as plain data that may be shown or stored.

    Strings under a credential's key become asterisks; the texts in `secrets`, and every secret met so far, are replaced
    inside the other strings. `value` itself is not changed.
    """
    extra = _any_of(secrets)

    def hide(path: KeyPath, node: Any) -> Any:
        if is_text(node):
            if node and names_credential(path):
                return MASK
            return redact_text(extra.sub(MASK, node) if extra else node)
        return node

    return plain_data(value, hide)


def is_text(node: Any) -> TypeGuard[str]:
    """Whether a node is a string, and not one of an enum's."""
    return isinstance(node, str) and not isinstance(node, enum.Enum)


def names_credential(path: KeyPath) -> bool:
    """Whether the last key of `path` names a credential; positions in a list do not count as keys."""
    return is_credential(next((part for part in reversed(path) if isinstance(part, str)), ""))


def plain_data(
    value: Any, replace: Callable[[KeyPath, Any], Any], path: KeyPath = (), _open: frozenset[int] = frozenset()
) -> Any:
    """`value` as dicts, lists and scalars, ready for YAML or JSON, each node offered to `replace(path, node)` first.

    A node for which `replace` returns something else than the node itself is done with. Model fields stand under the
    key by which they are loaded (`_type`, an alias). SecretStr becomes asterisks; a model inside itself becomes None.
    """
    replaced = replace(path, value)
    if replaced is not value:
        return replaced
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return plain_data(str(value), replace, path, _open)
    if isinstance(value, SecretStr | SecretBytes):
        return MASK
    if id(value) in _open:
        return None
    _open = _open | {id(value)}
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        value = {
            **{load_keys(type(value), name)[0]: getattr(value, name) for name in fields if not fields[name].exclude},
            **(value.model_extra or {}),
        }
    if isinstance(value, Mapping):
        return {str(key): plain_data(child, replace, (*path, str(key)), _open) for key, child in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [plain_data(child, replace, (*path, position), _open) for position, child in enumerate(value)]
    return plain_data(to_jsonable_python(value, fallback=repr), replace, path, _open)


def load_keys(model: type[BaseModel], name: str) -> list[str]:
    """The keys by which a model's field can be given, the preferred one first."""
    field: FieldInfo = model.model_fields[name]
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [] if alias is None else [alias]
    keys = [str(choice.path[0]) if isinstance(choice, AliasPath) else choice for choice in choices]
    config = model.model_config
    if not keys or config.get("populate_by_name") or config.get("validate_by_name"):
        keys.append(name)
    return sorted(keys, key=lambda key: key != "_type")
