"""Shows what a search has found, as text and HTML, with each hit marked."""

from __future__ import annotations

import time
from itertools import chain, islice

from ..frames.search import Hit, Search
from ..text import count, number, one_line, plain, short
from .html import Html, element, table, title, view

__all__ = [
    "hit_line",
    "search_headline",
    "search_html",
    "search_text",
]

SHOWN = 50
"""Most hits shown."""
SECONDS = 2.0
"""How long a display searches for hits to show."""


def search_text(search: Search) -> str:
    """The search as text: a headline, then one line a hit, marked by «»."""
    hits = _first_hits(search)
    return "\n".join([search_headline(search, len(hits)), *(f"  {hit_line(hit)}" for hit in hits)])


def hit_line(hit: Hit) -> str:
    """A hit as one line: "e3/q17/2  0.5  turn 4 assistant: … the «text» around it …"."""
    where = " ".join(filter(None, ["" if hit.turn is None else f"turn {hit.turn}", hit.role]))
    line = f"{one_line(hit.trajectory, 80)}  reward {number(hit.reward)}"
    if not where:
        return line
    marked = f"{_in_line(hit.before)}«{_in_line(hit.hit)}»{_in_line(hit.after)}"
    return f"{line}  {where}: {marked}"


def _in_line(text: str) -> str:
    return plain(text).replace("\n", "↵").replace("\t", " ")


def search_html(search: Search) -> str:
    """The search as HTML: a headline, and a table of hits."""
    hits = _first_hits(search)
    body: list[Html] = [title(search.query.shown, search_headline(search, len(hits)))]
    if hits:
        rows = []
        for hit in hits:
            text = element("span", short(hit.before), element("mark", short(hit.hit)), short(hit.after), dir="auto")
            turn = "" if hit.turn is None else str(hit.turn)
            rows.append((short(hit.trajectory, 80), number(hit.reward), turn, short(hit.role, 40), text))
        body.append(table(rows, ("rollout", "reward", "turn", "role", "text")))
    return view(*body)


def _first_hits(search: Search) -> list[Hit]:
    """The first hits, of as many epochs as it takes and the time allows."""
    deadline = time.monotonic() + SECONDS
    found = 0
    parts = []
    for part in search:
        parts.append(part)
        found += len(part.hits)
        if found >= SHOWN or time.monotonic() > deadline:
            break
    return list(islice(chain.from_iterable(part.hits for part in parts), SHOWN))


def search_headline(search: Search, shown: int | None = None) -> str:
    """What was found so far: "6 hits in 5 of 320 rollouts". shown: how many hits are shown; all that are kept, if None."""
    if shown is None:
        shown = sum(len(part.hits) for part in search.known)
    parts = search.known
    hits = sum(len(part.hits) + part.left_out for part in parts)
    rollouts, searched = sum(part.rollouts for part in parts), count(sum(part.searched for part in parts), "rollout")
    text = f"{rollouts:,} of {searched}"
    if search.query.pattern is not None:
        text = f"{count(hits, 'hit')} in {text}"
    if not search.complete:
        text += f" in {len(parts):,} of {count(search.epochs, 'epoch')}, the newest first; `.frame` searches the others"
    unreadable = sum(part.error is not None for part in parts)
    if unreadable:
        text += f"; {count(unreadable, 'epoch')} could not be read"
    if shown < hits:
        text += f"; the first {shown:,} are shown"
    return text
