"""Figure: a matplotlib figure that shows itself in a notebook, with a text for those who do not see it; and the themes.

No pyplot, no backend, no rcParams: nothing outlives the figure, any thread may make one, and the user's own plots stay as
they are. Imports matplotlib, so it is imported where a figure is made.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib.figure
from matplotlib.axes import Axes

from .errors import ConfigError

__all__ = ["THEMES", "Figure", "Theme", "theme_named"]

DPI = 192
"""Pixels an inch in the PNG: twice those of the screen, so that it is sharp on every display."""


@dataclass(frozen=True)
class Theme:
    """What a figure is drawn with. The colours are petroff10's (arXiv 2107.02270, made to be told apart also by the
    colour-blind), lightened where they would vanish on the background; a line style or a marker always says the same."""

    background: str
    ink: str
    """Text, axes."""
    faint: str
    """Grid, and whatever is only context."""
    colours: tuple[str, ...]
    sequence: tuple[str, str, str]
    """From low to high, of values that have an order."""


THEMES = {
    "light": Theme("#ffffff", "#24292f", "#d0d4d9", ("#3f90da", "#d95f02", "#832db6", "#717581", "#a96b59", "#bd1f01"),
                   ("#d9c66f", "#3f90da", "#1d2a6b")),
    "dark": Theme("#111111", "#e6e6e6", "#3a3d42", ("#5aa9f0", "#ffa90e", "#c58be8", "#94a4a2", "#c98b79", "#ff6f52"),
                  ("#4a4020", "#3f90da", "#cfe8ff")),
    # No background, and colours of middle lightness: at least 3:1 in contrast on white and on near-black alike.
    "": Theme("none", "#767b82", "#8a8f9640", ("#3f90da", "#dd6b10", "#a65fd0", "#7d838c", "#a96b59", "#d6452b"),
              ("#b9a24a", "#3f90da", "#6f4fc0")),
}  # fmt: skip


def theme_named(name: Literal["light", "dark"] | None) -> Theme:
    """The theme of that name; None: one that reads well on light and dark alike, without a background of its own."""
    if (name or "") not in THEMES:
        raise ConfigError(f"found theme {name!r}; expected 'light', 'dark' or None for one that suits both")
    return THEMES[name or ""]


class Figure(matplotlib.figure.Figure):
    """A figure that a cell shows as PNG. `alt_text` says what there is to see; `.axes` are its Axes."""

    def __init__(self, *, width: float = 6.4, height: float = 3.4, theme: Theme = THEMES[""], **options: Any) -> None:
        """`width` and `height` in inches; on the screen an inch is 96 pixels."""
        super().__init__(figsize=(width, height), layout="constrained", facecolor=theme.background, **options)
        self.theme = theme
        self.alt_text = ""

    def add_axes_of_theme(self) -> Axes:
        """One Axes in the theme's colours."""
        return styled(self.add_subplot(), self.theme)

    def png(self) -> bytes:
        """The picture, in its own background."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI, facecolor=self.get_facecolor(), edgecolor="none")
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = (round(96 * float(inches)) for inches in self.get_size_inches())
        picture = base64.b64encode(self.png()).decode("ascii")
        about = {"width": width, "height": height, "alt": self.alt_text}
        return {"image/png": picture, "text/plain": self.alt_text or repr(self)}, {"image/png": about}


def styled(ax: Axes, theme: Theme) -> Axes:
    """Gives the Axes the theme's colours: no box, a faint grid behind the data."""
    ax.set_facecolor(theme.background)
    ax.grid(True, color=theme.faint, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(colors=theme.ink, labelcolor=theme.ink, length=3)
    ax.xaxis.label.set_color(theme.ink)
    ax.yaxis.label.set_color(theme.ink)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
        spine.set_linewidth(0.8)
    return ax
