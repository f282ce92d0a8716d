"""The panel without a browser: what its widgets put where, what it writes and how often, and that it keeps nothing alive."""

import gc
import threading
import time
import weakref

import ipywidgets
import pytest
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.backends.local.config import LocalGRPOConfig
from finetune_nb.config.base import changed
from finetune_nb.engine.live_settings import LiveField, LiveSettings
from finetune_nb.notebook import kernel
from finetune_nb.notebook.panel import Panel, StaticPanel
from finetune_nb.notebook.panel_html import status_html
from finetune_nb.notebook.panel_inputs import Inputs
from finetune_nb.notebook.reward_curve import MOST, reward_curve
from finetune_nb.run.opening import Obstacle
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums
from finetune_nb.tripwires import SpreadBelow, ValidationFalls
from finetune_nb.types import CurriculumSettings

IPYWIDGETS_7 = ipywidgets.__version__.startswith("7.")
alive = ipywidgets.Widget.widgets if IPYWIDGETS_7 else ipywidgets.widgets.widget._instances


@pytest.fixture
def run(tmp_path, closing):
    def dealt(epoch):
        return {f"q{i}": [0.0, i / 10, 1.0] for i in range(10)} | {"flat": [0.5, 0.5, 0.5], "lost": [None, 0.0, 1.0]}

    parts = dict(builder=ScriptedBuilder(dealt), adapter=FakeAdapter(policy=ScriptedPolicy(coin)))
    options = dict(curriculum={}, name="fixed", num_epochs=4, sampling={"temperature": 0.5})
    return closing(ft.Run(guess, right, sums(4), output_dir=tmp_path, **parts, **options))


@pytest.fixture
def panel(run, monkeypatch):
    """As if a front end were there; widgets work without a kernel, they only tell nobody."""
    monkeypatch.setattr("finetune_nb.notebook.panel.has_frontend", lambda: True)
    panel = run.panel()
    yield panel
    panel.close()


def widget(panel, name):
    return next(each.widget for each in panel.inputs.all() if each.name == name)


def shows(panel, part, text, seconds=5.0):
    """Waits until that part of the panel contains the text."""
    deadline = time.monotonic() + seconds
    while text not in panel.shown[part].value:
        assert time.monotonic() < deadline, panel.shown[part].value
        time.sleep(0.02)
    return True


class Telling(FakeAdapter):
    """Tells how far its job is, and counts how often it was asked."""

    asked = 0

    async def status(self, ref):
        self.asked += 1
        return (await super().status(ref)).model_copy(update={"progress": 37.5, "message": "step 3 of 8"})


@pytest.mark.parametrize("cheap", [True, False])
def test_training_is_shown_in_steps_where_asking_costs_nothing(tmp_path, closing, monkeypatch, cheap):
    monkeypatch.setattr("finetune_nb.engine.observer.ASK_EVERY", 0.01)
    adapter = Telling(policy=ScriptedPolicy(coin), delay=60)
    adapter.status_is_cheap = cheap
    run = closing(ft.Run(guess, right, sums(4), adapter=adapter, output_dir=tmp_path))
    run.start(1)
    deadline = time.monotonic() + 20
    while run.progress.phase != "training" or (cheap and adapter.asked < 3):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shown = status_html(run.status, 1)
    line = run._progress_line(False)
    if cheap:
        assert "step 3 of 8" in shown and "37.5%" in shown and "rollouts" not in shown
        assert "training  step 3 of 8" in line.text and (line.done, line.total) == (38, 100)
    else:
        assert adapter.asked == 0 and "32 of 32 rollouts" in shown and "32 of 32 rollouts" in line.text
    run.abort()


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_number_that_may_be_missing_is_missing_where_its_input_is_empty():
    config, said = LocalGRPOConfig(), []
    cap = LiveField(
        "adapter.importance_cap",
        None,
        "training",
        check=lambda value: changed(config, {"importance_cap": value}, "adapter").importance_cap,
    )
    settings = LiveSettings(CurriculumSettings(), [cap])
    settings.at_once = True
    (shown,) = Inputs(settings, lambda error, name: said.append(error)).live
    assert shown.widget.value == ""
    for text, value in (("2.5", 2.5), ("many", 2.5), (" ", None)):
        shown.widget.value = text
        assert settings.live_fields[0].value == value
    assert said[0] is None and "adapter.importance_cap" in said[1] and said[2] is None


def test_what_a_person_moves_is_tried_out_and_counts_once_it_is_applied(run, panel):
    ft.run_sync(run.next_epoch())
    widget(panel, "percentile").value = 0.7
    assert widget(panel, "schedule").value == "manual"
    assert run._settings.draft == {"percentile": 0.7, "schedule": "manual"} and run.curriculum.percentile == 0.3
    assert shows(panel, "answer", "What if") and shows(panel, "answer", "Tried out")
    panel.buttons["apply"].click()
    assert run.curriculum.percentile == 0.7 and shows(panel, "answer", "Asked for")
    assert [change.source for change in run.changes] == ["panel", "panel"]
    epoch = ft.run_sync(run.next_epoch())
    assert (epoch.curriculum.percentile, epoch.curriculum.schedule) == (0.7, "manual")
    assert [change.epoch for change in run.changes] == [1, 1]


def test_revert_takes_the_inputs_back_to_what_is_asked_for(run, panel):
    run.curriculum = {"percentile": 0.5, "min_reward_diff": 0.2}  # by code: the inputs wait for the next touch of one
    assert widget(panel, "percentile").value == 0.3
    widget(panel, "expansion_interval").value = 9
    assert widget(panel, "percentile").value == 0.5  # brought along
    panel.buttons["revert"].click()
    assert widget(panel, "expansion_interval").value == 5 and widget(panel, "schedule").value == "manual"
    assert run._settings.draft == {}


def test_every_kind_of_input_reaches_its_setting(run, panel):
    moved = {
        "increment_percentile": (0.1, 0.1),
        "expansion_interval": (2, 2),
        "min_reward_diff": (0.3, 0.3),
        "sort_ascending": (True, True),
        "random_subsample": (0.5, 0.5),
        "schedule": ("manual", "manual"),
        "enabled": (False, False),
    }
    for name, (value, _) in moved.items():
        widget(panel, name).value = value
    panel.buttons["apply"].click()
    assert {name: getattr(run.curriculum, name) for name in moved} == {
        name: asked for name, (_, asked) in moved.items()
    }
    widget(panel, "random_subsample").value = 1.0
    assert run._settings.draft["enabled"] is True  # or it would do nothing
    panel.buttons["apply"].click()
    assert run.curriculum.random_subsample is None


def test_apply_at_once_needs_no_button(run, panel):
    widget(panel, "min_reward_diff").value = 0.4
    panel.at_once.value = True
    assert run.curriculum.min_reward_diff == 0.4
    widget(panel, "percentile").value = 0.9
    assert run.curriculum.percentile == 0.9 and run._settings.draft == {}


def test_a_live_field_goes_the_same_way_and_a_value_that_does_not_fit_is_refused_in_words(run, panel):
    widget(panel, "llm.temperature").value = 0.8
    panel.buttons["apply"].click()
    assert run.live["llm.temperature"] == 0.8
    widget(panel, "llm.temperature").value = -1.0
    assert shows(panel, "note llm.temperature", "temperature")  # beside the field
    assert "▲" not in panel.shown["answer"].value
    assert run._settings.draft == {} and widget(panel, "llm.temperature").value == 0.8
    widget(panel, "llm.temperature").value = 0.9
    deadline = time.monotonic() + 5
    while panel.shown["note llm.temperature"].value:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_input_of_the_curriculum_switches_it_on(tmp_path, closing, monkeypatch):
    monkeypatch.setattr("finetune_nb.notebook.panel.has_frontend", lambda: True)
    adapter = FakeAdapter(policy=ScriptedPolicy(coin))
    run = closing(ft.Run(guess, right, sums(4), adapter=adapter, output_dir=tmp_path))
    panel = run.panel()
    try:
        assert not run.curriculum.enabled and not widget(panel, "enabled").value
        widget(panel, "percentile").value = 0.6
        assert widget(panel, "enabled").value and run._settings.draft["enabled"] is True
        for each in panel.inputs.all():
            assert each.widget.description, each.name
            assert IPYWIDGETS_7 or each.widget.tooltip or each.widget.tooltips, each.name
    finally:
        panel.close()


def test_a_moved_weight_shows_which_groups_would_be_trained_on(make_run, monkeypatch):
    monkeypatch.setattr("finetune_nb.notebook.panel.has_frontend", lambda: True)
    run = make_run(reward={"right": right, "long": (lambda output: len(output) / 10, 0.0)}, curriculum={})
    panel = run.panel()
    ft.run_sync(run.next_epoch())
    widget(panel, "reward.long").value = 2.0
    assert shows(panel, "answer", "the reward being 1 right + 2 long") and run.live["reward.long"] == 0.0
    panel.buttons["apply"].click()
    assert shows(panel, "answer", "Asked for") and run.live["reward.long"] == 2.0
    panel.close()


def test_tripwires_are_set_beside_those_from_code(run, panel):
    own = lambda epoch: None  # noqa: E731
    run.tripwires.append(own)
    panel.tripwires.spread.value = True
    panel.tripwires.share.value = 35
    panel.tripwires.falls.value = True
    assert run.tripwires == [SpreadBelow(0.35), ValidationFalls(3), own]
    assert shows(panel, "answer", "1 tripwire from code")
    panel.tripwires.spread.value = False
    assert run.tripwires == [ValidationFalls(3), own]


# ── buttons ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_buttons_start_step_and_say_why_something_cannot_be(run, panel):
    panel.buttons["step"].click()
    run.wait(20)
    assert len(run) == 1
    panel.buttons["resume"].click()
    assert shows(panel, "answer", "Only a run that is paused can be resumed")
    panel.epochs.value = 2
    panel.buttons["start"].click()
    run.wait(20)
    assert len(run) == 3 and shows(panel, "status", "3 of 3 epochs") and shows(panel, "record", "<svg")


@pytest.mark.slow
@pytest.mark.proof
def test_a_tripwire_pauses_with_its_words_and_the_panel_offers_what_can_be_done_then(run, panel):
    run.tripwires = [lambda epoch: "look at <this>" if epoch.index == 1 else None]
    panel.buttons["start"].click()
    assert shows(panel, "status", "look at &lt;this&gt;") and shows(panel, "status", "paused")
    hidden = panel.shown["status"].value
    assert ".ft-b-start{display:none}" in hidden and ".ft-b-resume{display:none}" not in hidden
    panel.buttons["resume"].click()
    run.wait(20)
    assert len(run) == 4 and shows(panel, "status", "ready")


def test_an_error_of_the_engine_is_shown(run, panel):
    run._driver.config.finetuning.trainer = "nobody"
    panel.buttons["step"].click()
    assert shows(panel, "status", "The last epoch failed") and shows(panel, "status", "ft-is-failed")


# ── what it writes ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
def test_of_its_own_accord_it_writes_twice_a_second_and_in_answer_ten_times(run, panel):
    ft.run_sync(run.next_epoch())
    time.sleep(2.0)
    written = []
    for name, shown in panel.shown.items():
        shown.observe(lambda change, name=name: written.append((time.monotonic(), name)), "value")
    run.start(100_000)
    deadline = time.monotonic() + 3.0
    moves = 0
    while time.monotonic() < deadline:
        moves += 1
        widget(panel, "percentile").value = 0.2 + 0.6 * (moves % 50) / 50
        time.sleep(0.01)
    run.stop()
    run.wait(20)
    answers = [at for at, name in written if name == "answer"]
    own = [at for at, name in written if name != "answer"]
    assert moves > 50 and 5 <= len(answers) <= 32
    assert 2 <= len(own) <= 8
    assert {"status", "record"} <= {name for _, name in written}


def test_a_panel_is_one_and_is_gone_when_it_is_closed(run, panel):
    assert run.panel() is panel
    names = {thread.name for thread in threading.enumerate()}
    assert "ft-panel-fixed" in names
    before = len(alive)
    panel.close()
    assert len(alive) <= before - 60
    deadline = time.monotonic() + 3
    while "ft-panel-fixed" in {thread.name for thread in threading.enumerate()}:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again = run.panel()
    assert again is not panel
    again.close()
    assert "application/vnd.jupyter.widget-view+json" not in panel._repr_mimebundle_()


@pytest.mark.slow
@pytest.mark.proof
def test_a_panel_keeps_no_run_alive(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_nb.notebook.panel.has_frontend", lambda: True)
    before = len(alive)
    run = ft.Run(guess, right, sums(4), adapter=FakeAdapter(policy=ScriptedPolicy(coin)), output_dir=tmp_path)
    run.panel()
    gone = weakref.ref(run)
    del run
    for _ in range(50):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.05)
    assert gone() is None
    deadline = time.monotonic() + 3
    while len(alive) > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert len(alive) <= before


# ── without widgets, without a right to steer ─────────────────────────────────────────────────────────────────────────


def test_where_nobody_sees_widgets_it_is_a_picture_of_the_state(run):
    before = len(alive)
    ft.run_sync(run.next_epoch())
    still = run.panel()
    assert isinstance(still, StaticPanel) and len(alive) == before
    bundle = still._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "image/png"} and sum(map(len, bundle.values())) < 150_000
    assert bundle["image/png"] in bundle["text/html"] and "epoch 0" in bundle["text/plain"]
    assert "</text>" not in bundle["text/html"]  # it would be left over where drawings are taken out


def test_a_cell_has_the_static_panel_and_the_widgets_mount_themselves_on_it(run, panel, monkeypatch):
    """With the widgets in the output, a notebook that is opened again would show "Error displaying widget: model not found"."""
    ft.run_sync(run.next_epoch())
    bundle = panel._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert f'data-ft-mount="{panel.mount.mount}"' in bundle["text/html"] and "data:image/png" in bundle["text/html"]
    assert (panel.mount.mount, panel.mount.view) == (panel.mount.model_id, panel.view.model_id)
    assert f"ft.Run.open({str(run.folder)!r}).panel()" in panel.mount.again
    sent = []
    monkeypatch.setattr(panel.mount, "send", sent.append)
    panel.mount._handle_custom_msg({"id": 7}, [])
    panel.mount._handle_custom_msg("nonsense", [])
    assert sent == [{"id": 7}]
    monkeypatch.setenv("VSCODE_PID", "1")  # it makes the page's side of a widget only where an output shows it
    shown = panel._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
    assert shown["model_id"] == panel.view.model_id


def test_what_a_saved_notebook_shows_of_a_panel_is_brought_up_to_date_when_the_run_has_ended(run, panel, monkeypatch):
    class Display:
        bundles = []

        def update(self, bundle, raw):
            self.bundles.append(bundle["text/html"])

    panel._outputs = [Display()]
    run.start(2)
    run.wait(20)
    deadline = time.monotonic() + 10
    while not Display.bundles or "2 epochs" not in Display.bundles[-1]:
        assert time.monotonic() < deadline, [each[:300] for each in Display.bundles]
        time.sleep(0.05)
    assert "ready" in Display.bundles[-1] and len(Display.bundles) <= 2
    monkeypatch.setattr(type(run), "_recorded_in", "script")  # as if run.start() had been in the same cell
    assert "run.panel() brings it back" in panel._repr_mimebundle_()["text/html"]


@pytest.mark.slow
@pytest.mark.proof
def test_a_screen_reader_hears_states_and_epochs_not_every_rollout(run, panel):
    said = []
    panel.shown["spoken"].observe(lambda change: said.append(change.new), "value")
    run.start(3)
    run.wait(20)
    assert shows(panel, "spoken", "ready. Epoch 2 ended with mean reward")
    assert 1 <= len(said) <= 8 and 'role="status"' not in panel.shown["status"].value


def test_a_run_that_is_only_read_has_no_inputs_and_says_why(run, tmp_path, monkeypatch):
    ft.run_sync(run.next_epoch())
    run.close()
    read = ft.Run.open(run.folder)
    read._unable = Obstacle("this run can be read, but not continued here: its agent is missing")
    panel = Panel(read, read._settings)
    try:
        assert "its agent is missing" in panel.shown["status"].value
        assert ".ft-b-start{display:none}" in panel.shown["status"].value
        assert not any(each.widget in panel._tree for each in panel.inputs.all())
        assert "<svg" in panel.shown["record"].value
    finally:
        panel.close()
        read.close()


def test_a_closed_run_ends_steering_in_its_panel(run, panel):
    run.close()
    assert shows(panel, "status", "This run is closed") and shows(panel, "status", ".ft-b-inputs{display:none}")


def test_messages_are_let_through_only_where_there_is_something_to_take_away():
    class Comm:
        pass

    class Widget:
        comm = Comm()

    Widget.comm._reply_subshell_id = "of a page that is gone"
    kernel.route_to_subshell([Widget(), object()])
    assert not hasattr(Widget.comm, "_reply_subshell_id")
    kernel.route_to_subshell([Widget()])
    assert kernel.has_frontend() is False  # no kernel here


# ── the curve ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_curve_of_a_long_run_stays_small_and_marks_changes(run):
    import math

    from factories import make_epoch

    from finetune_nb.types import Change

    epochs = [make_epoch([[0.0, 1.0], [math.nan, math.nan]], index, validation=0.5) for index in range(0, 900, 3)]
    change = Change(0.0, "code", "<b>percentile", 0.1, 0.5, epoch=30)
    drawn = reward_curve(epochs, [change, Change(0.0, "code", "percentile", 0.1, 0.5)])
    assert drawn.count("ft-mark-line") == 1 and "&lt;b&gt;percentile" in drawn
    assert len(epochs) > MOST and len(reward_curve(epochs)) < 60_000
    assert "NaN" not in drawn and "nan" not in drawn
    missing = reward_curve([make_epoch([[math.nan]])])
    assert "nan" not in missing and "none yet" in missing
    huge = reward_curve([make_epoch([[1e300, -1e300]]), make_epoch([[-5e-300, 7.5]], 1)])
    assert "nan" not in huge and "inf" not in huge
