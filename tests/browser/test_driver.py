"""The driver itself: what it reports of a notebook is what a user would see."""

import pytest

SLIDER = """
import ipywidgets
from browser import probe
slider = ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=0.1)
slider.observe(lambda change: probe.note("moved", value=change.new), "value")
slider
"""


@pytest.mark.slow
@pytest.mark.proof
def test_cells_run_and_show_text_html_and_errors(lab):
    notebook = lab.open(["1 + 1", "from IPython.display import HTML; HTML('<b>bold</b>')", "1 / 0"])
    for cell in range(3):
        notebook.run(cell)
    assert notebook.text(0) == "2"
    assert "<b>bold</b>" in notebook.html(1)
    assert "ZeroDivisionError" in notebook.text(2)
    assert [output.data["text/plain"] for output in notebook.save().cells[0].outputs] == ["2"]


@pytest.mark.slow
@pytest.mark.proof
def test_a_key_moves_a_slider_and_a_reload_and_a_new_tab_keep_the_kernel(lab, tmp_path):
    notebook = lab.open([SLIDER, "slider.value"])
    notebook.run(0)
    notebook.focus_slider(0)
    pressed = notebook.press("ArrowRight")
    (moved,) = lab.wait_for_event("moved")
    assert moved["value"] == 0.6 and 0 < moved["time"] - pressed < 5
    notebook.save()
    notebook.reload()
    notebook.run(1)
    assert notebook.text(1) == "0.6"
    notebook.close_tab()
    notebook.open_tab()
    notebook.set_theme("dark")
    assert notebook.screenshot(tmp_path / "dark.png").stat().st_size > 10_000
    notebook.set_theme("light")
    with notebook.messages() as messages:
        assert notebook.round_trip() < 5
    assert {m["type"] for m in messages if m["sent"]} >= {"execute_request"}


def test_the_stop_button_interrupts_a_cell(lab):
    notebook = lab.open(["import time; print('begun'); time.sleep(60)"])
    notebook.start(0)
    notebook.wait_for_text(0, "begun")
    assert notebook.is_running(0)
    notebook.interrupt()
    notebook.wait_idle(0, 10)
    assert "KeyboardInterrupt" in notebook.text(0)
