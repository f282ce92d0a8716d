"""What a panel leaves in a saved notebook, and shows where nobody sees widgets: the run as it was, as HTML with a picture.

The picture is a PNG, which is seen also where styles and drawings are taken out of a stored notebook.
"""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .html import Html, element, image, view
from .kernel import word_of_absence
from .redaction import redact_text
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
        self._png: bytes | None = None
        body = [Html(run_html(**where))]
        if doing.notice and not doing.error:
            body.append(view(doing.notice, styled=False))
        if doing.epochs:
            from .plots import plot_rewards

            figure: Any = plot_rewards(SimpleNamespace(id=doing.name, records=doing.epochs, changes=helm.run.changes))
            self._png = picture = figure.png(DPI)
            body.append(image(picture, redact_text(figure.alt_text), round(96 * figure.get_figwidth())))
        if absent := word_of_absence():
            body.append(view(element("div", absent, class_="ft-dim"), styled=False))
        self._html = element("div", *body)

    def __repr__(self) -> str:
        return self._text

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        found = {"text/plain": self._text, "text/html": self._html}
        return {**found, "image/png": base64.b64encode(self._png).decode("ascii")} if self._png else found
