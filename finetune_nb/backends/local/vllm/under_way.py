"""Which requests of a server are under way, by the name of the model that they ask."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UnderWay"]


class UnderWay:
    """Counts requests. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def asking(self, name: str) -> Iterator[None]:
        """Inside, a request with that name is under way."""
        with self._lock:
            self._counts[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._counts[name] -= 1
                if not self._counts[name]:
                    del self._counts[name]

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._counts

    def __len__(self) -> int:
        with self._lock:
            return self._counts.total()
