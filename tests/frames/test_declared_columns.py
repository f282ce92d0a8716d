"""Each frame has the columns that it declares, and its docstring has the same ones; all are made from the file's columns."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from factories import item, make_epoch, make_trajectory
from records import epoch_of, failed, stored, with_tool

from finetune_nb import frames
from finetune_nb.frames.columns import objects
from finetune_nb.frames.epochs import EPOCHS, GROUPS, JOURNAL
from finetune_nb.frames.labels import LABELS
from finetune_nb.frames.messages import MESSAGES, TOKENS
from finetune_nb.frames.trajectories import COLUMNS
from finetune_nb.store.labels import Label
from finetune_nb.types import Change, LLMCall, RolloutFailure, Trajectory

EPOCH = make_epoch(
    {"a": [1.0, None], "b": [0.5, 0.25]},
    failures=[failed("a")],
    scores={"name": 1.0},
    train={"metric": 0.5},
    validation=0.5,
)
EPOCH = replace(EPOCH, validations=(replace(EPOCH.validations[0], scores={"name": 0.5}),))
DECLARED = {
    frames.trajectories: (COLUMNS, [EPOCH]),
    frames.messages: (MESSAGES, [EPOCH]),
    frames.tokens: (TOKENS, [EPOCH]),
    frames.groups: (GROUPS, [EPOCH]),
    frames.epochs: (EPOCHS, [EPOCH]),
    frames.labels: (LABELS, [Label("e0/a/0", 0, "a", 0, "good", 0.5, "a note", "ann", 0.0)]),
    frames.journal: (JOURNAL, [Change(0.0, "code", "percentile", 0.5, 0.8, None)]),
}
"""Frame -> what it declares, and records to make it of."""
named = pytest.mark.parametrize("make", DECLARED, ids=lambda make: make.__name__)


def dtype_of(column: pd.Series) -> str:
    """As a declaration has it. Before pandas 3, text is kept as objects."""
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        return f"datetime, {column.dtype.tz}"
    return str(column.dtype)


def expected(declared: str) -> set[str]:
    return {declared, "object"} if declared == "str" else {declared}


@named
def test_a_docstring_has_a_line_for_each_declared_column_in_their_order(make):
    table = re.search(r"^ *=+ =+ =+\n(.*?)^ *=+ =+ =+$", make.__doc__, re.DOTALL | re.MULTILINE)
    assert table
    rows = [line.strip() for line in table[1].splitlines() if not line.startswith(" " * 20)]
    found = [re.match(r"(\S+) +(datetime, UTC|\S+) +\S", row) for row in rows]
    assert [row and row.groups() for row in found] == [(column.name, column.dtype) for column in DECLARED[make][0]]


@named
def test_a_frame_has_the_declared_columns_with_their_dtypes_with_rows_and_without(make):
    columns, records = DECLARED[make]
    frame, empty = make(records), make([])
    for column in columns:
        if column.prefix is None:
            assert dtype_of(frame[column.name]) in expected(column.dtype)
            assert dtype_of(empty[column.name]) == dtype_of(frame[column.name])
        else:
            ours = [name for name in frame if name.startswith(column.prefix)]
            assert ours and {dtype_of(frame[name]) for name in ours} == {column.dtype}
            assert not [name for name in empty if name.startswith(column.prefix)]
    fixed = [column.name for column in columns if column.prefix is None]
    assert empty.columns.tolist() == fixed
    assert frame.columns.tolist()[: len(fixed)] == fixed


@named
def test_a_frame_has_just_the_columns_that_are_asked_for(make):
    _, records = DECLARED[make]
    whole = make(records)
    for name in whole:
        alone = make(records, columns=name)
        assert alone.columns.tolist() == [name]
        pd.testing.assert_frame_equal(alone, whole[[name]])


# ── values that do not fit into the file's columns ───────────────────────────────────────────────────────────────────


def frames_of(epoch, tmp_path):
    """The frames of an epoch in memory, which are those of the same epoch from its file."""
    (read,) = stored(tmp_path, epoch)
    for make in (frames.trajectories, frames.messages, frames.tokens, frames.groups):
        pd.testing.assert_frame_equal(make([epoch]), make([read]))
    return frames.trajectories([epoch]), frames.messages([epoch]), frames.tokens([epoch])


def test_a_count_of_numpy_is_a_count_from_memory_and_from_the_file(tmp_path):
    group = [make_trajectory(1.0, "q", np.int64(3), policy_version=np.int32(4))]  # type: ignore[arg-type]
    trajectories, _, _ = frames_of(epoch_of([group]), tmp_path)
    assert (trajectories.generation[0], trajectories.policy_version[0]) == (3, 4)
    assert trajectories.trajectory[0] == "e0/q/3"


def test_a_generation_that_is_no_count_is_in_the_name_and_missing_in_the_column(tmp_path):
    group = [make_trajectory(1.0, "q", generation) for generation in (2**63, "first", True, None, 5)]  # type: ignore[arg-type]
    trajectories, _, tokens = frames_of(epoch_of([group]), tmp_path)
    names = ["e0/q/9223372036854775808", "e0/q/first", "e0/q/True", "e0/q/#3", "e0/q/5"]
    assert trajectories.trajectory.tolist() == names
    assert trajectories.generation.tolist() == [pd.NA, pd.NA, pd.NA, pd.NA, 5]
    assert tokens.trajectory.tolist() == names


def test_an_error_keeps_half_a_character_and_one_that_speaks_of_its_escape_is_as_it_was(tmp_path):
    said = ["half: \ud800", "'utf-8' codec can't encode character '\\ud800'", None, ""]
    group = [make_trajectory(None, "q", number, reward_error=error) for number, error in enumerate(said)]
    trajectories, _, _ = frames_of(epoch_of([group]), tmp_path)
    assert trajectories.error[:2].tolist() == ["half: [U+D800]", said[1]]
    assert math.isnan(trajectories.error[2]) and trajectories.error[3] == ""


def test_lists_that_do_not_fit_into_their_columns_are_counted_and_shown_from_where_they_stand(tmp_path):
    odd = [
        item("assistant", "ab", [-1.0, -2.0], token_ids=[2**70, 7], tokens=["a", None], prompt_token_ids=["x", 1.5, 2]),
        item("assistant", "cd", [-1.0, -2.0], token_ids=[1, 2], tokens=["c", "d"], prompt_token_ids=[1]),
        item("assistant", "ef", [-1, -2], token_ids="12", tokens=[], prompt_token_ids="12"),
        item("user", "gh", prompt_token_ids=[3, 4]),
    ]
    epoch = epoch_of([[Trajectory(episode=odd, reward=1.0, metadata={"id": "q", "generation": 0})]])
    _, messages, tokens = frames_of(epoch, tmp_path)
    assert messages.prompt_tokens.tolist() == [3, 1, pd.NA, 2]
    assert messages.tokens.tolist() == [2, 2, 2, pd.NA]
    assert messages.mean_logprob[:3].tolist() == [-1.5, -1.5, -1.5]
    assert tokens.token_id.tolist() == [pd.NA, 7, 1, 2, pd.NA, pd.NA]
    assert tokens.token.fillna("?").tolist() == ["a", "?", "c", "d", "?", "?"]
    assert tokens.logprob.tolist() == [-1.0, -2.0] * 3


def test_texts_of_tokens_come_with_openais_logprobs_only_where_no_others_are_recorded(tmp_path):
    openai = {"content": [{"token": "from logprobs", "logprob": -1.0}]}
    episode = [item("assistant", "a", openai, tokens=["recorded"]), item("assistant", "b", openai)]
    epoch = epoch_of([[Trajectory(episode=episode, reward=1.0, metadata={"id": "q", "generation": 0})]])
    _, _, tokens = frames_of(epoch, tmp_path)
    assert tokens.token.tolist() == ["recorded", "from logprobs"]


def test_logprobs_that_nobody_can_read_are_missing_and_no_zero(tmp_path):
    episode = [item("assistant", "a", "none of them"), item("assistant", "b", []), item("user", "c", [-1.0])]
    for each, logprobs in zip(episode, ("none of them", [], [-1.0]), strict=True):
        each.logprobs = logprobs
    epoch = epoch_of([[Trajectory(episode=episode, reward=1.0, metadata={"id": "q", "generation": 0})]])
    _, messages, tokens = frames_of(epoch, tmp_path)
    assert messages.tokens.tolist() == [pd.NA, 0, pd.NA]
    assert messages.mean_logprob.isna().all()
    assert len(tokens) == 0


def test_a_failed_rollout_is_told_by_its_last_call_in_whatever_form_its_messages_came(tmp_path):
    (step,) = failed().steps
    call = step.payload.data.payload  # type: ignore[union-attr]
    assert isinstance(call, LLMCall)
    parts = [{"type": "text", "text": "2+2"}]
    context = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]
    call.messages[:] = [*context, {"role": "tool", "content": "4", "tool_call_id": "c", "name": "add"}]
    epoch = make_epoch([[1.0]], failures=[RolloutFailure("q0", 9, "E", [step])])
    _, messages, _ = frames_of(epoch, tmp_path)
    rows = messages[messages.failed]
    assert rows.role.tolist() == ["user", "assistant", "tool", "assistant"]
    assert rows.content.tolist() == ['[{"type":"text","text":"2+2"}]', "", "4", "5"]
    assert rows.tool_calls.dropna().tolist() == ['[{"id":"c"}]']
    assert (rows.tool_call_id.iloc[2], rows.name.iloc[2]) == ("c", "add")
    assert rows.tokens.tolist() == [pd.NA, pd.NA, pd.NA, 2]
    assert rows.prompt_tokens.tolist() == [pd.NA, pd.NA, pd.NA, 2]


def test_ids_that_are_lists_stay_lists_also_where_all_have_one_length():
    assert objects([["t", 1], ["t", 2]]).tolist() == [["t", 1], ["t", 2]]
    frame = frames.messages([epoch_of([[with_tool(["t", 1])], [with_tool(["t", 2])]])])  # type: ignore[arg-type]
    assert frame.example.tolist() == [["t", 1]] * 5 + [["t", 2]] * 5


def test_a_failure_of_an_epoch_in_memory_counts_in_the_group_of_its_very_id():
    epoch = make_epoch({(1, 2): [1.0, 0.0]}, failures=[RolloutFailure((1, 2), 2, "E")])
    frame = frames.groups([epoch])
    assert (frame.example.tolist(), frame.failures.tolist()) == ([(1, 2)], [1])
    assert frames.trajectories([epoch], example=(1, 2)).error.notna().tolist() == [False, False, True]
