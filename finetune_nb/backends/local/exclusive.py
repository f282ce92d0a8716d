"""The one lock between sampling and training: whoever holds it is alone with the weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Exclusive"]


class Exclusive:
    """`with exclusive.hold():` alone with the weights, on `threads` torch threads (None: torch's own setting)."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, given_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """True once alone; False if `given_up()` became true while waiting, and then nothing is held."""
        while not (held := self._lock.acquire(timeout=0.05)):
            if given_up():
                break
        if not held:
            yield False
            return
        try:
            with _torch_threads(self.threads):
                yield True
        finally:
            self._lock.release()


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    # Also where nothing changes: a thread that never set a count has the machine's, not the one that was set elsewhere.
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
