"""Widgets that mount themselves on static HTML.

The output of a cell holds text and HTML only, so a notebook that is opened later, by whomever and wherever, shows the HTML
instead of an error. While the kernel lives, the page's side of a small widget finds the HTML by a random id, asks the kernel
whether it is there, and puts the widgets over it.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from ..views.html import Html, element
from .kernel import route_to_subshell

__all__ = [
    "WIDGET",
    "Mount",
    "mounts_itself",
]


WIDGET = "application/vnd.jupyter.widget-view+json"
"""The MIME type of an output that shows a widget."""


def mounts_itself() -> bool:
    """Whether the front end makes the page's side of a widget that is not displayed, as JupyterLab and Notebook do. Colab and
    VS Code make it only for a widget that an output shows."""
    in_vs_code = "VSCODE_PID" in os.environ or "VSCODE_CWD" in os.environ
    return "google.colab" not in sys.modules and not in_vs_code


class Mount(anywidget.AnyWidget):
    """Puts the view of a widget over HTML.

    Args:
        view: The widget.
        again: The line of Python that brings the view back after the kernel has ended.
    """

    # As text: with a Path, anywidget 0.11 keeps every instance alive for ever.
    _esm = Path(__file__).with_suffix(".js").read_text("utf-8")
    mount = traitlets.Unicode("").tag(sync=True)
    """The id of the HTML."""
    view = traitlets.Unicode("").tag(sync=True)
    """The id of the widget's model."""
    again = traitlets.Unicode("").tag(sync=True)

    def __init__(self, view: Any, again: str) -> None:
        # All are set before the page hears of the widget: it looks for the HTML at once.
        mount = secrets.token_hex(16)
        super().__init__(model_id=mount, mount=mount, view=view.model_id, again=again)
        self.on_msg(Mount._answer)

    def _answer(self, content: Any, buffers: Any) -> None:
        if isinstance(content, dict) and "id" in content:
            self.send({"id": content["id"]})
            route_to_subshell([self])

    def over(self, still: Html) -> Html:
        """The HTML for a cell's output, which the view is put over."""
        return element("div", element("div", still), data_ft_mount=self.mount)
