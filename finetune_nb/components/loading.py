"""`load_config`: YAML, or a dict, to a checked Config. In this order: overrides, `${NAME}` from the environment,
component types, misspelt keys, values, and whether the parts fit together.

All mistakes are reported at once, each with its path. What is read here is untrusted: no tag is constructed, nothing is
evaluated, and no message shows a secret.
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, RootModel, SecretStr, ValidationError

from ..config.base import TypedBaseModel
from ..config.sections import Config, Placeholder
from ..config.yaml import read_yaml
from ..errors import ConfigError, did_you_mean
from ..redaction import (
    MASK,
    KeyPath,
    is_credential,
    is_text,
    load_keys,
    names_credential,
    plain_data,
    redact_text,
    remember_secret,
)
from .registry import KINDS, config_class, type_names

__all__ = [
    "load_config",
    "load_received",
    "unknown_keys",
]

NAMED_COMPONENTS: dict[KeyPath, str] = {
    ("llms",): "llm_provider",
    ("functions",): "function",
    ("eval", "evaluators"): "evaluator",
    ("trajectory_builders",): "trajectory_builder",
    ("trainer_adapters",): "trainer_adapter",
    ("trainers",): "trainer",
}
"""Sections that map names to components."""

SINGLE_COMPONENTS: dict[KeyPath, str] = {("workflow",): "function", ("eval", "general", "dataset"): "dataset"}

FILES: tuple[KeyPath, ...] = (
    ("eval", "general", "dataset", "file_path"),
    ("finetuning", "run_configuration", "config_file"),
    ("finetuning", "run_configuration", "dataset"),
    ("finetuning", "run_configuration", "validation_dataset"),
    ("finetuning", "run_configuration", "validation_config_file"),
)
"""Files that may stand relative to the YAML file."""

NOT_OURS: dict[KeyPath, tuple[Any, ...]] = {
    **{
        (section,): (None, {})
        for section in (
            *("general", "function_groups", "middleware", "embedders", "memory", "object_stores"),
            *("optimizer", "retrievers", "ttc_strategies", "authentication"),
        )
    },
    ("eval", "general", "output"): (None, {}),
    ("eval", "general", "profiler"): (None, {}),
    ("eval", "general", "validate_llm_endpoints"): (None, False),
    ("eval", "general", "per_input_user_id"): (None, True),
    ("finetuning", "run_configuration", "endpoint"): (None,),
    ("finetuning", "run_configuration", "result_json_path"): ("$",),
}
"""Keys that NAT knows and we lack, with the values that ask for nothing."""

TYPES_NOT_OURS = {"dataset": ("xls", "custom")}
PROMPT_FILES = (".txt", ".md", ".j2", ".jinja2", ".jinja", ".prompt", ".tpl", ".template")
"""NAT replaces `file://...` by the contents of such a file."""

_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


def load_config(source: str | Path | Mapping[str, Any] | Config, override: Iterable[tuple[str, Any]] = ()) -> Config:
    """Read and check a config.

    `${NAME}` in a value is replaced from the environment, `${NAME:-default}` by the default if it is unset, and `$${` is a
    plain `${`. A relative dataset file is looked for in the current directory, then beside the YAML file.

    Args:
        source: A YAML file, YAML text (a string with a line break), a mapping, or a Config, which is returned as it is.
        override: Dotted paths with the values to put there; a string is read as YAML, so "3" is a number.

    Returns:
        The checked config.

    Raises:
        ConfigError: It has mistakes, and the message lists every one with its path; or `override` came with a Config.
        MissingExtra: A component needs a package that is not installed.
    """
    override = list(override)
    if isinstance(source, Config):
        if override:
            raise ConfigError("overrides go with a YAML file or a mapping; this Config is complete. Change its fields.")
        return source
    tree, label, folder = _read(source)
    reading = _Reading(label)
    for dotted, value in override:
        reading.put(tree, dotted, value)
    tree = reading.expand(tree, ())
    reading.leave_out_what_is_not_ours(tree)
    if folder is not None:
        _find_files(tree, folder)
    return reading.config(tree)


def load_received(source: Mapping[str, Any]) -> Config:
    """Read and check a config that somebody else wrote, to look at it.

    Nothing of it is filled from the environment: `${NAME:-default}` is the default, and `${NAME}` stays as it is written.

    Args:
        source: The config as plain data.

    Returns:
        The checked config. No component may be built from it.

    Raises:
        ConfigError: As `load_config`.
        MissingExtra: As `load_config`.
    """
    tree, label, _ = _read(source)
    reading = _Reading(label, received=True)
    tree = reading.expand(tree, ())
    reading.leave_out_what_is_not_ours(tree)
    config = reading.config(tree)
    config._received = True
    return config


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str, Path | None]:
    """The tree of dicts and lists, what to call it in errors, and the folder that relative files may be in."""
    if isinstance(source, Mapping):
        return _writable(source), "config", None
    label, text, folder = "config", str(source), None
    if isinstance(source, Path) or "\n" not in source:
        path = Path(source).expanduser()
        label, folder = str(source), path.resolve().parent
        problem = ""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            problem = "is not UTF-8 text. Save it as UTF-8"
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({type(error).__name__}). Give the path of a YAML file; this is {Path.cwd()}"
        if problem:
            raise ConfigError(f"config file {label!r} {problem}.")
    tree = read_yaml(text, label)
    if not isinstance(tree, dict) or not tree:
        found = "nothing" if not tree else f"a {type(tree).__name__}"
        raise ConfigError(
            f"{label}: found {found}; expected a mapping with sections such as llms, workflow, finetuning."
        )
    return _writable(tree), label, folder


def _writable(node: Any) -> Any:
    """A copy of a tree, so that nobody else's mapping is changed and no two places share one."""
    if isinstance(node, Mapping):
        return {str(key): _writable(child) for key, child in node.items()}
    if isinstance(node, list | tuple):
        return [_writable(child) for child in node]
    return node


def _at(tree: Any, path: KeyPath) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _find_files(tree: dict[str, Any], folder: Path) -> None:
    for path in FILES:
        parent, found = _at(tree, path[:-1]), _at(tree, path)
        if isinstance(found, str) and found and not Path(found).exists() and (folder / found).exists():
            parent[path[-1]] = str(folder / found)


@dataclass
class _Reading:
    """One reading of a tree: the mistakes found so far, and where the environment stood."""

    label: str
    problems: list[tuple[KeyPath, str]] = field(default_factory=list)
    placeholders: dict[KeyPath, Placeholder] = field(default_factory=dict)
    unset: set[KeyPath] = field(default_factory=set)
    received: bool = False
    """Somebody else wrote it: nothing is taken from the environment."""

    def problem(self, path: KeyPath, text: str) -> None:
        if all(path != known for known, _ in self.problems):  # the first one about a place is the most telling
            self.problems.append((path, text))

    def put(self, tree: dict[str, Any], dotted: str, value: Any) -> None:
        """Puts an override into the tree. A wrong last key is found later, with the other unknown keys."""
        parts = dotted.split(".")
        node: Any = tree
        for depth, part in enumerate(parts):
            key: Any = part
            path, is_last = tuple(parts[:depth]), depth == len(parts) - 1
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                key = int(part)
            elif not isinstance(node, dict):
                found = type(node).__name__
                return self.problem(path, f"the override {dotted!r} leads through a {found}; expected a mapping")
            elif path in NAMED_COMPONENTS and key not in node and not is_last:
                return self.problem((*path, key), f"the override {dotted!r} names nothing. {did_you_mean(key, node)}")
            elif node.get(key) is None:
                node[key] = {}
            if is_last:
                node[key] = _override_value(value)
            node = node[key]

    def expand(self, node: Any, path: KeyPath) -> Any:
        """`node` with every `${NAME}` replaced; what was a secret is remembered."""
        if isinstance(node, dict):
            return {key: self.expand(child, (*path, key)) for key, child in node.items()}
        if isinstance(node, list):
            return [self.expand(child, (*path, position)) for position, child in enumerate(node)]
        if not is_text(node):
            return node
        if node.startswith("file://") and Path(node).suffix.lower() in PROMPT_FILES:
            self.problem(path, "NAT reads file:// references, finetune_nb does not. Put the text here")
        secrets: dict[str, str] = {}

        def value_of(match: re.Match[str]) -> str:
            name, default = match["name"], match["default"]
            if name is None:
                return "${"
            if self.received:
                return match[0] if default is None else default
            if name in os.environ:
                remember_secret(os.environ[name])
                if is_credential(name) or names_credential(path):
                    secrets[name] = os.environ[name]
                return os.environ[name]
            if default is None:
                self.unset.add(path)
                self.problem(
                    path,
                    f"the environment variable {name} is not set. Set it before Python starts "
                    f"(or os.environ[{name!r}] = ... in a cell), or give a default: ${{{name}:-...}}",
                )
            return default or ""

        value = _VARIABLE.sub(value_of, node)
        if any(match["name"] for match in _VARIABLE.finditer(node)):
            self.placeholders[path] = Placeholder(node, value, secrets)
        if names_credential(path):
            remember_secret(value)
        return value

    def leave_out_what_is_not_ours(self, tree: dict[str, Any]) -> None:
        for path, unset in NOT_OURS.items():
            parent = _at(tree, path[:-1])
            if isinstance(parent, dict) and path[-1] in parent and parent.pop(path[-1]) not in unset:
                self.problem(path, "NAT has this, finetune_nb does not. Take it out")
        for section in [key for key, value in tree.items() if value is None]:
            del tree[section]  # an empty section

    def config(self, tree: dict[str, Any]) -> Config:
        for path, kind in NAMED_COMPONENTS.items():
            section = _at(tree, path)
            if isinstance(section, dict):
                section.update({name: self.component(kind, raw, (*path, name)) for name, raw in section.items()})
        for path, kind in SINGLE_COMPONENTS.items():
            if _at(tree, path) is not None:
                _at(tree, path[:-1])[path[-1]] = self.component(kind, _at(tree, path), path)
        config = self.validated(Config, tree, ())
        for path, text in config.problems() if config is not None else ():
            self.problem(path, text)
        if self.problems or config is None:
            raise ConfigError(self.report())
        target = config.finetuning.target_model
        if target is not None and target not in config.llms:
            # Named as its adapter or its model is: `problems` has seen that a single llm is.
            config.finetuning.target_model = next(iter(config.llms_of_model(target)), target)
        plain_data(config, lambda path, node: self.note_value(path, node))
        config._placeholders = self.placeholders
        return config

    def note_value(self, path: KeyPath, node: Any) -> Any:
        """Keeps what a `${NAME}` became after validation, so that a later change of the field is noticed; remembers the
        credentials of components that were given ready-made."""
        if path in self.placeholders:
            written = self.placeholders[path]
            self.placeholders[path] = Placeholder(written.template, node, written.secrets)
        elif isinstance(node, SecretStr) or (is_text(node) and names_credential(path)):
            remember_secret(node.get_secret_value() if isinstance(node, SecretStr) else node)
        return node

    def component(self, kind: str, raw: Any, path: KeyPath) -> TypedBaseModel:
        """The component's config; where it is wrong an empty one in its place, so that the rest can be checked."""
        instead = KINDS[kind].model_construct()
        if isinstance(raw, KINDS[kind]):
            return raw
        if not isinstance(raw, dict):
            self.problem(path, f"found a {type(raw).__name__}; expected a mapping with a _type")
            return instead
        type_name = raw.get("_type", raw.get("type"))
        if not isinstance(type_name, str):
            self.problem(path, f"has no _type. {did_you_mean('', type_names(kind))}")
            return instead
        if type_name in TYPES_NOT_OURS.get(kind, ()):
            known = did_you_mean("", type_names(kind))
            self.problem((*path, "_type"), f"NAT has {kind} {type_name!r}, finetune_nb does not. {known}")
            return instead
        try:
            model = config_class(kind, type_name)
        except ConfigError as error:
            self.problem((*path, "_type"), str(error))
            return instead
        return self.validated(model, raw, path) or instead

    def validated(self, model: type[Any], raw: dict[str, Any], path: KeyPath) -> Any:
        """The model, or None with the mistakes noted: misspelt keys first, then wrong values."""
        for key_path, known in unknown_keys(model, raw, path):
            self.problem(key_path, f"this key is not known. {did_you_mean(str(key_path[-1]), known)}")
        errors: list[Any] = []
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False)
        for error in errors:
            where = (*path, *error["loc"])
            if where not in self.unset:
                self.problem(where, self.sentence(error, where))
        return None

    def sentence(self, error: Any, path: KeyPath) -> str:
        """A pydantic error in our words, without a secret."""
        if error["type"] == "missing":
            return "is required"
        text, found = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, "), error["input"]
        text = text.rstrip(".")
        if names_credential(path) or any(path[: len(known)] == known for known in self.placeholders):
            hidden = str(found)
            return f"{text.replace(hidden, MASK) if hidden else text} (found {MASK})"
        if found is None or isinstance(found, str | int | float):
            return f"{text} (found {redact_text(repr(found))[:100]})"
        return text if isinstance(found, BaseModel | dict) else f"{text} (found a {type(found).__name__})"

    def report(self) -> str:
        lines = [f"{'.'.join(map(str, path))}: {text.rstrip('.')}." for path, text in self.problems]
        lines = [line.removeprefix(": ") for line in lines]
        listed = lines[0] if len(lines) == 1 else f"{len(lines)} mistakes\n" + "\n".join(f"  {line}" for line in lines)
        return redact_text(f"{self.label}: {listed}")


def _override_value(value: Any) -> Any:
    """A string read as a YAML scalar, list or mapping in brackets; one that is none of these stays as it is."""
    if not isinstance(value, str):
        return _writable(value)
    try:
        read = read_yaml(value, "override")
    except ConfigError:
        return value
    return value if isinstance(read, dict | list) and value.lstrip()[:1] not in ("{", "[") else read


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
