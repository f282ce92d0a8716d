"""The rollouts of an epoch as columns: to list, filter and sort many thousands of them without reading what they say.

A group is an example's rollouts, the failed ones too, by generation. An example all of whose rollouts failed is a group as
well. All functions are pure; `packed` makes the columns bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ..errors import ConfigError, did_you_mean
from ..store.reader import trajectory_columns
from ..store.trajectory_table import table_of
from ..text import text_of
from ..training.metrics import advantages
from ..types import Epoch, same_id
from .learning_signal import SIGNALS, best_and_worst, group_signals

__all__ = [
    "CUT",
    "FAILED",
    "SIGNAL_NAMES",
    "SORTS",
    "BrowseFilter",
    "BrowseIndex",
    "browse_index",
    "group_order",
    "leading",
    "least_likely",
    "matching",
    "means_before",
    "packed",
    "packed_texts",
]

SIGNAL_NAMES = tuple(SIGNALS)
FAILED, CUT = 1, 2
"""Bits of BrowseIndex.flags: the rollout failed; its last sampled turn was cut at the token limit."""
SORTS = {
    "recorded": "as recorded",
    "spread": "rewards differ most",
    "mean": "lowest mean reward",
    "advantage": "largest advantage",
    "length": "longest",
    "unlikely": "least likely token",
    "call": "least likely tool call",
    "change": "changed most since the epoch before",
}
"""By what groups can be sorted, in words."""
LARGEST_COUNT = 65_535


@dataclass(frozen=True, eq=False)
class BrowseIndex:
    """One epoch: G groups, N rollouts, group by group."""

    epoch: int
    examples: Sequence[Any]
    """(G,) ids of the examples."""
    starts: np.ndarray
    """(G + 1,) uint32: group g has the rollouts starts[g] to starts[g + 1] - 1."""
    signals: np.ndarray
    """(G,) uint8: places in SIGNAL_NAMES."""
    means: np.ndarray
    """(G,) float32: mean reward; NaN if there is none."""
    spreads: np.ndarray
    """(G,) float32: largest minus smallest reward; NaN if there is none."""
    before: np.ndarray
    """(G,) float32: mean reward in the epoch in which the example was drawn before; NaN the first time."""
    rewards: np.ndarray
    """(N,) float32; NaN = no reward."""
    advantages: np.ndarray
    """(N,) float32; NaN = none."""
    tokens: np.ndarray
    """(N,) uint32: tokens that the policy sampled; 0 for a failed rollout."""
    turns: np.ndarray
    """(N,) uint16: messages; 0 for a failed rollout. 65,535 means at least that many."""
    flags: np.ndarray
    """(N,) uint8: FAILED, CUT."""
    generations: np.ndarray
    """(N,) int32; where none was recorded, -1 minus the rollout's place in its group (a failed one's among the failures)."""
    rows: np.ndarray
    """(N,) uint32: the row of the epoch's file."""

    def __len__(self) -> int:
        return len(self.rows)

    def generation_of(self, rollout: int) -> int | str:
        """The generation of a rollout; "#2" for the third one of its group where none was recorded."""
        found = int(self.generations[rollout])
        return found if found >= 0 else f"#{-1 - found}"

    def name_of(self, rollout: int) -> str:
        """Such as "e3/q17/2", as the frame of trajectories has it."""
        return f"e{self.epoch}/{text_of(self.examples[int(self.groups_of[rollout])])}/{self.generation_of(rollout)}"

    @property
    def groups_of(self) -> np.ndarray:
        """(N,) the group of each rollout."""
        return np.repeat(np.arange(len(self.examples)), np.diff(self.starts.astype(np.int64)))

    def group_of_example(self, example: Any) -> int | None:
        """The group of an example, whose id is compared by its text; None if the epoch has none."""
        for group, found in enumerate(self.examples):
            if same_id(found, example):
                return group
        return None


def browse_index(epoch: Epoch, earlier: Sequence[Epoch] = (), before: np.ndarray | None = None) -> BrowseIndex:
    """Make the index of an epoch.

    Args:
        epoch: Its record, complete or not.
        earlier: The epochs before it, which give the best and the worst reward so far.
        before: (G,) the mean reward of each group's example in the epoch before, as `means_before` finds it; NaN for none.

    Returns:
        The index.
    """
    statistics = epoch.statistics
    count, groups = len(statistics.rewards), len(statistics)
    table = _columns_of(epoch)
    failed = len(table) - count

    # Failed rollouts belong to the group of their example; an example that has no group gets one.
    examples = list(statistics.example_ids)
    group_of = np.repeat(np.arange(groups), np.diff(statistics.offsets))
    if failed:
        place_of = {text_of(example): place for place, example in enumerate(examples)}
        of_failures = []
        for example in table.column("example").slice(count).to_pylist():
            if text_of(example) not in place_of:
                place_of[text_of(example)] = len(examples)
                examples.append(example)
            of_failures.append(place_of[text_of(example)])
        group_of = np.concatenate([group_of, of_failures]).astype(np.int64)

    # By group, then by generation; a generation that was not recorded comes after the others, in the recorded order.
    generations = _numbers(table.column("generation"), -1, np.int64)
    unknown = (generations < 0) | (generations > 2**31 - 1)
    places = np.arange(len(table)) - np.concatenate([np.repeat(statistics.offsets[:-1], np.diff(statistics.offsets)),
                                                     np.full(failed, count)])  # fmt: skip
    rank = np.where(unknown, 2**31, generations)
    generations = np.where(unknown, -1 - places, generations)
    rows = np.lexsort((np.arange(len(table)), rank, group_of))

    missing = np.full(failed, np.nan)
    extra = np.full(len(examples) - groups, np.nan)
    best, worst = best_and_worst([*earlier, epoch])
    signals = [SIGNAL_NAMES.index(signal) for signal in group_signals([epoch], worst, best)]
    signals += [SIGNAL_NAMES.index("failed")] * len(extra)
    flags = np.zeros(len(table), np.uint8)
    flags[count:] |= FAILED
    flags[np.array(table.column("finish_reason").to_pylist(), dtype=object) == "length"] |= CUT
    counts = np.bincount(group_of, minlength=len(examples))
    known = extra if before is None else before
    return BrowseIndex(
        epoch=epoch.index,
        examples=examples,
        starts=np.concatenate([[0], np.cumsum(counts)]).astype("<u4"),
        signals=np.array(signals, np.uint8),
        means=_narrow(np.concatenate([statistics.means, extra])),
        spreads=_narrow(np.concatenate([statistics.spreads, extra])),
        before=_narrow(np.concatenate([known, np.full(len(examples) - len(known), np.nan)])),
        rewards=_narrow(np.concatenate([statistics.rewards, missing]))[rows],
        advantages=_narrow(np.concatenate([advantages(statistics), missing]))[rows],
        tokens=_numbers(table.column("tokens"), 0, np.int64)[rows].clip(0, 2**32 - 1).astype("<u4"),
        turns=_numbers(table.column("turns"), 0, np.int64)[rows].clip(0, LARGEST_COUNT).astype("<u2"),
        flags=flags[rows],
        generations=generations[rows].astype("<i4"),
        rows=rows.astype("<u4"),
    )


def means_before(epoch: Epoch, earlier: Sequence[Epoch]) -> np.ndarray:
    """(G,) the mean reward of each group's example when it was drawn before; NaN the first time."""
    found = np.full(len(epoch.statistics), np.nan)
    wanted = {text_of(example): place for place, example in enumerate(epoch.statistics.example_ids)}
    for record in reversed(earlier):
        if not wanted:
            break
        for example, mean in zip(record.statistics.example_ids, record.statistics.means.tolist(), strict=True):
            place = wanted.pop(text_of(example), None)
            if place is not None:
                found[place] = mean
    return found


def _columns_of(epoch: Epoch) -> Any:
    """The trajectories and, after them, the failures."""
    names = ["example", "generation", "turns", "tokens", "finish_reason"]
    read = getattr(epoch, "columns", None)
    if read is None:
        return table_of(epoch.collection.trajectories, epoch.collection.failures, names)
    if not epoch.metrics.failures:
        return trajectory_columns(epoch, names)
    return read(names)


def _numbers(column: Any, missing: int, kind: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return np.array(pc.fill_null(column, missing).to_numpy(), dtype=kind)  # a copy, to write into


def _narrow(values: np.ndarray) -> np.ndarray:
    """As float32; a value beyond it becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype("<f4")


def least_likely(epoch: Epoch, calls: bool = False) -> np.ndarray:
    """(R,) the logprob of the least likely sampled token of each row of the epoch's file; NaN where there is none.

    Args:
        epoch: Its record.
        calls: Whether only messages that call a tool count.
    """
    import pyarrow.compute as pc

    table = trajectory_columns(epoch, ["logprobs", "item_metadata"] if calls else ["logprobs"])
    messages = table.column("logprobs").combine_chunks()
    found = np.full(len(messages) + epoch.metrics.failures, np.nan)
    tokens = messages.flatten()  # one list per message
    values = tokens.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    if not len(values):
        return found
    per_message = np.nan_to_num(tokens.value_lengths().to_numpy(zero_copy_only=False)).astype(np.int64)
    if calls:
        metadata = table.column("item_metadata").combine_chunks().flatten()  # JSON
        matching_regex: Any = pc.match_substring_regex  # type: ignore[attr-defined]  # made when it is imported
        has_call = pc.fill_null(matching_regex(metadata, _CALL), False).to_numpy(zero_copy_only=False)
        values = np.where(np.repeat(has_call, per_message), values, np.nan)
    per_row = np.nan_to_num(messages.value_lengths().to_numpy(zero_copy_only=False)).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(per_message)])
    starts = ends[np.concatenate([[0], np.cumsum(per_row)])]
    has = starts[1:] > starts[:-1]
    found[: len(messages)][has] = np.fmin.reduceat(values, starts[:-1][has])
    return found


_CALL = r'"tool_calls":\s*(\[\s*)?[{"]'


# ── which rollouts, in which order ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class BrowseFilter:
    """Which rollouts are listed. What is None does not matter; a rollout must meet everything else."""

    signal: str | None = None
    """Why its group teaches or not: a key of `analysis.learning_signal.SIGNALS`."""
    failed: bool | None = None
    cut: bool | None = None
    """Whether its last sampled turn was cut at the token limit."""
    missing: bool | None = None
    """Whether it finished without a reward."""
    reward: tuple[float | None, float | None] | None = None
    """Lowest and highest reward, both included."""
    turns: tuple[float | None, float | None] | None = None
    """Fewest and most messages."""
    label: str | None = None
    """A label's name; "*" for any label."""
    text: str | None = None
    """What one of its messages, a tool call or its error says, in upper or lower case; as `Run.find`."""
    regex: str | None = None
    """The same as a regular expression."""
    where: str | None = None
    """A condition on the columns of `run.trajectories()`, as in `Run.find`: "tokens > 500 and 'hacked' in labels"."""

    @classmethod
    def of(cls, given: Mapping[str, Any] | BrowseFilter | None) -> BrowseFilter:
        """Check a filter.

        Args:
            given: Its fields by name. None or empty: every rollout.

        Returns:
            The filter.

        Raises:
            ConfigError: There is no such field, or its value does not fit.
        """
        if isinstance(given, BrowseFilter):
            return given
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"found filter={given!r}; expected a mapping such as {{'failed': True, 'reward': (0, 0.5)}}."
            )
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in names:
                raise ConfigError(f"a filter has no field {name!r}. {did_you_mean(str(name), names)}")
            if value is not None:
                values[name] = _checked(name, value)
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The fields that matter."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _checked(name: str, value: Any) -> Any:
    """The value of a filter's field. Raises ConfigError where it does not fit."""
    if name in ("failed", "cut", "missing"):
        if not isinstance(value, bool):
            raise ConfigError(f"found {name}={value!r} in a filter; expected True, False or None.")
        return value
    if name in ("reward", "turns"):
        pair = tuple(value) if isinstance(value, list | tuple) else ()
        if len(pair) != 2 or any(each is not None and not _is_number(each) for each in pair):
            raise ConfigError(f"found {name}={value!r} in a filter; expected (lowest, highest), None for no limit.")
        return pair
    if not isinstance(value, str):
        raise ConfigError(f"found {name}={value!r} in a filter; expected a text.")
    if name == "signal" and value not in SIGNALS:
        raise ConfigError(f"there is no signal {value!r}. {did_you_mean(value, SIGNALS)}")
    return value or None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def matching(
    index: BrowseIndex,
    wanted: BrowseFilter,
    hits: np.ndarray | None = None,
    labelled: np.ndarray | None = None,
) -> np.ndarray:
    """Which rollouts a filter lets through.

    Args:
        index: The epoch's index.
        wanted: The filter.
        hits: (R,) bool by row of the file: whether the rollout has the filter's text and meets its condition. None: not
            looked for.
        labelled: (N,) bool: whether the rollout has the filter's label. None: not looked for.

    Returns:
        (N,) bool.
    """
    found = np.ones(len(index), dtype=bool)
    if wanted.signal is not None:
        found &= (index.signals == SIGNAL_NAMES.index(wanted.signal))[index.groups_of]
    failed = (index.flags & FAILED) != 0
    if wanted.failed is not None:
        found &= failed == wanted.failed
    if wanted.cut is not None:
        found &= ((index.flags & CUT) != 0) == wanted.cut
    if wanted.missing is not None:
        found &= (np.isnan(index.rewards) & ~failed) == wanted.missing
    if wanted.reward is not None:
        found &= _between(index.rewards, wanted.reward)
    if wanted.turns is not None:
        found &= _between(index.turns, wanted.turns) & ~failed
    if hits is not None:
        found &= hits[index.rows]
    if labelled is not None:
        found &= labelled
    return found


def _between(values: np.ndarray, limits: tuple[float | None, float | None]) -> np.ndarray:
    """Missing values are not between anything. The limits are rounded as the values are."""
    low, high = limits
    found = ~np.isnan(values.astype(np.float64))
    if low is not None:
        found &= values >= np.float32(low)
    if high is not None:
        found &= values <= np.float32(high)
    return found


def group_order(index: BrowseIndex, found: np.ndarray, sort: str, least: np.ndarray | None = None) -> np.ndarray:
    """The groups to list, in order.

    Args:
        index: The epoch's index.
        found: (N,) bool: which rollouts are listed. A group without any is not.
        sort: A key of SORTS.
        least: (R,) as `least_likely` finds it; needed for "unlikely" and, of calls, for "call".

    Returns:
        Places of groups, uint32. Groups without a value to sort by come last; equal ones stay as recorded.

    Raises:
        ConfigError: There is no such order.
    """
    if sort not in SORTS:
        raise ConfigError(f"found sort={sort!r}. {did_you_mean(sort, SORTS)}")
    starts = index.starts[:-1].astype(np.int64)
    listed = np.zeros(len(starts), dtype=bool)
    listed[index.groups_of[found]] = True
    if sort == "recorded":
        return np.flatnonzero(listed).astype("<u4")
    # The smallest key comes first.
    if sort == "mean":
        key = index.means
    elif sort == "spread":
        key = -index.spreads
    elif sort == "change":
        key = -np.abs(index.means - index.before)
    else:
        values = _sorted_by(index, sort, least)
        assert values is not None
        key = -_largest(values, starts, found)
    order = np.argsort(np.where(np.isnan(key), np.inf, key), kind="stable")
    return order[listed[order]].astype("<u4")


def leading(index: BrowseIndex, found: np.ndarray, sort: str, least: np.ndarray | None = None) -> np.ndarray:
    """(G,) of each group the listed rollout that it is sorted by, which is the one to open first; where a group is sorted by
    something of its own, the first. uint32. A group without a listed rollout has any. Arguments as for `group_order`."""
    values = _sorted_by(index, sort, least)
    if not len(index):
        return np.empty(0, "<u4")
    starts = index.starts[:-1].astype(np.int64)
    key = np.zeros(len(index)) if values is None else np.where(np.isnan(values), -np.inf, values)
    largest = np.maximum.reduceat(np.where(found, key, -np.inf), starts)
    is_largest = found & (key == largest[index.groups_of])
    places = np.where(is_largest, np.arange(len(index)), len(index))
    return np.minimum(np.minimum.reduceat(places, starts), len(index) - 1).astype("<u4")


def _sorted_by(index: BrowseIndex, sort: str, least: np.ndarray | None) -> np.ndarray | None:
    """(N,) what groups are sorted by the largest of; None for an order by something of the group itself."""
    if sort == "length":
        return index.tokens.astype(np.float64)
    if sort == "advantage":
        return np.abs(index.advantages.astype(np.float64))
    if sort in ("unlikely", "call"):
        assert least is not None
        return -least[index.rows]
    return None


def _largest(values: np.ndarray, starts: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(G,) the largest value of the listed rollouts of each group; NaN without any."""
    if not len(values):
        return np.empty(0)
    return np.fmax.reduceat(np.where(found, values, np.nan), starts)


# ── as bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def packed_texts(texts: Sequence[str]) -> tuple[bytes, bytes]:
    """Texts as one UTF-8 blob, and where each begins and the last one ends: uint32. A lone surrogate becomes its escape."""
    offsets = np.zeros(len(texts) + 1, "<u4")
    joined = "".join(texts)
    if joined.isascii():
        lengths = list(map(len, texts))
    else:
        lengths = [len(text) if text.isascii() else len(_utf8(text)) for text in texts]
    np.cumsum(lengths, out=offsets[1:])
    return _utf8(joined), offsets.tobytes()


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def packed(index: BrowseIndex, examples: Sequence[str]) -> list[bytes]:
    """The columns as bytes, little endian: starts, signals, examples (a blob, then offsets), means, spreads, before, rewards,
    advantages, tokens, turns, flags, generations, rows.

    Args:
        index: The index.
        examples: (G,) the examples' ids as texts.
    """
    columns = (index.means, index.spreads, index.before, index.rewards, index.advantages, index.tokens)
    columns += (index.turns, index.flags, index.generations, index.rows)
    return [
        index.starts.tobytes(),
        index.signals.tobytes(),
        *packed_texts(examples),
        *(column.tobytes() for column in columns),
    ]
