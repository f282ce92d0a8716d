"""Importing packages that change others for the whole process: what they changed is put back.

Known of: the NeMo Agent Toolkit's ART plugin switches matplotlib to another backend, and openpipe-art puts a function of its
own into transformers that the current version calls otherwise. A notebook's plots and local models would be gone.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "undo_side_effects",
    "restore_transformers",
]


@contextmanager
def undo_side_effects() -> Iterator[None]:
    """What this thread imports inside changes no other package."""
    import matplotlib

    this, use = threading.current_thread(), matplotlib.use

    def kept(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is not this:
            use(*args, **kwargs)

    matplotlib.use = kept
    try:
        yield
    finally:
        matplotlib.use = use
        restore_transformers()


def restore_transformers() -> None:
    """Takes openpipe-art's function out of transformers again, where transformers calls it with other arguments."""
    patches: Any = sys.modules.get("art.transformers.patches")
    masks: Any = sys.modules.get("transformers.masking_utils")
    if patches is None or masks is None:
        return
    theirs, original = patches._patched_preprocess_mask_arguments, patches._preprocess_mask_arguments
    fits = list(inspect.signature(theirs).parameters) == list(inspect.signature(original).parameters)[:7]
    if masks._preprocess_mask_arguments is theirs and not fits:
        masks._preprocess_mask_arguments = original
