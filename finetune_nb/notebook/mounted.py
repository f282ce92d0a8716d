"""The trajectory browser's widget: it carries messages between the page and the kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import traitlets

from ..views.html import Html
from .kernel import route_to_subshell
from .mount import OverHtml, module

__all__ = [
    "Mounted",
]


class Mounted(OverHtml):
    """One widget: `on_message` answers what its page asks."""

    _esm = module("browser.js")
    sheet = traitlets.Unicode(Path(__file__).with_name("browser.css").read_text("utf-8")).tag(sync=True)
    """The style sheet. The view adopts it in its shadow root; anywidget's own `_css` would be the whole page's."""

    def __init__(self, on_message: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__()
        self.on_msg(lambda _, content, buffers: on_message(content))

    def tell(self, content: Mapping[str, Any], buffers: Sequence[bytes] = ()) -> None:
        """Sends the page a message. May be called from any thread."""
        self.send(dict(content), list(buffers))
        route_to_subshell([self])  # or what the page asks next would wait for a busy cell

    def bundle(self, text: str, still: Html) -> dict[str, Any]:
        """What a cell shows, as text and as HTML: values by MIME type."""
        return self.over(text, still, self.model_id)

    def dispose(self) -> None:
        """Takes the view away wherever it is; the HTML comes back."""
        self.close()
        self.layout.close()
