"""Building blocks for HTML: escaping, tables, folds, bars, sparklines, and the style sheet that they share.

Safe by construction: every function escapes its arguments unless they are `Html`, and only these functions make `Html`.
No scripts but one that a page is given, no links, no images except those passed as bytes. Text and background colours are always
set together, from JupyterLab's variables where they exist.

A stored notebook is often shown without its style sheets: JupyterLab drops them, and drawings, until the notebook is trusted.
What carries meaning (tints, bars, borders, lines) is therefore an inline style or an `<img>`, in literal colours that are seen
on light and dark pages. Nothing is said by style alone, as some viewers strip those too.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, SupportsIndex
from urllib.parse import quote

from markupsafe import Markup

from ..text import number, plain, short
from ..types import EpochMetrics

__all__ = [
    "ACCENT",
    "ERROR_LIMIT",
    "Html",
    "PagePart",
    "error_block",
    "bar",
    "data_block",
    "details",
    "drifted",
    "FAINT",
    "drawing",
    "element",
    "escape",
    "facts_table",
    "image",
    "row",
    "page",
    "scores",
    "some_examples",
    "sparkline",
    "table",
    "title",
    "view",
]


class Html(Markup):
    """Markup that is safe to show. Its `join`, `%` and `format` escape their arguments unless these are Html too.

    Adding to it, slicing it or formatting it in an f-string gives a plain str, which is escaped when shown.
    """

    __slots__ = ()

    # Markup.__new__ takes twice as long, and calls the `__html__` of its argument.
    __new__ = str.__new__  # type: ignore[assignment]

    @classmethod
    def escape(cls, value: Any, /) -> Html:
        """Any value as HTML text, also safe in a quoted attribute. Html is returned as is; None becomes empty."""
        # Trust only Html: other values marked safe (`__html__`, Markup) may come from a model or a dataset.
        if isinstance(value, Html):
            return value
        if value is None:
            return cls()
        return cls(html.escape(plain(value), quote=True))

    # Markup returns Markup here too. But a sum is almost always a forgotten `element`, and a slice can split a tag.
    def __add__(self, other: str, /) -> str:  # type: ignore[override]
        return str.__add__(self, other)

    def __radd__(self, other: str, /) -> str:  # type: ignore[override]
        return str.__add__(other, self)

    def __getitem__(self, key: SupportsIndex | slice, /) -> str:  # type: ignore[override]
        return str.__getitem__(self, key)


escape = Html.escape

ACCENT = "#3f90da"
"""The colour of bars, lines and marks: a contrast of at least 3:1 on white and on near-black."""
FAINT = "#8886"
"""What is around them: darker on a light page, lighter on a dark one."""


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """Make `<tag attributes>children</tag>`.

    Args:
        tag: Name of the element.
        *children: Values or lists of them, escaped unless they are Html.
        **attributes: Values are escaped; None omits the attribute. In a name, an underscore becomes a hyphen, and a trailing
            one is dropped (`class_`).
    """
    head = ""
    for name, value in attributes.items():
        if value is not None:
            head += f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
    return Html(f"<{tag}{head}>{_joined(children)}</{tag}>")


def _joined(children: Iterable[Any]) -> str:
    return "".join(_joined(child) if isinstance(child, list) else escape(child) for child in children)


def details(summary: Any, *body: Any, open: bool = False) -> Html:
    """A fold: the summary is always visible, and a click shows the body."""
    return element("details", element("summary", summary), *body, open="" if open else None)


def table(rows: Iterable[Sequence[Any]], headers: Sequence[Any] | None = None, caption: Any = None) -> Html:
    """A table. Without headers, the first cell of a row is its name; with headers, columns of numbers are right-aligned."""
    rows = list(rows)
    head = None
    if headers:
        # The first row decides which columns hold numbers.
        first = rows[0] if rows else ()
        cells = []
        for place, header in enumerate(headers):
            right = place < len(first) and _is_number(first[place])
            cells.append(
                element("th", header, scope="col", class_="n" if right else None, style=None if right else LEFT)
            )
        head = element("thead", element("tr", *cells))
    body = []
    wide = len(headers or ()) >= WIDE_TABLE
    for row in rows:
        cells = []
        for place, value in enumerate(row):
            cells.append(_cell(value, named=not headers and place == 0, right=bool(headers), wide=wide))
        body.append(element("tr", *cells))
    made = element("table", caption and element("caption", caption), head, element("tbody", *body))
    if not wide:
        return made
    # On a narrow page it scrolls by itself, and the keyboard must reach it there.
    return element("div", made, class_="ft-wide", tabindex=0, role="group", aria_label=caption or "table")


WIDE_TABLE = 4
"""Columns of a table that may be wider than a narrow page."""


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any, named: bool, right: bool, wide: bool) -> Html:
    if named:
        return element("th", value, scope="row", style=LEFT)
    if _is_number(value):
        return element("td", number(value), class_="n" if right else None)
    return element("td", value, style=LEFT + (_width(value) if wide else ""))


def _width(value: Any) -> str:
    """In a table that scrolls where the page is narrow: a number stays beside its unit, and a sentence is no column of words."""
    if isinstance(value, Html) or not isinstance(value, str):
        return ""
    if len(value) <= 12:
        return ";white-space:nowrap" if " " in value else ""
    return ";min-width:14em" if len(value) > 30 else ""


LEFT = "text-align:left"
"""Inline style of a text in a table: JupyterLab would align it like a number."""


def bar(value: float, largest: float = 1.0, text: Any = None) -> Html:
    """A horizontal bar of `value` out of `largest`, followed by its text. A missing value has only the text."""
    shown = number(value) if text is None else text
    if not (math.isfinite(value) and largest > 0):
        return element("span", shown)
    share = 100 * min(max(value / largest, 0.0), 1.0)
    filled = (
        f"display:inline-block;width:90px;height:9px;background:linear-gradient(90deg,{ACCENT} {share:.1f}%,{FAINT} 0)"
    )
    line = "white-space:nowrap" if not isinstance(shown, Html) and len(str(shown)) < 20 else None
    return element("span", element("span", style=filled, aria_hidden="true"), " ", shown, style=line)


def drawing(*shapes: Any, text: str, width: int, height: int, style: str | None = None, **attributes: Any) -> Html:
    """A picture made of SVG elements, as an `<img>`: front ends drop an inline `<svg>` from a notebook that is not trusted.

    Args:
        *shapes: SVG elements. They see no style sheet, and no colour of the page.
        text: Alternative text.
        width: In pixels.
        height: In pixels.
        style: Inline style of the image.
        **attributes: Of the `<svg>`.
    """
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    svg = element("svg", *shapes, xmlns="http://www.w3.org/2000/svg", **size, **attributes)
    source = "data:image/svg+xml," + quote(svg, safe=" =/:;,.()-!*?@+$[]")
    return element("img", src=source, alt=text, width=width, height=height, style=style)


def sparkline(values: Sequence[float], text: str, width: int = 240, height: int = 40) -> Html:
    """Draw a line through values, without axes.

    Args:
        values: The values; NaN leaves a gap. At most `width` evenly spaced ones are drawn.
        text: Alternative text.
        width: In pixels.
        height: In pixels.
    """
    every = max(1, math.ceil(len(values) / width))
    points = [(place, values[place]) for place in range(0, len(values), every)]
    finite = [value for _, value in points if math.isfinite(value)]
    if not finite:
        return Html()
    low, high = min(finite), max(finite)
    across, up = (width - 8) / max(1, len(values) - 1), (height - 8) / ((high - low) or 1.0)
    path, dots, pen = [], [], "M"
    for index, (place, value) in enumerate(points):
        if not math.isfinite(value):
            pen = "M"
            continue
        x, y = f"{4 + place * across:.1f}", f"{height - 4 - (value - low) * up:.1f}"
        path.append(f"{pen}{x} {y}")
        pen = "L"
        # A dot at each end of a line: a single value would otherwise be invisible.
        after = points[index + 1][1] if index + 1 < len(points) else math.nan
        if not math.isfinite(after):
            dots.append(element("circle", cx=x, cy=y, r="2.5"))
    line = element("path", d="".join(path), fill="none", stroke=ACCENT, stroke_width="1.5")
    return drawing(line, *dots, text=text, width=width, height=height, style="vertical-align:middle", fill=ACCENT)


# JupyterLab's variables come first, then VS Code's, then a colour for the preferred colour scheme. Shades are translucent
# grey, which darkens a light background and lightens a dark one.
_STYLE = """
.ft{--fg:var(--jp-content-font-color1,var(--vscode-editor-foreground,#1f2328));
--bg:var(--jp-layout-color0,var(--vscode-editor-background,#fff));
--bad:var(--jp-error-color1,var(--vscode-errorForeground,#b3261e));--on:var(--jp-brand-color1,#1a73b8);--enter:#a65fd0;--leave:#dd6b10;
color:var(--fg);background:var(--bg);font:13px/1.5 var(--jp-ui-font-family,system-ui,sans-serif);
padding:8px 12px;max-width:64em;overflow-wrap:break-word}
@media(prefers-color-scheme:dark){.ft{--fg:var(--jp-content-font-color1,var(--vscode-editor-foreground,#e6e6e6));
--bg:var(--jp-layout-color0,var(--vscode-editor-background,#161616));
--bad:var(--jp-error-color1,var(--vscode-errorForeground,#ff8a80));--on:var(--jp-brand-color1,#64b5f6)}}
.ft .ft-title{font-size:15px;font-weight:600;margin:0 0 4px}
.ft .ft-dim{opacity:.75}
.ft .ft-bad{color:var(--bad);font-weight:600}
.ft table{border-collapse:collapse;margin:6px 0;color:var(--fg);background:var(--bg);font-size:13px}
.ft.ft caption{text-align:left;font-weight:600;padding:2px 0}
.ft.ft tbody tr,.ft.ft tbody tr:nth-child(even),.ft.ft tbody tr:hover{background:var(--bg);color:var(--fg)}
.ft.ft th,.ft.ft td{text-align:left;vertical-align:top;padding:2px 14px 2px 0;border:0;white-space:normal;max-width:40em}
.ft.ft thead th{border-bottom:1px solid rgba(128,128,128,.5)}
.ft.ft .n{text-align:right;font-variant-numeric:tabular-nums}
.ft pre{color:var(--fg);background:rgba(128,128,128,.09);white-space:pre-wrap;overflow-wrap:break-word;word-break:normal;
margin:2px 0;padding:4px 8px;font:12.5px/1.5 var(--jp-code-font-family,ui-monospace,monospace)}
.ft .ft-wide{overflow-x:auto}
.ft summary{cursor:pointer}
.ft :focus-visible{outline:2px solid var(--on);outline-offset:2px}
@container(max-width:640px){.ft.ft .ft-pair thead{display:none}
.ft.ft .ft-pair :is(tbody,tr,td){display:block;width:auto!important}}
.ft mark{color:var(--bg);background:var(--on);padding:0 2px}
.ft .ft-count{display:inline-block;min-width:3.2em;text-align:right;padding-right:.5em;
font-variant-numeric:tabular-nums;font-weight:600}
""".strip().replace("\n", "")


def view(*body: Any, styled: bool = True, wide: bool = False) -> str:
    """Make the outermost element of a view. Its classes keep MathJax from reading a "$" in a text as a formula.

    Args:
        *body: The content.
        styled: Whether to include the style sheet. False if it is already on the page, or if nothing in the body needs it.
        wide: Whether to take all the width there is, instead of lines that are easy to read.
    """
    style = Html(f"<style>{_STYLE}</style>") if styled else None
    width = "max-width:none;container-type:inline-size" if wide else None
    # A plain str: a front end may encode by type, and marimo turns a subclass of str into `{}`.
    return str(element("div", style, *body, class_="ft mathjax_ignore tex2jax_ignore", style=width))


def image(png: bytes, text: str, width: int) -> Html:
    """An embedded picture, at most `width` pixels wide. text: its alternative text."""
    source = base64.b64encode(png).decode("ascii")
    return Html(
        f'<img src="data:image/png;base64,{source}" alt="{escape(text)}" style="width:{width}px;max-width:100%">'
    )


class PagePart(NamedTuple):
    """A part of a page that a script makes alive."""

    html: Html
    script: str
    """An ES module of this package; nothing of a run is in it."""


def data_block(name: str, value: Any) -> Html:
    """Plain data for a script, as JSON that no browser runs. name: the element's id."""
    text = json.dumps(value, allow_nan=False).replace("<", "\\u003c")  # or a text could end the element
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def page(title: str, *body: Any, script: str | None = None) -> str:
    """Make a whole document. Its content security policy forbids requests, and every script but the given one.

    Args:
        title: Of the document.
        *body: The content.
        script: An ES module, which is allowed by its hash.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script is not None:
        if "</script" in script or "<!--" in script:
            raise ValueError("the script would end its element")
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        policy += f"; script-src 'sha256-{digest}'"
        body = (*body, Html(f'<script type="module">{script}</script>'))
    head = element("title", title) + f"<style>{_PAGE_STYLE}</style>"
    metas = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    metas += '<meta name="viewport" content="width=device-width">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{metas}{head}</head><body><main>{_joined(body)}</main></body></html>\n'
    )


_PAGE_STYLE = """
:root{color-scheme:light dark;print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{margin:0 auto;max-width:100em;padding:12px 20px;font:15px/1.5 system-ui,sans-serif}
main .ft{--bg:Canvas;--fg:CanvasText}
@media screen and (prefers-color-scheme:dark){figure>img{filter:invert(.93) hue-rotate(180deg)}}
h1{font-size:24px;margin:8px 12px}h2{font-size:18px;margin:28px 12px 6px}.verdict{margin:0 12px;max-width:64em;font-size:17px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:8px 24px;align-items:start}
figure{margin:8px 12px;break-inside:avoid}figcaption{font-size:13px;max-width:46em}
section>details,.columns>details{margin:6px 12px;min-width:0}
.note{margin:0 12px}#ft-rollouts{margin:6px 12px}
@media print{:root{color-scheme:light}.ft-rollouts{display:none}#ft-rollouts>[hidden]{display:block}
body{padding:0;max-width:none}.columns{grid-template-columns:1fr 1fr}
.ft-turn,tr,h2{break-inside:avoid}h2{break-after:avoid}.ft .ft-wide{overflow:visible}}
""".strip().replace("\n", "")


ERROR_LIMIT = 2_000
"""Most characters shown of an error."""


def title(*parts: str) -> Html:
    """The title line of a view. Empty parts are omitted."""
    return element("div", element("strong", " · ".join(part for part in parts if part)), class_="ft-title")


def facts_table(rows: Iterable[tuple[str, Any]]) -> Html:
    """A table of names and values. Rows without a value are omitted; 0 is a value."""
    given = []
    for name, value in rows:
        is_zero = value == 0 and value is not False
        if value or is_zero:
            given.append((name, value))
    return table(given) if given else Html()


def scores(found: Any) -> str:
    """Numbers by name: "correct 1 · length 0.4"."""
    if not isinstance(found, Mapping):
        return ""
    shown = [f"{short(name, 80)} {number(value)}" for name, value in list(found.items())[:24]]
    if len(found) > 24:
        shown.append(f"and {len(found) - 24:,} more")
    return " · ".join(shown)


def some_examples(examples: Sequence[Any], most: int = 5) -> Html:
    """The first few examples, in parentheses."""
    ids = [short(example, 40) for example in examples[:most]]
    if len(examples) > most:
        ids.append("…")
    return element("span", f" ({', '.join(ids)})", class_="ft-dim")


def row(*parts: Any) -> Html:
    """Parts on a separate line."""
    return element("div", *parts)


def error_block(label: str, text: str) -> Html:
    """An error: a label, and its text verbatim."""
    return element("div", element("strong", label, class_="ft-bad"), element("pre", text, dir="auto"))


def drifted(metrics: EpochMetrics) -> str:
    """How many turns were rendered anew, in words; empty if there were none, or if they were not counted."""
    if not metrics.drifted_turns:
        return ""
    of = f"{metrics.drifted_turns:,} of {metrics.continued_turns or 0:,} turns that carry a conversation on"
    return f"{of} were rendered anew instead of continuing the sampled ids: each is trained on separately"
