"""Widgets whose views mount themselves on static HTML.

The output of a cell holds text and HTML only, so a notebook that is opened later, by whomever and wherever, shows the HTML
instead of an error. While the kernel lives, the page's side of a small widget finds the HTML by a random id, asks the kernel
whether it is there, and puts the view over it.
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
    "Mount",
    "OverHtml",
    "module",
]


WIDGET = "application/vnd.jupyter.widget-view+json"
"""The MIME type of an output that shows a widget."""
_HERE = Path(__file__).parent


def module(*names: str) -> str:
    """The text of a widget's module: what mounts it, then files of this folder. A module of anywidget can import nothing.

    Args:
        *names: Of the files, in order.
    """
    # As text: with a Path, anywidget 0.11 keeps every instance alive for ever.
    return "\n".join((_HERE / name).read_text("utf-8") for name in ("mount.js", *names))


class OverHtml(anywidget.AnyWidget):
    """A widget whose view is put over HTML. Whoever derives from it answers the page's question "ready".

    Args:
        **traits: Of the widget, set before the page hears of it.
    """

    mount = traitlets.Unicode("").tag(sync=True)
    """The id of the HTML."""

    def __init__(self, **traits: Any) -> None:
        # The page looks for the HTML as soon as it hears of the widget.
        mount = secrets.token_hex(16)
        super().__init__(model_id=mount, mount=mount, **traits)

    def over(self, text: str, still: Html, model_id: str) -> dict[str, Any]:
        """What a cell shows.

        Args:
            text: It as plain text.
            still: It as HTML, without the widget.
            model_id: Of the widget that shows it.

        Returns:
            Values by MIME type.
        """
        html = element("div", element("div", still), data_ft_mount=self.mount)
        found: dict[str, Any] = {"text/plain": text, "text/html": str(html)}
        if not _mounts_itself():
            found[WIDGET] = {"version_major": 2, "version_minor": 0, "model_id": model_id}
        return found


def _mounts_itself() -> bool:
    """Whether the front end makes the page's side of a widget that is not displayed, as JupyterLab and Notebook do. Colab and
    VS Code make it only for a widget that an output shows."""
    in_vs_code = "VSCODE_PID" in os.environ or "VSCODE_CWD" in os.environ
    return "google.colab" not in sys.modules and not in_vs_code


class Mount(OverHtml):
    """Puts the view of another widget over HTML.

    Args:
        view: The widget.
        again: The line of Python that brings the view back after the kernel has ended.
    """

    _esm = module("panel.js")
    view = traitlets.Unicode("").tag(sync=True)
    """The id of the widget's model."""
    again = traitlets.Unicode("").tag(sync=True)

    def __init__(self, view: Any, again: str) -> None:
        super().__init__(view=view.model_id, again=again)
        self.on_msg(Mount._answer)

    def _answer(self, content: Any, buffers: Any) -> None:
        if isinstance(content, dict) and "id" in content:
            self.send({"id": content["id"]})
            route_to_subshell([self])
