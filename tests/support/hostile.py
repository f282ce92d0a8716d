"""Text that nobody should trust, and what a reader sees of a view that shows it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></div></style><svg onload=alert(1)>",
    "# heading **bold** [a](javascript:alert(1)) `code` $x$",
    "\x1b[31mred\x1b[0m",
    "👩‍💻🏳️‍🌈",
    "‮evil‬ שלום",
    "lone \ud83d and \udc00",
    "nul \x00 byte",
]


def text_of(markup: str) -> str:
    """What a reader sees, the style sheet left out; raises if the markup is not well-formed."""
    root = ElementTree.fromstring(markup)
    for style in root.findall("style"):
        style.text = ""
    return " ".join(" ".join(root.itertext()).split())


def unsafe_tags(markup: str) -> set[str]:
    """Elements that a text could have made and no view has: scripts, links, and images that are not part of the page."""
    found = set()
    for node in ElementTree.fromstring(markup).iter():
        is_own = node.tag == "img" and node.get("src", "").startswith(("data:image/png;base64,", "data:image/svg+xml,"))
        if node.tag in ("script", "img", "svg", "iframe", "h1", "a", "b") and not is_own:
            found.add(node.tag)
    return found
