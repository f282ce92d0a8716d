"""One example over the epochs: its groups, and what its rollouts replied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..hooks import shown_by

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ExampleHistory",
]


@dataclass(frozen=True, eq=False)
class ExampleHistory:
    """One example over the epochs; displays itself in a cell."""

    example: Any
    groups: pd.DataFrame
    """One row an epoch that drew it, as in `run.groups()`."""
    rollouts: pd.DataFrame
    """One row a rollout, as in `run.trajectories()`."""

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        return shown_by("finetune_nb.views.example_history:history_text", self)

    def _repr_html_(self) -> str:
        return shown_by("finetune_nb.views.example_history:history_html", self)
