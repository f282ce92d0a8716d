"""What a panel leaves in a saved notebook, and shows where nobody sees widgets: the run as it was, as HTML and as a picture."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .html import Html, element, view
from .kernel import word_of_absence
from .live_curve import reward_curve
from .panel_html import style_html
from .types import Epoch
from .viewer import run_html, run_text

if TYPE_CHECKING:
    from .panel import Helm

__all__ = ["Still"]

DPI = 120
"""Of the picture: a run may be shown in many cells."""


class Still:
    """A panel without widgets: the run as it was when this was made."""

    def __init__(self, helm: Helm) -> None:
        doing = helm.doing()
        where = {"name": doing.name, "state": doing.state, "epochs": doing.epochs, "error": doing.error}
        self._text = run_text(**where)
        body = [
            Html(run_html(**where)),
            Html(style_html()),
            view(reward_curve(doing.epochs, helm.run.changes), styled=False),
        ]
        if doing.notice and not doing.error:
            body.insert(1, view(element("div", doing.notice, class_="ft-banner"), styled=False))
        if absent := word_of_absence():
            body.append(view(element("div", absent, class_="ft-dim"), styled=False))
        self._html = element("div", *body)
        self._png = _picture(doing.epochs)

    def __repr__(self) -> str:
        return self._text

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        found = {"text/plain": self._text, "text/html": self._html}
        return {**found, "image/png": self._png} if self._png else found


def _picture(epochs: Sequence[Epoch]) -> str | None:
    """The reward curve as PNG, base64; None without an epoch."""
    if not epochs:
        return None
    from .plots import plot_rewards

    return base64.b64encode(plot_rewards(epochs).png(DPI)).decode("ascii")  # type: ignore[union-attr]
