"""`Run`: the notebook's handle on a finetuning run."""

from .run import Run

__all__ = ["Run"]
