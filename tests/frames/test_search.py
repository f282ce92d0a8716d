"""`run.find`: the rollouts that have a text, or that a condition holds for, one epoch after another."""

import json
import tracemalloc

import numpy as np
import pytest
from factories import item, make_epoch, make_trajectory
from records import CALL, Views, epoch_of, failed, stored, with_tool

from finetune_nb.errors import ConfigError
from finetune_nb.frames.conditions import condition_of
from finetune_nb.frames.search import Search, query_of, search
from finetune_nb.store.labels import Label
from finetune_nb.types import Trajectory

HOSTILE = "<img src=x onerror=alert(1)>"


def rollout(reply, generation=0, example="q0", reward=1.0, **metadata):
    return make_trajectory(reward, example, generation, reply, **metadata)


@pytest.fixture(params=["memory", "disk"])
def run(request, tmp_path):
    first = epoch_of([[rollout("the answer is Tokyo"), rollout("I do not know", 1)], [with_tool("q1")]])
    second = make_epoch({"q0": [1.0, None, 0.5]}, 1, failures=[failed("q0"), failed("lost", 0)])
    second.collection.trajectories[0][0].episode[1] = item("assistant", "tokyo, tokyo!")
    return Views(*(stored(tmp_path, first, second) if request.param == "disk" else (first, second)))


def test_a_text_is_found_in_any_case_with_the_text_around_it(run):
    found = run.find("Tokyo")
    frame = found.frame
    assert frame.trajectory.tolist() == ["e1/q0/0", "e0/q0/0"]  # the newest epoch first
    assert frame.hits.tolist() == [2, 1]
    assert frame[["before", "hit", "after"]].values.tolist() == [
        ["", "tokyo", ", tokyo!"],
        ["the answer is ", "Tokyo", ""],
    ]
    assert (
        frame[["turn", "role", "reward", "example", "generation"]].values.tolist()
        == [[1, "assistant", 1.0, "q0", 0]] * 2
    )
    assert frame.equals(run.find(regex="t.k(y)o").frame)


def test_each_message_with_a_hit_has_a_row_and_questions_are_searched_too(run):
    frame = run.find("2+2").frame
    assert frame.role.unique().tolist() == ["user"] and set(frame.turn) == {0}
    assert frame.trajectory.tolist() == ["e1/q0/0", "e1/q0/1", "e1/q0/2", "e0/q0/0", "e0/q0/1", "e0/q1/0"]


def test_tool_calls_are_found_by_their_name_and_their_arguments_and_ids_are_not(run):
    for text in ("add", '"a": 2', 'ADD({"a"'):
        (hit,) = [hit for part in run.find(text) for hit in part.hits if hit.role == "tool call"]
        assert (hit.trajectory, hit.turn) == ("e0/q1/0", 2)
        assert hit.before + hit.hit + hit.after == 'add({"a": 2, "b": 2})'
    assert not len(run.find("tool_calls").frame) and not len(run.find("c1").frame)
    assert len(run.find(regex=r'add\(.*"b": \d').frame) == 1


def test_what_the_model_thought_is_found(tmp_path):
    turn = item("assistant", "4", reasoning_content='two and "two"\nmake four')
    thinking = Trajectory(episode=[item("user", "2+2"), turn], reward=1.0, metadata={"id": "q", "generation": 0})
    for run in (Views(epoch_of([[thinking]])), Views(*stored(tmp_path, epoch_of([[thinking]])))):
        for text in ("AND", '"two"\nmake'):
            (hit,) = run.find(text).frame.itertuples()
            assert (hit.role, hit.turn, hit.hit.lower()) == ("thinking", 1, text.lower())


def test_an_epoch_that_cannot_be_read_is_said_and_the_others_are_searched(tmp_path, caplog):
    epochs = stored(tmp_path, make_epoch([[1.0]]), make_epoch([[0.0]], 1))
    (tmp_path / "run" / "trajectories" / "epoch-000001.parquet").unlink()
    found = Views(*epochs).find("4")
    assert found.frame.trajectory.tolist() == ["e0/q0/0"]
    assert found.known[0].error and "1 epoch could not be read" in repr(found)
    assert "epoch 1 is not searched" in caplog.text


def test_errors_of_failed_rollouts_and_of_rewards_are_found(run):
    frame = run.find("TOO SLOW").frame
    assert frame.trajectory.tolist() == ["e1/q0/9", "e1/lost/0"]
    assert frame.role.unique().tolist() == ["error"] and frame.turn.isna().all() and frame.reward.isna().all()
    assert run.find("no number").frame.trajectory.tolist() == ["e1/q0/1"]


def test_where_chooses_rollouts_and_goes_with_a_text(run):
    assert run.find(where="reward < 1").frame.trajectory.tolist() == ["e1/q0/2"]
    assert run.find(where="error != None").frame.trajectory.tolist() == ["e1/q0/1", "e1/q0/9", "e1/lost/0"]
    assert run.find("tokyo", where="epoch == 0").frame.trajectory.tolist() == ["e0/q0/0"]
    assert run.find(where=lambda frame: frame.generation == 1).frame.trajectory.tolist() == ["e1/q0/1", "e0/q0/1"]
    frame = run.find(where="epoch == 0").frame
    assert frame.turn.isna().all() and set(frame.role) == {""} and set(frame.hit) == {""}


def test_only_the_epochs_that_were_asked_for_are_searched(run):
    assert run.find("2+2", epochs=0).frame.epoch.unique().tolist() == [0]
    assert run.find("2+2", epochs=[]).frame.empty


def test_special_characters_stand_for_themselves_in_a_text_and_not_in_a_regex(tmp_path):
    replies = [r"a.b*c\d", "axbxc", "[({", "50% $x^2$ #1 &", "ünïcode ß ẞ", 'zwei\nZeilen\tund "quotes"', "日本 😀"]
    run = Views(*stored(tmp_path, epoch_of([[rollout(reply, place) for place, reply in enumerate(replies)]])))
    for place, reply in enumerate(replies):
        (hit,) = run.find(reply).frame.itertuples()
        assert (hit.generation, hit.hit) == (place, reply)
    assert len(run.find(regex=r"a.b.c").frame) == 2
    assert run.find("😀").frame.before.tolist() == ["日本 "]
    assert run.find(regex="^zwei$").frame.empty and len(run.find(regex="(?m)^zwei$").frame) == 1


def test_a_text_in_the_arguments_of_a_call_is_found_however_json_writes_it(tmp_path):
    texts = ['say "hi"', "back\\slash", "new\nline", "ünïcode", '"', "plain words"]
    rollouts = []
    for place, text in enumerate(texts):
        call = {
            **CALL,
            "function": {"name": "say", "arguments": json.dumps({"text": text}, ensure_ascii=place % 2 == 0)},
        }
        turn = item("assistant", "", tool_calls=[call])
        rollouts.append(
            Trajectory(episode=[item("user", "?"), turn], reward=1.0, metadata={"id": "q", "generation": place})
        )
    run = Views(*stored(tmp_path, epoch_of([rollouts])))
    for place, text in enumerate(texts):
        written = json.dumps(text, ensure_ascii=place % 2 == 0)[1:-1]  # arguments are JSON: found as they were written
        assert place in run.find(written).frame.generation.tolist()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({}, "give text=, regex= or where="),
        ({"text": ""}, "at least one character"),
        ({"text": 3}, "at least one character"),
        ({"text": "\ud800"}, "lone surrogates"),
        ({"text": "a", "regex": "b"}, "do not go together"),
        ({"regex": "("}, "no regular expression"),
        ({"regex": "(?=x)"}, "neither look-around"),
        ({"where": 3}, "a condition or a function"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_at_once(query, said):
    with pytest.raises(ConfigError, match=said):
        Views().find(**query)


def test_a_regex_with_groups_anchors_and_empty_matches_marks_what_it_matches(tmp_path):
    run = Views(*stored(tmp_path, epoch_of([[rollout("aaa bbb"), rollout("ccc", 1)]])))
    for regex, hit in (
        (r"(?P<x>b+)$", "bbb"),
        (r"^(a|c)", "a"),
        (r"\bb", "b"),
        ("a|b", "a"),
        ("z*", ""),
        ("(?i)B{2}", "bb"),
    ):
        assert run.find(regex=regex, where="generation == 0").frame.hit.tolist()[-1] == hit, regex


# ── streaming ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Counted:
    """Epochs that count how many of them were read."""

    def __init__(self, epochs):
        self.epochs, self.read = epochs, []

    def __len__(self):
        return len(self.epochs)

    def __reversed__(self):
        for epoch in reversed(self.epochs):
            self.read.append(epoch.index)
            yield epoch


def test_hits_come_epoch_by_epoch_and_what_is_not_asked_for_is_not_read():
    epochs = Counted([make_epoch([[1.0, 0.0]], index) for index in range(5)])
    found = Search(query_of("4"), epochs)
    parts = iter(found)
    assert next(parts).epoch == 4 and epochs.read == [4] and not found.complete
    assert next(parts).epoch == 3
    found.stop()
    assert next(parts, None) is None and epochs.read[:2] == [4, 3] and len(found.known) == 2
    assert [part.epoch for part in found] == [4, 3]  # what was found stays


def test_a_search_is_made_once_however_often_it_is_looked_at():
    epochs = Counted([make_epoch([[1.0, 0.0]], index) for index in range(3)])
    found = Search(query_of("4"), epochs)
    assert len(found.frame) == len(found.frame) == 6
    assert epochs.read == [2, 1, 0] and found.complete
    assert [part.rollouts for part in found] == [2, 2, 2] and [part.searched for part in found] == [2, 2, 2]


def test_hits_beyond_the_limit_are_counted_alone():
    run = Views(*(make_epoch([[1.0, 0.0]], index) for index in range(3)))
    found = run.find("4", limit=3)
    assert found.frame.trajectory.tolist() == ["e2/q0/0", "e2/q0/1", "e1/q0/0"]
    assert found.left_out == 3 and "6 hits in 6 of 6 rollouts" in repr(found)


def test_memory_holds_one_epoch_at_a_time(tmp_path):
    import pyarrow as pa

    groups = [[rollout("word " * 2_000, place) for place in range(40)]]
    epochs = stored(tmp_path, *(epoch_of(groups, index) for index in range(6)))
    list(search(epochs[:1], query_of("nothing")))
    peaks = []
    for some in (epochs[:1], epochs):
        before, highest = pa.total_allocated_bytes(), 0
        for _ in search(some, query_of("nothing")):
            highest = max(highest, pa.total_allocated_bytes() - before)
        peaks.append(highest)
    tracemalloc.start()
    list(search(epochs, query_of("word"), most=10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000 and peak < 2_000_000  # the text of an epoch is 400 kB


# ── conditions ───────────────────────────────────────────────────────────────────────────────────────────────────────

FRAME_LABELS = [
    Label("e0/a/0", 0, "a", 0, "hacked", 0.5, "", "ann", 0.0),
    Label("e0/a/1", 0, "a", 1, "not hacked", None, "", "ann", 0.0),
]


@pytest.mark.parametrize(
    ("where", "generations"),
    [
        ("reward < 0.5", [1]),
        ("0.25 <= reward <= 1", [0, 3]),
        ("0.5 > reward", [1]),
        ("not reward < 0.5", [0, 2, 3]),
        ("reward != 0.75", [0, 1, 2]),
        ("reward == None", [2]),
        ("reward is not None and reward < 1", [1, 3]),
        ("generation in [0, 3] or reward == 0", [0, 1, 3]),
        ("generation not in (0, 3)", [1, 2]),
        ("'hacked' in labels", [0]),
        ("labels", [0, 1]),
        ("label_score > 0.1", [0]),
        ("selected", [0, 1, 2, 3]),
        ("'no number' in error", [2]),
        ("error is None", [0, 1, 3]),
        ("example == 'a'", [0, 1, 2, 3]),
        ("example == 3", []),
        ("score_x > 1", [0]),
        ("finish_reason == 'stop' and reason == 'kept'", [0, 1, 2, 3]),
        ("policy_version == 0 and turns == 2 and epoch == 0", [0, 1, 2, 3]),
        ("-1 < reward", [0, 1, 3]),
    ],
)
def test_a_condition_holds_for_those_rows(where, generations):
    group = [make_trajectory(reward, "a", place) for place, reward in enumerate([1.0, 0.0, None, 0.75])]
    group[0].metadata["scores"] = {"x": 2.0}
    run = epoch_of([group])
    (part,) = search([run], query_of(where=where), FRAME_LABELS)
    assert [hit.generation for hit in part.hits] == generations


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("", "a condition or a function"),
        ("reward <", "no condition"),
        ("rewards < 1", "Did you mean 'reward'"),
        ("reward < generation", "one of which must be a column"),
        ("1 < 2", "one of which must be a column"),
        ("reward + 1 > 2", "must be a column"),
        ("reward", None),
        ("__import__('os').system('touch hacked')", "found"),
        ("reward.__class__ == 1", "must be a column"),
        ("(lambda: 1)() == reward", "must be a value"),
        ("reward == [x for x in (1, 2)]", "must be a value"),
        ("f'{reward}' == example", "must be a value"),
        ("reward in 3", "must be a list"),
        ("example in [[1]]", "must be a list"),
        ("reward == [1, 2]", "must be a text or a number"),
        ("reward == 1j", "must be a text or a number"),
        ("3 in labels", "must be a text"),
        ("reward is 3", "`is` is for None alone"),
        ("reward < None", "neither less nor greater"),
        ("not " * 900 + "reward", "no condition|found"),
        ("reward < 1 and " * 200 + "reward < 1", "2,000 characters"),
        ("reward := 1", "no condition"),
        ("reward < 1; reward", "no condition"),
    ],
)
def test_what_is_no_condition_is_refused_and_nothing_is_run(where, said):
    if said is None:
        assert condition_of(where)[1] == ("reward",)
        return
    with pytest.raises(ConfigError, match=said):
        condition_of(where)


def test_values_that_cannot_be_compared_and_functions_that_return_something_else_are_errors():
    epochs = [make_epoch([[1.0, 0.0]])]
    with pytest.raises(ConfigError, match="example cannot be compared with 3"):
        list(search(epochs, query_of(where="example < 3")))
    with pytest.raises(ConfigError, match="expected a bool for each of 2 rollouts"):
        list(search(epochs, query_of(where=lambda frame: np.array([True]))))


# ── display ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hits_are_marked_and_hostile_text_is_escaped():
    run = Views(epoch_of([[rollout(f"say {HOSTILE} \u202e\x1b[31m now", example=HOSTILE)]]))
    found = run.find("src=x")
    html = found._repr_html_()
    assert "<img src=x" not in html
    assert "&lt;img <mark>src=x</mark> onerror=alert(1)&gt;" in html
    assert "\u202e" not in html + repr(found) and "\x1b" not in html + repr(found)
    assert "turn 1 assistant: say <img «src=x» onerror=alert(1)>" in repr(found)
    for shown in (run.find(where="reward == 1"), run.find("nothing of the kind"), run.find(HOSTILE)):
        assert "<img src=x" not in shown._repr_html_()


def test_a_display_looks_no_further_than_it_needs_to():
    run = Views(*(make_epoch([[1.0] * 30], index) for index in range(20)))
    found = run.find("4")
    shown = repr(found)
    assert "60 hits in 60 of 60 rollouts in 2 of 20 epochs, the newest first; `.frame` searches the others" in shown
    assert len(found.known) == 2 and shown.count("\n") == 50
