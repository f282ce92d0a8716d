"""What a node of the cluster is like, as a process there sees it, and whether a run can work with it: the same versions of what
its objects are made of, a clock that agrees, room in /dev/shm for its object store.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ... import __version__
from ...errors import BackendError

__all__ = [
    "check_versions",
    "clock_warning",
    "look",
    "store_warning",
]

PACKAGES = ("torch", "transformers", "pydantic", "ray")
"""Objects of these go from process to process, or decide what is sampled."""
CLOCK_SECONDS = 5.0
"""Clocks that are further apart than this put the steps of a rollout into another order than they had."""
SHARED_MEMORY = "/dev/shm"


def look(ray: Any) -> dict[str, Any]:
    """The node of an actor that calls this. Plain data: a kernel with other versions must be able to read it."""
    return {
        "node": ray.get_runtime_context().get_node_id(),
        "host": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})",
        "shared_memory": _shared_memory(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Of each package that is installed, without what it was built for ("+cpu"): nodes may differ in that."""
    found = {"finetune_nb": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue  # a node whose rollouts do not need it
    return found


def _shared_memory() -> int | None:
    """Bytes that /dev/shm has, free or taken; None where there is no such folder."""
    try:
        there = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return there.f_frsize * there.f_blocks


def check_versions(who: str, seen: Mapping[str, Any], remedy: str = "") -> None:
    """Compares a process's packages with those of this one. What one of the two does not have is not compared.

    Args:
        who: What the error calls the process.
        seen: What `look` said there.
        remedy: What else helps.

    Raises:
        BackendError: They differ.
    """
    here, there = _versions(), seen.get("versions", seen)  # once these were all that was said
    differing = [name for name in here if there.get(name, here[name]) != here[name]]
    if differing:
        found = ", ".join(f"{name} {there[name]}" for name in differing)
        expected = ", ".join(f"{name} {here[name]}" for name in differing)
        raise BackendError(
            f"{who} on {seen.get('host', 'a node')} has {found}; expected {expected}, as here. Install the same versions on "
            f"all nodes, and start Ray there anew.{remedy}"
        )


def store_warning(seen: Mapping[str, Any], store: float) -> str | None:
    """What to say of a node whose object store does not fit into its /dev/shm.

    Args:
        seen: What `look` said there.
        store: Bytes of its object store.
    """
    found = seen["shared_memory"]
    if found is None or found >= store:
        return None
    return (
        f"found {found / 1e6:,.0f} MB in {SHARED_MEMORY} of {seen['host']}; expected at least {store / 1e6:,.0f} MB for its "
        "object store, which Ray keeps on a disk instead: weights take longer to go there. Start the node with more (Docker: "
        f"--shm-size={store / 1e9:.1f}g), or Ray with a smaller --object-store-memory."
    )


def clock_warning(seen: Mapping[str, Any], there: float, before: float, after: float) -> str | None:
    """What to say of a node whose clock is not that of this process.

    Args:
        seen: What `look` said there.
        there: What its clock said.
        before: This process's clock when that was asked.
        after: And when the answer came.
    """
    # The time that the answer took is no difference.
    ahead = max(there - after, 0.0) or min(there - before, 0.0)
    if abs(ahead) <= CLOCK_SECONDS:
        return None
    return (
        f"found the clock of {seen['host']} {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the clock here; expected "
        f"at most {CLOCK_SECONDS:g} s: recorded steps have the time of the node that they were made on. Synchronize the clocks "
        "of all nodes (chrony, for example)."
    )
