"""Keeps the environment's proxies away from calls to this machine."""

from __future__ import annotations

import os

__all__ = [
    "bypass_proxies",
]

OURS = ("127.0.0.1", "localhost")


def bypass_proxies() -> None:
    """Adds this machine to NO_PROXY and no_proxy, if the environment names a proxy and does not except it yet.

    Every client library reads these variables, and so do the processes that an agent starts. What is in them is kept.
    Where only one of the two is set, the other gets its hosts too, for some libraries read only one of them. Nothing is
    taken out again while the process runs: the server that is called lives as long.
    """
    if not any(_names_a_proxy(name) and value for name, value in os.environ.items()):
        return
    upper, lower = os.environ.get("NO_PROXY", ""), os.environ.get("no_proxy", "")
    for name, own, other in (("NO_PROXY", upper, lower), ("no_proxy", lower, upper)):
        wanted = _with_ours(own or other)
        if wanted != own:
            os.environ[name] = wanted


def _names_a_proxy(variable: str) -> bool:
    name = variable.lower()
    return name.endswith("_proxy") and name != "no_proxy"


def _with_ours(hosts: str) -> str:
    listed = [host.strip() for host in hosts.split(",") if host.strip()]
    if listed == ["*"]:  # no proxy at all; beside other hosts a star means nothing to some libraries
        return hosts
    missing = [host for host in OURS if host not in listed]
    if not missing:
        return hosts
    return ",".join([*listed, *missing])
