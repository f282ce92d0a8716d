"""Small pieces of HTML: escaping, tables, folds, bars, sparklines, and the one style sheet that they share.

Safe by construction: every piece escapes what it is given unless it is `Html`, and only the pieces themselves make
`Html`. No script, no link, no image but those that are handed over as bytes; text and background are always set
together, by JupyterLab's variables where they exist; what carries a meaning is also written out, for places that strip
styles. What is shown is left to the callers: no noun of finetuning is known here.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = [
    "Html",
    "bar",
    "cut",
    "details",
    "duration",
    "element",
    "escape",
    "image",
    "number",
    "page",
    "plain",
    "sparkline",
    "table",
    "view",
]


class Html(str):
    """Markup that is safe to show. Adding or formatting one gives a plain str again, which would be escaped."""

    __slots__ = ()


# ── values to text ───────────────────────────────────────────────────────────────────────────────────────────────────

# Characters that are unseen, that reorder or hide their neighbours, or that are no characters at all. Joiners (U+200C,
# U+200D) and variation selectors of emoji stay: scripts and emoji need them. Tag characters (U+E00xx) do not: they are
# a way to hide text from the reader and not from a model.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)


def plain(value: Any) -> str:
    """Any value as one text that can be printed and encoded: control characters as their pictures (␀, ␛), other unseen
    ones, bidi controls and lone surrogates as [U+202E]. Never raises; line breaks and tabs stay."""
    return _UNSEEN.sub(_visible, _text(value).replace("\r\n", "\n"))


def _text(value: Any) -> str:
    try:
        return value if isinstance(value, str) else str(value)
    except Exception as error:
        return f"<{type(value).__name__} whose text cannot be made: {type(error).__name__}>"


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"[U+{code:04X}]"


def escape(value: Any) -> Html:
    """Any value as HTML text, also good inside a quoted attribute. Html passes as it is; None is empty."""
    if isinstance(value, Html):
        return value
    return Html() if value is None else Html(html.escape(plain(value), quote=True))


def cut(value: Any, limit: int) -> str:
    """A text of at most `limit` characters of the value: its beginning and, as the end is often the outcome, its end.
    The note between them says how much is left out and comes on top of the limit."""
    text = _text(value)
    if len(text) <= limit:
        return text
    tail = limit // 4
    note = f" […{len(text) - limit:,} of {len(text):,} characters left out…] "
    return text[: limit - tail] + note + text[len(text) - tail :]


def number(value: Any, digits: int = 3) -> str:
    """A number to `digits` significant digits; "–" where it is missing (None or NaN)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return "–" if value is None else plain(cut(value, 40))
    if isinstance(value, Integral):
        return f"{int(value):,}" if abs(int(value)) < 10**15 else "beyond ±10¹⁵"
    value = float(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}g}" if abs(value) < 10**digits or abs(value) >= 1e15 else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as "0.52 s", "1 min 05 s" or "2 h 03 min"; "–" where they are missing."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """`<tag attributes>children</tag>`; children (also in lists) and attribute values are escaped. An underscore in an
    attribute's name is a hyphen, one at its end is dropped (`class_`); an attribute that is None is left out."""
    names = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    head = "".join(f' {name}="{escape(value)}"' for name, value in names)
    return Html(f"<{tag}{head}>{_joined(children)}</{tag}>")


def _joined(children: Iterable[Any]) -> str:
    return "".join(_joined(child) if isinstance(child, list) else escape(child) for child in children)


def details(summary: Any, *body: Any, open: bool = False) -> Html:
    """A fold: the summary stands there, a click shows the body."""
    return element("details", element("summary", summary), *body, open="" if open else None)


def table(rows: Iterable[Sequence[Any]], headers: Sequence[Any] | None = None, caption: Any = None) -> Html:
    """A table. Without headers the first cell of a row is the row's name; with them, columns of numbers stand right."""
    rows = list(rows)
    numeric = [_is_number(cell) for cell in rows[0]] if rows and headers else []
    head = None
    if headers:
        kinds = [*numeric, *[False] * (len(headers) - len(numeric))]
        cells = (element("th", h, scope="col", class_="n" if n else None) for h, n in zip(headers, kinds, strict=False))
        head = element("thead", element("tr", *cells))
    body = [
        element("tr", *(_cell(c, named=not headers and place == 0, right=bool(headers)) for place, c in enumerate(row)))
        for row in rows
    ]
    return element("table", caption and element("caption", caption), head, element("tbody", *body))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: Any, named: bool, right: bool) -> Html:
    if named:
        return element("th", value, scope="row")
    if _is_number(value):
        return element("td", number(value), class_="n" if right else None)
    return element("td", value)


def bar(value: float, largest: float = 1.0, text: Any = None) -> Html:
    """A horizontal bar of `value` out of `largest`, with its text behind it. A missing value has the text alone."""
    shown = number(value) if text is None else text
    if not (math.isfinite(value) and largest > 0):
        return element("span", shown)
    share = min(max(value / largest, 0.0), 1.0)
    filled = element("span", style=f"width:{100 * share:.1f}%")
    return element("span", element("span", filled, class_="ft-bar", aria_hidden="true"), " ", shown)


def sparkline(values: Sequence[float], text: str, width: int = 240, height: int = 40) -> Html:
    """A line through the values, without axes; a gap where one is missing. `text` says the same for those who do not
    see it. At most `width` points are drawn: of more, those that are evenly spaced."""
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
        after = points[index + 1][1] if index + 1 < len(points) else math.nan
        if not math.isfinite(after):
            dots.append(element("circle", cx=x, cy=y, r="2.5"))
        pen = "L"
    line = element("path", d="".join(path), fill="none", stroke="currentColor", stroke_width="1.5")
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height, "fill": "currentColor"}
    return element("svg", line, *dots, role="img", aria_label=text, class_="ft-spark", **size)


# JupyterLab's variables come first, then VS Code's, then a colour for the reader's preference. Tints are half
# transparent grey, which darkens a light background and lightens a dark one.
_STYLE = """
.ft{--fg:var(--jp-content-font-color1,var(--vscode-editor-foreground,#1f2328));
--bg:var(--jp-layout-color0,var(--vscode-editor-background,#fff));
--bad:var(--jp-error-color1,var(--vscode-errorForeground,#b3261e));--on:var(--jp-brand-color1,#1a73b8);--enter:#a65fd0;--leave:#dd6b10;
color:var(--fg);background:var(--bg);font:13px/1.5 var(--jp-ui-font-family,system-ui,sans-serif);
padding:8px 12px;max-width:64em;overflow-wrap:break-word;overflow-x:auto}
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
.ft pre{color:var(--fg);background:rgba(128,128,128,.09);white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0;padding:4px 8px;
font:12.5px/1.5 var(--jp-code-font-family,ui-monospace,monospace);max-height:28em;overflow:auto}
.ft summary{cursor:pointer}
.ft .ft-turn{border-left:4px solid rgba(128,128,128,.6);padding:1px 0 1px 10px;margin:8px 0}
.ft .ft-turn.assistant{border-color:var(--on)}
.ft.ft .ft-heat span.t1{background:rgba(217,95,2,.12)}
.ft.ft .ft-heat span.t2{background:rgba(217,95,2,.27)}
.ft.ft .ft-heat span.t3{background:rgba(217,95,2,.42)}
.ft.ft .ft-heat span.t4{background:rgba(217,95,2,.57);border-bottom:2px dotted var(--fg)}
.ft.ft .ft-heat span.t5{background:rgba(217,95,2,.72);border-bottom:2px solid var(--fg)}
.ft.ft .ft-pair{width:100%;table-layout:fixed}
.ft mark{color:var(--bg);background:var(--on);padding:0 2px}
.ft .ft-bar{display:inline-block;width:90px;height:9px;background:rgba(128,128,128,.25)}
.ft .ft-bar>span{display:block;height:100%;background:var(--on)}
.ft .ft-spark{color:var(--on);vertical-align:middle}
.ft .ft-what-if{display:flex;flex-wrap:wrap;gap:8px 20px;align-items:center;margin:6px 0}
.ft .ft-histogram{position:relative;flex:1 1 280px;min-width:240px;max-width:440px}
.ft .ft-histogram svg{display:block}
.ft .ft-histogram>span{position:absolute;font-size:11px;line-height:1;white-space:nowrap;transform:translate(0,-50%)}
.ft .ft-histogram>span::after{content:attr(data-text)}
.ft .ft-histogram>.ft-at-middle{transform:translate(-50%,-50%)}
.ft .ft-histogram>.ft-at-end{transform:translate(-100%,-50%)}
.ft .ft-bare{display:none}
.ft .ft-legend{flex:0 0 auto;font-size:12px}
.ft .ft-legend svg{vertical-align:-1px}
.ft .ft-count{display:inline-block;min-width:3.2em;text-align:right;padding-right:.5em;
font-variant-numeric:tabular-nums;font-weight:600}
""".strip().replace("\n", "")


def view(*body: Any, styled: bool = True) -> Html:
    """The outermost element: the style sheet and what is shown. The classes keep MathJax from reading a "$" in a
    model's text as a formula. styled: False where the style sheet is on the page already."""
    style = Html(f"<style>{_STYLE}</style>") if styled else None
    return element("div", style, *body, class_="ft mathjax_ignore tex2jax_ignore")


def image(png: bytes, text: str, width: int) -> Html:
    """A picture, in the page itself, `width` pixels wide at most. `text` says the same for those who do not see it."""
    source = base64.b64encode(png).decode("ascii")
    return Html(
        f'<img src="data:image/png;base64,{source}" alt="{escape(text)}" style="width:{width}px;max-width:100%">'
    )


def page(title: str, *body: Any) -> str:
    """A whole document. Nothing in it can run or fetch anything: the browser is told so as well."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    looks = (
        ":root{color-scheme:light dark}body{margin:0 auto;max-width:72em;padding:12px;font-family:system-ui,sans-serif}"
    )
    head = element("title", title) + f"<style>{looks}</style>"
    metas = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    metas += '<meta name="viewport" content="width=device-width">'
    return f'<!doctype html>\n<html lang="en"><head>{metas}{head}</head><body>{_joined(body)}</body></html>\n'
