"""Which rollout sends on a connection: async clients write to their transports in the context of the code that asks.

A client that is made once writes the key and the address of one rollout, whoever uses it; who does is seen here. Only
connections to a server of ours are watched, and only those of asyncio's own event loops: a thread's sockets, and other
implementations of event loops, do not show who writes.
"""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakSet, WeakValueDictionary, ref

from .call_recorder import current_episode

__all__ = [
    "sender_on",
    "watch_connections",
]


class _Sender:
    """Who wrote last on one connection."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport, self.loop = ref(transport), ref(asyncio.get_running_loop())
        self.rollout: int | None = None

    def write(self, data: Any) -> None:
        self._note()
        transport = self.transport()
        if transport is not None:
            type(transport).write(transport, data)

    def writelines(self, parts: Any) -> None:
        self._note()
        transport = self.transport()
        if transport is not None:
            type(transport).writelines(transport, parts)

    def _note(self) -> None:
        # asyncio does not check it: whether the answer is then read, or the reader fails, would depend on who is faster.
        if asyncio.get_running_loop() is not self.loop():
            raise RuntimeError("a client's connection was opened on a different event loop")
        episode = current_episode()
        self.rollout = None if episode is None else episode.number


_senders: WeakValueDictionary[tuple[int, int], _Sender] = WeakValueDictionary()
"""By the server's port and the client's."""
_watched: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
_ports: set[int] = set()


def watch_connections(port: int) -> None:
    """Watches what connections to that port of this machine the running event loop opens, if one runs here."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    _ports.add(port)
    if loop in _watched:
        return
    _watched.add(loop)
    connect = loop.create_connection

    async def create_connection(*args: Any, **options: Any) -> Any:
        transport, protocol = await connect(*args, **options)
        _watch(transport)
        return transport, protocol

    try:
        setattr(loop, "create_connection", create_connection)  # noqa: B010  # a method, which it replaces
    except AttributeError:  # a loop that is not written in Python
        pass


def _watch(transport: Any) -> None:
    peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if not isinstance(peer, tuple) or not isinstance(own, tuple):
        return
    if peer[0] != "127.0.0.1" or peer[1] not in _ports:
        return
    sender = _Sender(transport)
    try:
        transport.write, transport.writelines = sender.write, sender.writelines
    except AttributeError:
        return
    _senders[peer[1], own[1]] = sender


def sender_on(port: int, client_port: int) -> int | None:
    """The number of the rollout that wrote last on a connection.

    Args:
        port: The server's.
        client_port: The other end's.

    Returns:
        None where no rollout did, or where it is not known.
    """
    sender = _senders.get((port, client_port))
    transport = None if sender is None else sender.transport()
    if sender is None or transport is None or transport.is_closing():  # another program may have that port by now
        return None
    return sender.rollout
