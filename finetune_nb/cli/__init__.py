"""The command line: `finetune-nb`, `python -m finetune_nb`."""

from .main import main

__all__ = ["main"]
