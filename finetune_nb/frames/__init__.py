"""Turns records into tidy DataFrames, one function per kind of row.

Pure functions of a sequence of Epochs. Missing is NaN (<NA> in integer columns), never 0; failed rollouts have rows.
Columns and dtypes are the same even without any epoch; only score_*, train_*, seconds_* and validation_score_* columns
depend on the data. Join rows on `epoch` and `example`, or on `trajectory`. Works with pandas 2.2 and 3.
"""

from __future__ import annotations

from .epochs import epochs, groups, journal
from .examples import examples
from .labels import labels
from .messages import messages, tokens
from .trajectories import is_example, trajectories

__all__ = ["epochs", "examples", "groups", "is_example", "journal", "labels", "messages", "tokens", "trajectories"]
