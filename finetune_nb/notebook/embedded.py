"""The trajectory browser in a page of its own: the same page side as in a notebook, with the data beside it instead of a kernel.

An epoch has its index, which lists, filters and sorts every rollout; and of as many groups as there is room for, what the
rollouts say. Both are compressed. Known secrets are masked, also one that is several tokens.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.browse_index import SORTS, BrowseIndex, group_order, packed, packed_texts
from ..analysis.rollout_body import RolloutBody, rollout_body
from ..errors import ConfigError, StoreError
from ..redaction import redact, redact_text, redact_texts, redacting_logger
from ..store.json import finite
from ..text import count, short, text_of
from ..types import Epoch
from ..views.html import Html, PagePart, data_block, element
from .browser import BrowsedRun, Source, words_of_signals
from .browser_html import browser_html
from .mount import module

__all__ = [
    "MEGABYTES",
    "embedded_browser",
    "report_browser",
]

logger = redacting_logger(__name__)

MEGABYTES = 10.0
"""How much a report holds of what the rollouts say, unless another limit is given."""
_Item = tuple[dict[str, Any], Sequence[bytes]]


def report_browser(
    run: BrowsedRun, path: str | Path, browser: bool | None = None, max_megabytes: float | None = None
) -> Callable[[], PagePart | None] | None:
    """What makes the browser of a report; None where that has none.

    Args:
        run: The run.
        path: The file. One that is no report has no browser.
        browser: Whether it is wanted. None: yes.
        max_megabytes: As in `embedded_browser`. None: MEGABYTES.

    Raises:
        ConfigError: The file is no report but a browser or its size is given; or the size is none.
    """
    if Path(path).suffix.lower() != ".html":
        if browser is not None or max_megabytes is not None:
            raise ConfigError(
                f"only an .html report has a browser; omit browser and max_megabytes for {Path(path).name!r}."
            )
        return None
    if browser is False:
        if max_megabytes is not None:
            raise ConfigError("found browser=False and max_megabytes; a report without a browser has no data to limit.")
        return None
    size = MEGABYTES if max_megabytes is None else max_megabytes
    if isinstance(size, bool) or not isinstance(size, int | float) or not size > 0:
        raise ConfigError(f"found max_megabytes={size!r}; expected a number above 0, or browser=False for none.")
    return lambda: embedded_browser(run, size)


def embedded_browser(run: BrowsedRun, megabytes: float = MEGABYTES) -> PagePart | None:
    """Make the browser of a run for a page without a kernel.

    The newest epoch comes first, then the first one, then the others from the newest back; in each, the groups whose rewards
    differ most. What does not fit is left out, and the page says so.

    Args:
        run: The run.
        megabytes: How large the data may be, in units of 1,000,000 bytes of the page.

    Returns:
        The browser; None if no epoch has ended.
    """
    source = Source(run)
    records = source.records()
    if not records:
        return None
    room = _Room(megabytes * 1e6)
    epochs: dict[int, dict[str, Any]] = {}
    for record in _by_interest(records):
        try:
            found = _index(source, record)
        except StoreError as error:
            logger.warning("epoch %d is left out of the browser of the report: %s", record.index, error)
            continue
        if room.take(found["index"]):
            epochs[record.index] = found
    for record in _by_interest([record for record in records if record.index in epochs]):
        if room.is_full:
            break
        try:
            epochs[record.index]["bodies"] = _bodies(source, record, room)
        except StoreError as error:
            logger.warning("the texts of epoch %d are left out of the report: %s", record.index, error)
    shown = [record for record in records if record.index in epochs]
    data = {
        "hello": {
            "run": redact_text(short(run.id, 80)),
            "signals": words_of_signals(),
            "sorts": SORTS,
            "epoch": shown[-1].index if shown else None,
            "epochs": [_in_short(record) for record in shown],
            "still": True,
        },
        "epochs": epochs,
        "sheet": Path(__file__).with_name("browser.css").read_text("utf-8"),
    }
    newest = source.index(shown[-1].index) if shown else None
    html = element(
        "div",
        element("p", _said(source, shown, records, epochs), class_="note"),
        element("div", element("div", Html(redact_text(browser_html(run.id, shown, newest)))), id="ft-rollouts"),
        data_block("ft-rollouts-data", finite(data)),
    )
    return PagePart(html, module("browser.js", "embedded.js"))


class _Room:
    """Bytes that are left."""

    def __init__(self, size: float) -> None:
        self._left = size
        self.is_full = False

    def take(self, text: str) -> bool:
        """Whether the text fits. Once one did not, nothing does."""
        self.is_full = self.is_full or len(text) > self._left
        if not self.is_full:
            self._left -= len(text)
        return not self.is_full


def _by_interest(records: Sequence[Epoch]) -> list[Epoch]:
    """The newest, the first, then from the newest back."""
    return list(dict.fromkeys([records[-1], records[0], *reversed(records)]))


def _in_short(record: Epoch) -> list[Any]:
    mean = record.metrics.mean_reward
    counts = record.metrics.trajectories, record.metrics.failures
    return [record.index, mean if np.isfinite(mean) else None, *counts, None]


def _said(source: Source, shown: Sequence[Epoch], records: Sequence[Epoch], epochs: dict[int, dict[str, Any]]) -> str:
    """How much of the run is in the page."""
    total = sum(record.metrics.trajectories + record.metrics.failures for record in records)
    whole = 0
    for number, found in epochs.items():
        sizes = np.diff(source.index(number).starts.astype(np.int64))
        whole += int(sizes[[int(group) for group in found["bodies"]]].sum())
    if whole == total:
        return f"All {count(total, 'rollout')} of {count(len(records), 'epoch')}, whole. Click into it and press ? for the keys."
    said = f"{whole:,} of {count(total, 'rollout')} are in this page, whole; of the others, it has the numbers."
    if len(shown) < len(records):
        said += f" {count(len(records) - len(shown), 'epoch')} of {len(records):,} did not fit or could not be read."
    return f'{said} run.export("report.html", max_megabytes=...) sets how much there is. Click into it and press ? for the keys.'


def _index(source: Source, record: Epoch) -> dict[str, Any]:
    """What the page lists, filters and sorts an epoch by."""
    index = source.index(record.index)
    least = [source.least(record.index, calls)[index.rows].astype("<f4").tobytes() for calls in (False, True)]
    columns = packed(index, redact_texts([text_of(example) for example in index.examples]))
    about = {"epoch": index.epoch, "inferred": record.selection.inferred, "version": None}  # it has ended
    labels = redact(source.labels_and_tags(record.index))
    return {"index": _compressed([(about, [*columns, *least])]), "labels": labels, "bodies": {}}


def _bodies(source: Source, record: Epoch, room: _Room) -> dict[int, str]:
    """By group: what its rollouts say, in the order of the index."""
    index: BrowseIndex = source.index(record.index)
    found: dict[int, str] = {}
    for group in group_order(index, np.ones(len(index), dtype=bool), "spread").tolist():
        rows = index.rows[index.starts[group] : index.starts[group + 1]].tolist()
        bodies = [_masked(rollout_body(each)) for each in source.rows.rollouts(record, rows)]
        text = _compressed([(body.about, body.columns) for body in bodies])
        if not room.take(text):
            break
        found[group] = text
    return found


def _compressed(items: Sequence[_Item]) -> str:
    """Records with their columns as base64 of deflated bytes: the length of a JSON text (uint32), the text, the columns."""
    head = [[about, [len(column) for column in columns]] for about, columns in items]
    text = json.dumps(finite(head))
    if redact_text(text) != text:
        text = json.dumps(finite(redact(head)))
    text = text.encode("ascii")
    blobs = [column for _, columns in items for column in columns]
    return base64.b64encode(zlib.compress(b"".join([len(text).to_bytes(4, "little"), text, *blobs]))).decode("ascii")


def _masked(body: RolloutBody) -> RolloutBody:
    """A body without known secrets. Of a turn whose tokens together are one, the text becomes a single token."""
    columns = list(body.columns)
    joined = columns[0] + columns[2] + columns[7]
    if redact_text(joined.decode("utf-8")) != joined.decode("utf-8"):
        texts, tokens, others = (_texts(columns[place], columns[place + 1]) for place in (0, 2, 7))
        for turn in body.about["turns"]:
            turn_tokens = slice(turn["start"], turn["stop"])
            said = "".join(tokens[turn_tokens])
            if redact_text(said) != said:
                tokens[turn_tokens] = [redact_text(said), *[""] * (turn["stop"] - turn["start"] - 1)]
                others = [""] * len(others)  # they may begin with it
        for place, found in ((0, redact_texts(texts)), (2, tokens), (7, redact_texts(others))):
            columns[place], columns[place + 1] = packed_texts(found)
        if not columns[6]:  # no alternatives, so that no text of one is expected
            columns[7], columns[8] = b"", b""
    return RolloutBody(body.about, columns)


def _texts(blob: bytes, offsets: bytes) -> list[str]:
    ends = np.frombuffer(offsets, "<u4").tolist()
    return [blob[start:end].decode("utf-8") for start, end in pairwise(ends)]
