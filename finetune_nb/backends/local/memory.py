"""Memory of training: what running out of it looks like on each kind of device, how large a micro-batch would fit, and what
is given back between jobs.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable

import torch

__all__ = [
    "trim_heap",
    "largest_that_fits",
    "ran_out",
]

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
"""Of CUDA and MPS, and of torch's CPU allocator on Linux and Windows, in lower case."""


def ran_out(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def largest_that_fits(rows: int, attempt: Callable[[int], None]) -> int:
    """Halves `rows` until `attempt(rows)` no longer runs out of memory, and returns them; 0 if not even one row fits.

    attempt: does the work of that many rows, and throws the result away.
    """
    while rows := rows // 2:
        free_device_memory()
        try:
            attempt(rows)
        except Exception as error:
            if not ran_out(error):
                raise
        else:
            break
    free_device_memory()
    return rows


def trim_heap() -> None:
    """Returns to the system what has been freed. glibc keeps it for the thread that freed it, and every job has a thread of
    its own: without this a process grew by a gigabyte an epoch (measured with SmolLM2-135M). Nothing elsewhere."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


def free_device_memory() -> None:
    """Gives back what a failed pass has left: tensors in the frames of its error, and the device's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
