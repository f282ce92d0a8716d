"""What the garbage collector does while an epoch runs.

An epoch holds hundreds of rollouts at once. What they make sets off full collections, each of which visits all that the process
holds: 440,000 objects and 0.3 s of CPU where Torch and Transformers are loaded. So what was there before the epoch is set aside
until the epoch ends, and a full collection visits only what is new.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "older_objects_set_aside",
]

PART_OF_TIME = 1 / 100
"""At most this goes into the full collections with which epochs begin: what became garbage since the last one, such as what was
left of an epoch, would otherwise be set aside with the rest."""
IMMORTAL = 2000
"""Objects that Python 3.12 sets aside by itself are fewer; gc.freeze in the barest of interpreters sets aside 5,000."""
_lock = threading.Lock()
_inside = 0
_ours = False
_due = 0.0
"""When the next full collection may be, by time.monotonic."""


@contextmanager
def older_objects_set_aside() -> Iterator[None]:
    """The collector leaves alone what was there before; at the end it looks once at what is new. Nothing changes where
    somebody has switched the collector off, or has set objects aside with gc.freeze. Several may be open at once."""
    global _inside, _ours
    with _lock:
        if not _inside:
            _ours = gc.isenabled() and gc.get_freeze_count() < IMMORTAL
            if _ours:
                _set_aside()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _ours and not _inside:
                gc.collect()
                gc.unfreeze()


def _set_aside() -> None:
    global _due
    began = time.monotonic()
    if began >= _due:
        gc.collect()
        ended = time.monotonic()
        _due = ended + (ended - began) / PART_OF_TIME
    gc.freeze()
