"""YAML text to plain data and back. Reads YAML 1.2 (so that 1e-5 is a number) with a safe loader, and refuses what a
config never needs: tags, duplicate keys, several documents, anchors that expand to something huge.

Errors name a line and never quote it, because a config's lines may hold secrets.
"""

from __future__ import annotations

import io
import re
from typing import Any

from ..errors import ConfigError

__all__ = [
    "dump_yaml",
    "read_yaml",
]

MAX_CHARACTERS = 1_000_000
MAX_NODES = 100_000
"""After every alias is replaced by what it refers to."""
MAX_DEPTH = 50


def read_yaml(text: str, label: str) -> Any:
    """Parse `text` as YAML. Raises ConfigError, which begins with `label`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{label}: {len(text)} characters of YAML; expected at most {MAX_CHARACTERS}.")
    problem = ""
    try:
        _check_size(text, label)
        return YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        # The library's message quotes both values.
        key = re.match(r'found duplicate key "([^"\n]*)"', error.problem or "")
        problem = f"the key {key[1] if key else ''!r} occurs twice{_line(error)}. Keep one of them"
    except MarkedYAMLError as error:
        problem = f"not valid YAML: {_spoken(error)}{_line(error)}"
    except (YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        problem = f"not valid YAML: a character or a value that YAML does not allow ({type(error).__name__})"
    # Outside the except block: the library's error, as context of ours, would quote the line.
    raise ConfigError(f"{label}: {problem}.")


def _spoken(error: Any) -> str:
    problem = str(error.problem or error.context or "it cannot be read")
    if "could not determine a constructor for the tag" in problem:
        tag = re.search(r"tag:?\s*['\"]?([^'\"\s]+)", problem)
        return f"the tag {tag[1] if tag else ''!r} is not allowed; a config holds plain values only"
    if problem.startswith("but "):  # half a sentence, which the context begins
        problem = f"{error.context}, {problem}"
    return problem.splitlines()[0]


def _line(error: Any) -> str:
    mark = error.problem_mark or error.context_mark
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""


def _check_size(text: str, label: str) -> None:
    """Counts the nodes as if every alias were written out, before anything is built from them."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, NodeEvent, ScalarEvent

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor of each open mapping or list, and its size so far
    for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
        if isinstance(event, AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_nodes}:
                raise ConfigError(f"{label}: the anchor {event.anchor!r} contains itself.")
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, ScalarEvent):
            size = 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, NodeEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise ConfigError(f"{label}: mappings or lists stand more than {MAX_DEPTH} deep in each other.")
            continue
        elif type(event).__name__ in ("MappingEndEvent", "SequenceEndEvent"):
            anchor, size = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = size
        else:
            continue
        if open_nodes:
            anchor, so_far = open_nodes[-1]
            open_nodes[-1] = (anchor, so_far + size)
            size += so_far
        if size > MAX_NODES:
            raise ConfigError(f"{label}: the anchors expand to more than {MAX_NODES} values. Write fewer aliases.")


def dump_yaml(data: Any) -> str:
    """Plain data (dicts, lists, scalars) as YAML, in its own order."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.width = 120
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()
