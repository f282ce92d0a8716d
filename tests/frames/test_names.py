"""Names such as "e3/q17/2" open things, and are looked up among the rollouts of their epoch."""

import pytest
from factories import make_epoch, make_trajectory
from records import Views, epoch_of, failed

from finetune_nb.errors import ConfigError, RunError
from finetune_nb.frames.names import find_names, is_name

EPOCHS = [
    make_epoch({"a": [1.0, 0.0], "a/1": [0.5, 0.25], 7: [0.0, 1.0]}),
    make_epoch({"a": [0.25, 0.75]}, 1, failures=[failed("a"), failed("lost", 0)]),
]
RUN = Views(*EPOCHS)


def found(name):
    (one,) = find_names([name], lambda index: RUN[index])
    return one.epoch, one.example, one.generation


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e0", (0, None, None)),
        ("e0/a", (0, "a", None)),
        ("e0/a/0", (0, "a", 0)),
        ("e0/a/1", (0, "a", 1)),  # the rollout, also where "a/1" is an example
        ("e0/a/1/1", (0, "a/1", 1)),
        ("e0/7/1", (0, 7, 1)),
        ("e1/a/9", (1, "a", 9)),  # one that failed
        ("e1/lost/0", (1, "lost", 0)),
        ("e1/lost", (1, "lost", None)),
    ],
)
def test_a_name_is_a_rollout_a_group_or_an_epoch(name, expected):
    assert found(name) == expected


def test_every_name_of_the_frame_is_found_as_its_row():
    for row in RUN.trajectories().itertuples():
        epoch, example, generation = found(row.trajectory)
        assert (epoch, generation) == (row.epoch, row.generation)
        if row.trajectory != "e0/a/1":
            assert example == row.example


@pytest.mark.parametrize("name", ["a/0", "e", "e0a", "", "E0", "e-1", "e0/", "e0/b/0", "e0/a/2", "e1/a/1/1"])
def test_what_names_nothing_is_an_error(name):
    with pytest.raises(RunError, match="name"):
        found(name)


def test_an_epoch_that_is_not_there_is_an_index_error():
    with pytest.raises(IndexError):
        found("e9/a/0")


def test_only_names_look_like_names():
    assert is_name("e0") and is_name("e12/a\nb/3")
    assert not any(map(is_name, ("q17", "e", 3, None, "e0 ", "3/q17")))


def test_show_opens_a_rollout_by_its_name():
    view = RUN.show("e0/7/1")
    assert view.trajectory is EPOCHS[0].collection.trajectories[2][1]
    assert "example 7" in repr(view) and "generation 1" in repr(view)
    assert "TimeoutError" in repr(RUN.show("e1/a/9"))
    assert "generation 0" in repr(RUN.show("e0/a"))  # the best one
    assert "generation 1" in repr(RUN.show("e0/a", generation=1))
    assert "epoch 1" in repr(RUN.show("e1"))


@pytest.mark.parametrize("given", [{"example": "a"}, {"generation": 1}])
def test_what_a_name_says_is_not_said_once_more(given):
    with pytest.raises(ConfigError, match=f"leave {next(iter(given))}="):
        RUN.show("e0/a/0", **given)


def test_two_rollouts_of_any_epochs_are_compared():
    compared = RUN.compare("e0/a/1", "e1/a/0")
    assert compared.trajectories == (
        EPOCHS[0].collection.trajectories[0][1],
        EPOCHS[1].collection.trajectories[0][0],
    )
    shown = repr(compared)
    assert shown.startswith("epochs 0 and 1 · example a")
    assert "e0/a/1 · generation 1 · reward 0" in shown and "e1/a/0 · generation 0 · reward 0.25" in shown
    html = compared._repr_html_()
    assert "e0/a/1" in html and "e1/a/0" in html
    assert "example a and 7" in repr(RUN.compare("e0/a/0", "e0/7"))


def test_a_failed_rollout_cannot_be_compared():
    with pytest.raises(RunError, match="'e1/a/9' failed.*too slow"):
        RUN.compare("e0/a/0", "e1/a/9")


def test_the_names_of_a_comparison_are_escaped():
    hostile = "<img src=x onerror=alert(1)>"
    run = Views(make_epoch({hostile: [1.0, 0.0]}))
    html = run.compare(f"e0/{hostile}/0", f"e0/{hostile}/1")._repr_html_()
    assert "<img src=x" not in html and "&lt;img src=x" in html


# ── the same example over the epochs ─────────────────────────────────────────────────────────────────────────────────


def test_a_history_has_the_example_s_groups_and_rollouts():
    history = RUN.history("a")
    assert len(history) == 2
    assert history.groups["mean"].tolist() == [0.5, 0.5]
    assert history.rollouts.trajectory.tolist() == ["e0/a/0", "e0/a/1", "e1/a/0", "e1/a/1", "e1/a/9"]
    shown = repr(history)
    assert shown.startswith("example a: drawn in 2 epochs")
    assert "epoch 1: mean 0.5 of 2 rollouts, 0.25 to 0.75, 1 failed" in shown
    html = history._repr_html_()
    assert "e0/a/0" in html and "e1/a/1 · 0.75" in html  # the best ones


def test_a_history_escapes_what_models_say():
    hostile = "<img src=x onerror=alert(1)>"
    history = Views(epoch_of([[make_trajectory(1.0, hostile, output=hostile)]])).history(hostile)
    html = history._repr_html_()
    assert "<img src=x" not in html and "&lt;img src=x" in html


def test_a_history_of_an_example_that_always_failed_shows_the_failures():
    history = RUN.history("lost")
    assert "mean – of 0 rollouts, 1 failed" in repr(history)
    assert "1 failed" in history._repr_html_()


def test_a_history_of_no_example_says_so():
    with pytest.raises(ConfigError, match="no example 'q'"):
        RUN.history("q")
    with pytest.raises(RunError, match="no epoch yet"):
        Views().history("a")
