"""A widget whose view mounts itself on static HTML.

The cell's output has text and HTML only, so a notebook that is opened later, by whomever and wherever, shows the HTML. While
the kernel lives, the page's side of the widget finds the HTML by a random id, asks the kernel whether it is there, and puts the
view over it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from ..views.html import Html, element
from .kernel import route_to_subshell
from .mount import WIDGET, mounts_itself

__all__ = [
    "Mounted",
]

_HERE = Path(__file__).parent


class Mounted(anywidget.AnyWidget):
    """One widget: `on_message` answers what its page asks."""

    # As text: with a Path, anywidget 0.11 keeps every instance alive for ever.
    _esm = (_HERE / "browser.js").read_text("utf-8")
    sheet = traitlets.Unicode((_HERE / "browser.css").read_text("utf-8")).tag(sync=True)
    """The style sheet. The view adopts it in its shadow root; anywidget's own `_css` would be the whole page's."""
    mount = traitlets.Unicode("").tag(sync=True)
    """The id of the HTML that the view is put over."""

    def __init__(self, on_message: Callable[[Mapping[str, Any]], None]) -> None:
        # Both are set before the page hears of the widget: it looks for the HTML at once.
        mount = secrets.token_hex(16)
        super().__init__(model_id=mount, mount=mount)
        self.on_msg(lambda _, content, buffers: on_message(content))

    def tell(self, content: Mapping[str, Any], buffers: Sequence[bytes] = ()) -> None:
        """Sends the page a message. May be called from any thread."""
        self.send(dict(content), list(buffers))
        route_to_subshell([self])  # or what the page asks next would wait for a busy cell

    def bundle(self, text: str, still: Html) -> dict[str, Any]:
        """What a cell shows.

        Args:
            text: It as plain text.
            still: It as HTML, without the widget.

        Returns:
            Values by mime type.
        """
        found: dict[str, Any] = {"text/plain": text, "text/html": str(element("div", still, data_ftb=self.mount))}
        if not mounts_itself():
            found[WIDGET] = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return found

    def dispose(self) -> None:
        """Takes the view away wherever it is; the HTML comes back."""
        self.close()
        self.layout.close()
