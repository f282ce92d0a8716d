"""Finds what a name such as "e3/q17/2" means: a rollout, a group ("e3/q17") or an epoch ("e3").

A name is looked up among those of the epoch's rollouts and is not taken apart, as ids of examples may contain slashes. Where
"e0/a/2" is both a rollout of the example "a" and the example "a/2", it is the rollout.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from ..analysis.trajectory_names import trajectory_names
from ..errors import RunError
from ..store.labels import Labelled
from ..text import plain, short
from ..types import Epoch
from .trajectories import EpochColumns, positions

__all__ = [
    "find_names",
    "is_name",
]

_NAME = re.compile(r"e(\d{1,12})(?:/(.*))?", re.DOTALL)


def is_name(value: Any) -> bool:
    """Whether a value looks like the name of a rollout, a group or an epoch. An example's id may look so too."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def find_names(names: Iterable[str], epoch_of: Callable[[int], Epoch]) -> list[Labelled]:
    """Find what names mean.

    Args:
        names: The names.
        epoch_of: Returns an epoch's record by its number; raises IndexError where there is none.

    Returns:
        One for each name, in their order.

    Raises:
        RunError: A name is none, or nothing of the epoch has it.
        IndexError: There is no such epoch.
    """
    wanted: dict[int, dict[str, None]] = {}
    places = []
    for name in names:
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise RunError(
                f"{short(repr(name), 80)} is no name of a rollout. Expected one as in the column `trajectory` of "
                'run.trajectories(), such as "e3/q17/2"; "e3/q17" is a group, "e3" an epoch.'
            )
        epoch, rest = int(match[1]), match[2]
        places.append((epoch, None if rest is None else plain(rest)))
        wanted.setdefault(epoch, {})
        if rest is not None:
            wanted[epoch][plain(rest)] = None

    found = {number: _find_in(epoch_of(number), rests) for number, rests in wanted.items()}
    return [Labelled(f"e{number}", number) if rest is None else found[number][rest] for number, rest in places]


def _find_in(epoch: Epoch, rests: Iterable[str]) -> dict[str, Labelled]:
    """What the parts of names after "e3/" mean."""
    rests = list(rests)
    if not rests:
        return {}
    columns = EpochColumns(epoch)

    # Only examples that a name may begin with are worth a look: an epoch may have very many rollouts.
    beginnings = set()
    for rest in rests:
        parts = rest.split("/")
        beginnings |= {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
    examples = columns.examples
    texts = {id(example): example for example in examples}
    near = {key: text for key, example in texts.items() if (text := plain(example)) in beginnings}
    rows = [row for row, example in enumerate(examples) if id(example) in near]
    groups: dict[str, Labelled] = {}
    rollouts: dict[str, Labelled] = {}
    if rows:
        all_generations = columns.generations(columns.values(["generation"])["generation"])
        all_places = [*positions(columns.sizes).tolist(), *range(len(columns.failures))]
        of_rows = [[values[row] for row in rows] for values in (examples, all_generations, all_places)]
        names = trajectory_names(epoch.index, *of_rows)
        head = f"e{epoch.index}/"
        for name, example, generation in zip(map(plain, names), *of_rows[:2], strict=True):
            text = near[id(example)]
            groups.setdefault(text, Labelled(head + text, epoch.index, example))
            told = name.rpartition("/")[2] if generation is None else generation
            rollouts.setdefault(name.removeprefix(head), Labelled(name, epoch.index, example, told))

    found = {}
    for rest in rests:
        one = rollouts.get(rest) or groups.get(rest)
        if one is None:
            raise RunError(_unknown(epoch, rest, groups, rollouts))
        found[rest] = one
    return found


def _unknown(epoch: Epoch, rest: str, groups: dict[str, Labelled], rollouts: dict[str, Labelled]) -> str:
    name = short(f"e{epoch.index}/{rest}", 80)
    example = rest.rpartition("/")[0]
    if example in groups:
        last = [found.rpartition("/")[2] for found, one in rollouts.items() if plain(one.example) == example]
        return f"{name!r} names no rollout: example {short(example, 60)!r} has the generations {', '.join(last[:12])} there."
    known = [plain(each) for each in epoch.statistics.example_ids]
    near = difflib.get_close_matches(example or rest, known, n=1, cutoff=0.6)
    hint = f" Did you mean {short(near[0], 60)!r}?" if near else ""
    return f"{name!r} names nothing of epoch {epoch.index}, whose examples are {', '.join(known[:6])}, ...{hint}"
