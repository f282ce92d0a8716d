"""The HTML pieces: whatever text goes in, text comes out."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from urllib.parse import unquote

import pytest
from hostile import unsafe_tags
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from finetune_nb.text import cut, duration, number, plain
from finetune_nb.views.html import Html, bar, details, element, escape, sparkline, table, view

# every code point, lone surrogates and noncharacters among them
ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.text("<>&\"'\x00\x1b\r\n\u202e\ud800\ufffe", max_size=20)
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</div></pre></style><h1>",
    "' onmouseover='alert(1)",
    '" onmouseover="alert(1)',
    "<!-- ",
    "]]>",
    "&lt;script&gt;",
    "**bold** [a](javascript:alert(1)) $x_1$",
]


def text_of(markup: str) -> str:
    """What a reader sees; raises if the markup is not well-formed."""
    return "".join(ElementTree.fromstring(markup).itertext())


@given(ANY_TEXT)
def test_any_text_is_shown_as_the_text_that_it_is(text: str) -> None:
    assert text_of(element("p", text)) == plain(text)
    assert ElementTree.fromstring(element("p", title=text)).get("title") == plain(text).replace("\n", " ").replace(
        "\t", " "
    )


@given(ANY_TEXT)
def test_what_is_made_of_any_text_can_be_stored_and_printed(text: str) -> None:
    assert plain(text).encode().decode() == plain(text)
    assert not set(plain(text)) & set("\x00\x1b\r\x7f\x9b\u202e\u2066\u200b\ufeff")
    assert plain(plain(text)) == plain(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_in_a_text_makes_no_element(text: str) -> None:
    piece = view(
        table([[text, text]], headers=[text, text], caption=text),
        details(text, text),
        bar(0.5, text=text),
        sparkline([1.0, 2.0], text),
    )
    assert not unsafe_tags(piece) and "<strong" not in piece
    attributes = {name for element in ElementTree.fromstring(piece).iter() for name in element.attrib}
    assert not [name for name in attributes if name.startswith("on")]
    assert text_of(piece).count(text) == 8
    assert ElementTree.fromstring(piece).find(".//img").get("alt") == text  # type: ignore[union-attr]


def test_unseen_characters_become_visible_and_seen_ones_stay() -> None:
    assert plain("a\x00b\x1b[31mc\x7f\x85") == "a␀b␛[31mc␡[U+0085]"
    assert plain("\u202eevil\u202c \u200b\ud83d \U000e0041") == "[U+202E]evil[U+202C] [U+200B][U+D83D] [U+E0041]"
    assert plain("שלום 👩\u200d💻 नमस्ते\tx\ny") == "שלום 👩\u200d💻 नमस्ते\tx\ny"
    assert plain("one\r\ntwo\rthree") == "one\ntwo␍three"


def test_a_value_whose_text_cannot_be_made_is_named() -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert escape(Broken()) == "&lt;Broken whose text cannot be made: RuntimeError&gt;"


def test_html_is_not_escaped_again_but_becomes_plain_once_it_is_formatted() -> None:
    piece = element("b", "<")
    assert element("p", piece) == "<p><b>&lt;</b></p>"
    assert isinstance(piece, Html)
    assert not isinstance(f"{piece}!", Html)
    assert "<b>" not in element("p", piece + "!")
    assert element("p", ["<", [piece, None]]) == "<p>&lt;<b>&lt;</b></p>"


ADDED = {
    "joined": lambda text: Html().join([element("b", "x"), text]),
    "percent": lambda text: element("b", "%s") % text,
    "percent of several": lambda text: element("b", "%s and %s") % (text, element("i", "x")),
    "percent by name": lambda text: element("b", "%(name)s") % {"name": text},
    "formatted": lambda text: element("b", "{} and {name}").format(text, name=text),
    "replaced": lambda text: element("b", "x").replace("x", text),
    "summed": lambda text: element("b", "x") + text,
    "summed from the left": lambda text: text + element("b", "x"),
    "in an f-string": lambda text: f"{element('b', 'x')}{text}",
    "cut": lambda text: cut(element("p", text), 8),
    "sliced": lambda text: element("p", text)[1:],
}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("added", ADDED)
def test_a_text_that_is_added_to_markup_makes_no_element(added: str, text: str) -> None:
    tree = ElementTree.fromstring(element("div", ADDED[added](text)))
    assert {element.tag for element in tree.iter()} <= {"div", "b", "i"}
    assert not any(element.attrib for element in tree.iter())


@pytest.mark.parametrize("added", ["joined", "percent", "percent by name", "formatted", "replaced"])
def test_unseen_characters_that_are_added_to_markup_become_visible(added: str) -> None:
    made = ADDED[added]("\u202eevil\x00")
    assert isinstance(made, Html) and "[U+202E]evil␀" in text_of(f"<p>{made}</p>")


def test_markup_of_others_is_text() -> None:
    class Theirs:
        def __html__(self) -> str:
            return "<script>"

        def __str__(self) -> str:
            return "theirs"

    assert element("p", Markup("<script>")) == "<p>&lt;script&gt;</p>"
    assert element("p", Theirs()) == "<p>theirs</p>"
    assert Html("%s") % Theirs() == "theirs"
    assert Html().join([Markup("<script>"), Theirs()]) == "&lt;script&gt;theirs"  # type: ignore[list-item]
    assert type(plain(Markup("<script>"))) is str
    assert not isinstance(cut(element("p", "x" * 100), 40), Html)


def test_other_frameworks_know_that_a_piece_is_markup() -> None:
    assert Markup("<p>{}</p>").format(element("b", "<")) == "<p><b>&lt;</b></p>"


def test_a_view_is_a_plain_str() -> None:
    assert type(view(element("b", "x"))) is str


def test_cut_keeps_both_ends_and_says_how_much_is_left_out() -> None:
    text = "begin" + "x" * 1_000_000 + "end"
    short = cut(text, 400)
    assert short.startswith("begin")
    assert short.endswith("end")
    assert "999,608 of 1,000,008 characters left out" in short
    assert len(short) < 500
    assert cut("short", 400) == "short"


@given(st.text(max_size=50), st.integers(1, 60))
def test_cut_never_shows_more_than_the_limit_and_loses_nothing_below_it(text: str, limit: int) -> None:
    shown = cut(text, limit)
    assert shown == text if len(text) <= limit else f"of {len(text)} characters" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0, "0"),
        (0.0, "0"),
        (0.61234, "0.612"),
        (1234.5, "1,234"),
        (12345, "12,345"),
        (10**400, "beyond ±10¹⁵"),
        (True, "True"),
        ("<b>", "<b>"),
    ],
)
def test_a_number_is_short_and_a_missing_one_is_a_dash(value: object, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (math.nan, "–"), (0.52, "0.52 s"), (1.23, "1.2 s"), (59.99, "1 min 00 s"), (125, "2 min 05 s"),
     (7380, "2 h 03 min")],
)  # fmt: skip
def test_a_duration_has_its_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_bar_without_a_value_is_its_text_alone() -> None:
    assert "#3f90da 25.0%" in bar(0.25)
    assert "#3f90da 100.0%" in bar(7.0)
    assert bar(math.nan) == "<span>–</span>"


def test_what_carries_meaning_needs_no_style_sheet() -> None:
    """Front ends take `<style>`, `<svg>` and `var()` out of a notebook that is not trusted."""
    for piece in (bar(0.25), sparkline([0.0, 1.0], "up"), table([["a", "b"]])):
        assert "class=" not in piece and "var(" not in piece and "<svg" not in piece


def test_a_sparkline_has_a_gap_where_a_value_is_missing() -> None:
    image = ElementTree.fromstring(sparkline([0.0, 1.0, math.nan, 0.5], "from 0 to 0.5"))
    kind, _, source = image.get("src", "").partition(",")
    path = ElementTree.fromstring(unquote(source)).find("{http://www.w3.org/2000/svg}path")
    assert kind == "data:image/svg+xml" and path.get("d").count("M") == 2  # type: ignore[union-attr]
    assert image.get("alt") == "from 0 to 0.5"
    assert sparkline([math.nan], "nothing") == ""
    assert len(sparkline([float(i % 7) for i in range(100_000)], "long")) < 10_000


def test_style_sets_text_and_background_together_without_scripts_or_fetches() -> None:
    style = ElementTree.fromstring(view("x")).find("style").text  # type: ignore[union-attr]
    assert "color:var(--fg);background:var(--bg)" in style
    assert style.count("--jp-layout-color0,") == style.count("--jp-content-font-color1,") == 2
    assert not [word for word in ("url(", "@import", "expression", "http") if word in style]
