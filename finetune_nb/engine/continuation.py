"""What must be the same when a run is continued, and what has changed: ready components by their class; settings, functions
and rows as entries of the journal."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..components.builder import Builder
from ..components.registry import PythonEvaluatorConfig
from ..config.sections import Config
from ..errors import ConfigError, RunError
from ..rewards.evaluators import reward_name_of, weighted_reward
from ..text import as_json, text_of
from ..types import Change

__all__ = [
    "ARGUMENTS",
    "changes_since",
    "class_name",
    "fingerprints",
    "given_components",
    "recorded_components",
    "require_components",
    "reward_digest",
]

ARGUMENTS = {"trajectory_builder": "builder", "trainer_adapter": "adapter", "trainer": "trainer"}
"""Kinds of components that have a state of their own, and what `Run` calls them."""
RESUME = "resume"
"""The source of a Change that was found when the run was continued."""
_ELSEWHERE = (
    "finetuning.output_dir",
    "finetuning.run_configuration.config_file",
    "run.num_epochs",
    "finetuning.num_epochs",
)
"""Settings that may differ without changing what is trained."""


def class_name(component: Any) -> str:
    """The class of a component, as its module and name."""
    return f"{type(component).__module__}.{type(component).__qualname__}"


def recorded_components(state: Mapping[str, Any]) -> dict[str, str]:
    """The classes of the components that a run was given as objects, by kind, as its record has them.

    Args:
        state: What resuming after an epoch needs. It may be of somebody else's folder.
    """
    found = state.get("components")
    if not isinstance(found, Mapping):
        return {}
    return {kind: str(name) for kind, name in found.items() if kind in ARGUMENTS}


def given_components(components: Builder) -> dict[str, str]:
    """The classes of the components that a run was given as objects, by kind."""
    return {kind: class_name(component) for kind, _, component in components.added() if kind in ARGUMENTS}


def require_components(recorded: Mapping[str, str], found: Mapping[str, Any], run_id: str) -> None:
    """Check that a run is continued with components of the classes that it had.

    Args:
        recorded: The classes of those that it was given as objects, by kind.
        found: The components that it has now, by kind, given or made from its config.
        run_id: The run's id.

    Raises:
        RunError: One is of another class.
    """
    for kind, name in recorded.items():
        # A class of a notebook is in `__main__`, and may have moved into a module since: its name decides.
        if name.rpartition(".")[2] in [each.__name__ for each in type(found[kind]).__mro__]:
            continue
        argument = ARGUMENTS[kind]
        article = "an" if argument == "adapter" else "a"
        raise RunError(
            f"run {run_id!r} was made with {article} {argument} of its own, a {name}; found {class_name(found[kind])}. Another "
            f"one would change what is collected or trained without a word. Pass {argument}=... of that class to Run(...), "
            "Run.open or fork; the run can be read as it is."
        )


def fingerprints(components: Builder) -> dict[str, str]:
    """Digests of the functions and rows that a run was given, by name; those that have no source are left out."""
    found: dict[str, str] = {}
    for kind, name, component in components.added():
        if kind in ("function", "evaluator"):
            source = _source_of(component)
            if source is not None:
                found[f"{kind}.{name}"] = _digest([source])
        elif kind == "dataset":
            found[f"dataset.{name}"] = _digest(map(as_json, component))
    if components.environment is not None:
        found["environment"] = _digest([components.environment.fingerprint])
    return found


def reward_digest(config: Config, known: Mapping[str, str]) -> str | None:
    """A digest of what a run's reward is made of: its functions and the weights in its config.

    Args:
        config: The run's config.
        known: The digests of its functions, as `fingerprints` makes them.

    Returns:
        None where the reward has no source that could be compared.
    """
    try:
        name = reward_name_of(config)
    except ConfigError:
        return None
    weighted = weighted_reward(config)
    if weighted is None:
        section = config.eval.evaluators[name]
        if isinstance(section, PythonEvaluatorConfig):
            return known.get(f"evaluator.{name}")
        return _digest([as_json(section.model_dump(mode="json"))])
    parts = [f"{part} {weight} {known.get(f'evaluator.{part}')}" for part, weight in weighted.weights.items()]
    return _digest(parts)


def changes_since(
    written: Mapping[str, Any],
    now: Mapping[str, Any],
    before: Mapping[str, str],
    digests: Mapping[str, str],
    journal: Sequence[Change],
    epoch: int,
) -> list[Change]:
    """Find what differs from the record when a run is continued.

    Args:
        written: The config in the run's folder, as plain data.
        now: The config with which it is continued, as plain data.
        before: The digests of functions and rows when its last epoch was recorded.
        digests: Those of now.
        journal: What has been changed so far, earlier continuations among it.
        epoch: The epoch that comes next.

    Returns:
        A Change for each difference, with the source "resume".
    """
    known = {**dict(_leaves(written)), **before}
    for change in journal:
        if change.source == RESUME and change.field in known:
            known[change.field] = change.new
    found = []
    for field, value in {**dict(_leaves(now)), **digests}.items():
        # A field that the folder does not have is newer than the folder, and has its default.
        if field in known and known[field] != value and field not in _ELSEWHERE:
            found.append(Change(time.time(), RESUME, field, known[field], value, epoch))
    return found


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a config that is no mapping."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _source_of(function: Callable[..., Any]) -> str | None:
    function = inspect.unwrap(function)
    fingerprint = getattr(function, "fingerprint", None)
    if isinstance(fingerprint, str):
        return fingerprint
    try:
        return inspect.getsource(function if inspect.isroutine(function) else type(function))
    except Exception:  # made by exec, or by C: then by its code, if it has any
        code = getattr(function, "__code__", None)
        return None if code is None else text_of((code.co_code, code.co_consts))


def _digest(texts: Iterator[str] | Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "replace") + b"\n")
    return digest.hexdigest()[:12]
