"""`finetune-nb show`, `report` and `compare`: what runs recorded, in the terminal or as a page."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..analysis.messages import called_functions
from ..errors import FinetuneError
from ..llms.chat_messages import content_text
from ..run.comparison import compare
from ..run.run import Run
from ..text import count, number, one_line
from ..types import DPOItem, EpisodeItem, MessageKey
from ..views.rollout import RolloutView
from ..views.summary import epoch_text
from .output import say

__all__ = [
    "compare_runs",
    "conversation_text",
    "show_run",
    "write_report",
]

WIDTH = 100
"""Columns of a conversation, at most."""


def show_run(
    folder: Path,
    name: str | None = None,
    epoch: int | None = None,
    example: str | None = None,
    generation: int | None = None,
) -> int:
    """Print a run as a line an epoch, or one of its rollouts as a conversation.

    Args:
        folder: The run's folder.
        name: A rollout, such as "e3/q17/2".
        epoch: Its epoch; negative counts from the newest.
        example: Its example.
        generation: Its generation.

    Returns:
        The exit code, 0.

    Raises:
        FinetuneError: There is no such run, or nothing of that name in it.
    """
    with closing(Run.open(folder)) as run:
        if name is None and epoch is None and example is None and generation is None:
            say(f"run {one_line(run.id)}  {run.state}  {count(len(run), 'epoch')}  {one_line(folder, 1000)}")
            for each in run:
                say(epoch_text(each))
            return 0
        if name is not None and (epoch, example, generation) != (None, None, None):
            raise FinetuneError(
                f"found a name, {name!r}, beside --epoch, --example or --generation; give one or the other."
            )
        try:
            view = run.show(name) if name is not None else run.show(epoch, example, generation)
        except IndexError as error:
            raise FinetuneError(str(error)) from error
        say(conversation_text(view, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)))
    return 0


def conversation_text(view: RolloutView, width: int = WIDTH) -> str:
    """A rollout as text: a line about it and its group, then every turn whole.

    Args:
        view: What `run.show` returns.
        width: Columns; longer lines are wrapped.
    """
    head, *rest = repr(view).splitlines()
    lines = [head, *(line.strip() for line in rest[:1])]
    if view.trajectory is None:
        return "\n".join(lines)
    for place, item in enumerate(view.trajectory.episode):
        lines += ["", _title(place, item), *_indented(_said(item), width)]
    return "\n".join(lines)


def _title(place: int, item: EpisodeItem | DPOItem) -> str:
    """The line above a turn: its number, who speaks, how many tokens were sampled and how it ended."""
    if isinstance(item, DPOItem):
        return f"── {place} preference"
    told = item.metadata or {}
    notes = [one_line(told[MessageKey.NAME])] if told.get(MessageKey.NAME) else []
    if isinstance(item.logprobs, Sequence) and len(item.logprobs):
        notes.append(f"{number(len(item.logprobs))} tokens")
    if told.get(MessageKey.FINISH_REASON) not in (None, "stop", "tool_calls"):
        notes.append(f"ended by {one_line(told[MessageKey.FINISH_REASON])}")
    return " · ".join([f"── {place} {item.role}", *notes])


def _said(item: EpisodeItem | DPOItem) -> Iterator[str]:
    """Thinking, text and tool calls, one after the other."""
    if isinstance(item, DPOItem):
        yield f"chosen: {content_text(item.chosen_response)}"
        yield f"rejected: {content_text(item.rejected_response)}"
        return
    thought = (item.metadata or {}).get(MessageKey.REASONING_CONTENT)
    if thought:
        yield f"[thinking] {content_text(thought)}"
    text = content_text(item.content)
    calls = called_functions(item)
    if text or not calls:
        yield text or "(empty)"
    for call in calls if isinstance(calls, list) else [calls]:
        yield f"→ {_call(call)}"


def _call(call: Any) -> str:
    """A tool call as the line that would make it: add(a=2, b=2); as JSON where it has another form."""
    try:
        arguments = json.loads(call["arguments"])
        return f"{call['name']}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    except (AttributeError, KeyError, TypeError, ValueError):
        return json.dumps(call, ensure_ascii=False, default=str)


def _indented(texts: Iterator[str], width: int) -> list[str]:
    lines = []
    for text in texts:
        for line in text.splitlines() or [""]:
            lines += textwrap.wrap(line, max(20, width - 3), drop_whitespace=False, break_on_hyphens=False) or [""]
    return [f"   {line}".rstrip() for line in lines]


def write_report(folder: Path, out: Path | None = None, browser: bool = True) -> int:
    """Write the report of a run, one HTML file.

    Args:
        folder: The run's folder.
        out: The file. None: the run's name and ".html", here.
        browser: Whether the trajectory browser is in it.

    Returns:
        The exit code, 0.

    Raises:
        FinetuneError: There is no such run.
    """
    with closing(Run.open(folder)) as run:
        say(run.export(out or Path(f"{run.id}.html"), browser=browser))
    return 0


def compare_runs(folders: Sequence[Path], rewards: str | None = None) -> int:
    """Print how far runs are above or below the first one, on the examples that they share.

    Args:
        folders: The folders of two runs or more.
        rewards: As in `finetune_nb.compare`.

    Returns:
        The exit code, 0.

    Raises:
        FinetuneError: There is no such run, or they cannot be compared.
    """
    runs = [Run.open(folder) for folder in folders]
    try:
        say(repr(compare(runs, rewards=rewards)))
    finally:
        for run in runs:
            run.close()
    return 0
