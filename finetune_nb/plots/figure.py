"""A matplotlib figure that displays itself in a notebook, with an alternative text; and the themes.

No pyplot, no backend, no rcParams: no global state is left, any thread may make a figure, and the user's own plots are not
affected. Importing this module imports matplotlib.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Literal

import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.text import Text

from ..errors import ConfigError

__all__ = [
    "Figure",
    "THEMES",
    "drawable",
    "fonts",
    "Theme",
    "legend_above",
    "styled",
    "theme_named",
]

DPI = 192
"""Pixels per inch in the PNG: twice those of the screen, so that it is sharp on every display."""


@dataclass(frozen=True)
class Theme:
    """The colours of a figure.

    They are those of petroff10 (arXiv 2107.02270, designed for colour-blind readers too), lightened where contrast with the
    background would be too low. Colour is never the only cue: a line style, a marker or a hatch always says the same.
    """

    background: str
    ink: str
    """Text and axes."""
    faint: str
    """The grid, and other context."""
    halo: str
    """Outline of a line that crosses coloured areas."""
    colours: tuple[str, ...]
    sequence: tuple[str, str, str]
    """For ordered values, from low to high."""

    def colour(self, place: int) -> str:
        """The colour of the run, score or reason at that position. Colours repeat if there are too few."""
        return self.colours[place % len(self.colours)]


THEMES = {
    "light": Theme(
        background="#ffffff",
        ink="#24292f",
        faint="#d0d4d9",
        halo="#ffffff",
        colours=("#3f90da", "#d95f02", "#832db6", "#717581", "#a96b59", "#bd1f01"),
        sequence=("#c9b458", "#3f90da", "#1d2a6b"),
    ),
    "dark": Theme(
        background="#111111",
        ink="#e6e6e6",
        faint="#3a3d42",
        halo="#111111",
        colours=("#5aa9f0", "#ffa90e", "#c58be8", "#94a4a2", "#c98b79", "#ff6f52"),
        sequence=("#7d6c34", "#3f90da", "#cfe8ff"),
    ),
}
THEMES[""] = THEMES["light"]
"""Without a name: what reads on every page is a picture with a background of its own."""


def theme_named(name: Literal["light", "dark"] | None) -> Theme:
    """The theme of that name. None: the light one, whose background makes it readable on dark pages too."""
    if (name or "") not in THEMES:
        raise ConfigError(f"found theme {name!r}; expected 'light', 'dark' or None for the light one")
    return THEMES[name or ""]


class Figure(matplotlib.figure.Figure):
    """A figure that a cell shows as PNG. `.alt_text` describes it in words; `.axes` are its Axes."""

    def __init__(self, *, width: float = 6.4, height: float = 3.4, theme: Theme = THEMES[""], **options: Any) -> None:
        """Make an empty figure.

        Args:
            width: In inches; on the screen an inch is 96 pixels.
            height: In inches.
            theme: Its colours.
            **options: As in matplotlib's Figure.
        """
        super().__init__(figsize=(width, height), layout="constrained", facecolor=theme.background, **options)
        self.theme = theme
        self.alt_text = ""

    def add_axes_of_theme(self) -> Axes:
        """Add one Axes in the theme's colours."""
        return styled(self.add_subplot(), self.theme)

    def png(self, dpi: float = DPI) -> bytes:
        """Draw the figure as PNG.

        Args:
            dpi: Pixels per inch.

        Returns:
            The PNG, with 256 colours: a quarter of the size, as a notebook stores every picture.
        """
        from PIL import Image

        families = fonts()
        if len(families) > 1:
            for text in self.findobj(Text):
                text.set_fontfamily(families)
        drawn, picture = io.BytesIO(), io.BytesIO()
        quick = {"compress_level": 1}
        self.savefig(drawn, format="png", dpi=dpi, facecolor=self.get_facecolor(), edgecolor="none", pil_kwargs=quick)
        full = Image.open(drawn)
        few = full.quantize(256)
        # Restore the exact background: quantizing turns white into 254, 254, 254.
        colours, corner = few.getpalette("RGBA") or [], (0, 0)
        at = 4 * few.getpixel(corner)  # type: ignore[operator]
        colours[at : at + 4] = full.getpixel(corner)  # type: ignore[call-overload]
        few.putpalette(colours, "RGBA")
        few.save(picture, "PNG", optimize=True)
        return picture.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = (round(96 * float(inches)) for inches in self.get_size_inches())
        picture = base64.b64encode(self.png()).decode("ascii")
        about = {"width": width, "height": height, "alt": self.alt_text}
        return {"image/png": picture, "text/plain": self.alt_text or repr(self)}, {"image/png": about}


# Fonts with the characters of many scripts, where they are installed.
_MORE_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR",
    "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari",
    "Noto Emoji", "Symbola", "Noto Sans Symbols2",
)  # fmt: skip


@cache
def fonts() -> list[str]:
    """The families in which texts are drawn: matplotlib's own, and those of _MORE_FONTS that are installed."""
    from matplotlib import font_manager, rcParams

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [*rcParams["font.family"], *(name for name in _MORE_FONTS if name in installed)]


@cache
def _drawable_characters() -> frozenset[int]:
    """The code points that one of the fonts has."""
    from matplotlib import font_manager

    found: set[int] = set()
    for name in fonts():
        found |= set(
            font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[name]))).get_charmap()
        )
    return frozenset(found)


def drawable(text: str) -> str:
    """A text in which characters that no font has are named by their code points, such as [U+6771 U+4EAC]; of more than four in
    a row, the first three. Joiners and variation selectors between them are left out."""
    known = _drawable_characters()
    parts: list[str] = []
    for is_known, characters in groupby(text, lambda character: ord(character) in known):
        if is_known:
            parts.append("".join(characters))
            continue
        codes = [f"U+{ord(character):04X}" for character in characters if character not in "\u200c\u200d\ufe0e\ufe0f"]
        if len(codes) > 4:
            codes[3:] = ["…"]
        parts.append(f"[{' '.join(codes)}]" if codes else "")
    return "".join(parts)


def styled(ax: Axes, theme: Theme) -> Axes:
    """Style the Axes with the theme: no box, and a faint grid below the data."""
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


def legend_above(ax: Axes, theme: Theme) -> None:
    """Add one legend for the Axes and its twins, above the plot rather than over the data."""
    handles, labels = [], []
    for each in ax.figure.axes:
        if each is ax or (each.bbox.bounds == ax.bbox.bounds and each.get_shared_x_axes().joined(each, ax)):
            found = each.get_legend_handles_labels()
            handles += found[0]
            labels += found[1]
    if not handles:
        return
    legend = ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=_columns(labels),
        frameon=False,
        fontsize="small",
        borderaxespad=0.2,
        columnspacing=1.4,
    )
    # A legend of many lines must not take the room of the data.
    lines = math.ceil(len(labels) / _columns(labels))
    if isinstance(ax.figure, Figure) and lines > 3:
        ax.figure.set_figheight(ax.figure.get_figheight() + 0.19 * (lines - 3))
    for text in legend.get_texts():
        text.set_color(theme.ink)


def _columns(labels: Sequence[str]) -> int:
    """The largest number of legend columns, up to four, that fits above the axes. matplotlib fills column by column."""
    for columns in (4, 3, 2):
        deep = math.ceil(len(labels) / columns)
        widths = []
        for start in range(0, len(labels), deep):
            longest = max(len(label) for label in labels[start : start + deep])
            widths.append(longest + 7)  # the line or marker before it, and a space
        if len(widths) <= columns and sum(widths) <= 86:
            return len(widths)
    return 1
