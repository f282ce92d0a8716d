"""A notebook that somebody else stored, in a real JupyterLab before it is trusted: style sheets and drawings are taken out of
what it shows, and what carries meaning is still there."""

from __future__ import annotations

import nbformat
import pytest
from factories import item, make_epoch, sampled
from playwright.sync_api import Error
from records import Views, epoch_of

from finetune_nb.analysis.group_comparison import compare_group
from finetune_nb.analysis.learning_signal import learning_signal
from finetune_nb.analysis.rollout_group import rollout_group
from finetune_nb.config import CurriculumSettings
from finetune_nb.training.preview import preview, preview_input
from finetune_nb.types import Trajectory
from finetune_nb.views.rollout import RolloutView
from finetune_nb.views.summary import run_html

from .jupyterlab import Notebook

TRUST = "for (const cell of jupyterapp.shell.currentWidget.content.widgets) cell.model.trusted = true"
DRAWN = "all => all.length && all.every(image => image.complete && image.naturalWidth > 10)"
STYLE = "(node, name) => getComputedStyle(node)[name]"


def rollout(generation: int) -> Trajectory:
    """A rollout of four turns: unlikely tokens, a tool call that differs with the generation, and a long result."""
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": f'{{"page": {generation}}}'}}
    words = [("unbelievably", -0.01), (" long", -1.5), (" internationalization", -0.2), (" of", -6.0)] * 12
    episode = [
        item("user", "Which is larger?"),
        sampled(*words, tool_calls=[call], finish_reason="tool_calls"),
        item("tool", "a line of the page " * 200, tool_call_id="c"),
        sampled((f"{generation}", -0.5), finish_reason="stop"),
    ]
    return Trajectory(episode=episode, reward=float(generation % 2), metadata={"id": "q0", "generation": generation})


def views() -> dict[str, str]:
    """The static views, by name."""
    group = rollout_group(epoch_of([[rollout(generation) for generation in range(4)]]))
    epochs = [make_epoch({f"q{q}": [float(q < i), 1.0, 0.0] for q in range(6)}, i) for i in range(4)]
    then = CurriculumSettings(enabled=True, percentile=0.5)
    settings = epochs[-1].curriculum
    return {
        "show": RolloutView(group, group.rollout(None))._repr_html_(),
        "compare": compare_group(group)._repr_html_(),
        "signal": learning_signal(epochs[-1], epochs[:-1])._repr_html_(),
        "preview": preview(preview_input(epochs[-1]), settings, settings, then, 0)._repr_html_(),
        "run": run_html(name="demo", state="ready", epochs=epochs),
    }


NAMES = list(views())


@pytest.fixture
def notebook(lab):
    """A notebook with every static view as an output, not signed here."""
    lab.close_notebooks()
    cells = []
    for name, html in views().items():
        output = nbformat.v4.new_output("display_data", {"text/html": html, "text/plain": name})
        cells.append(nbformat.v4.new_code_cell(name, outputs=[output]))
    spec = {"name": "python3", "display_name": "python3", "language": "python"}
    path = lab.notebooks / "stored.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    notebook = Notebook(lab, path)
    notebook.output(0).locator(".ft").first.wait_for()
    return notebook


def test_tints_bars_borders_and_lines_are_seen_before_a_notebook_is_trusted(notebook):
    show, compare, signal, card, run = (notebook.output(place) for place in range(len(NAMES)))
    assert show.locator("style").count() == 0
    for view in (show, compare):
        unlikely = view.locator("u", has_text=" of").last
        assert unlikely.evaluate(STYLE, "backgroundColor") == "rgba(221, 102, 0, 0.667)"
    for pre in (show.locator("pre").nth(1), compare.locator("pre").nth(1)):
        assert pre.evaluate(STYLE, "wordBreak") == "normal" and pre.evaluate(STYLE, "whiteSpace") == "pre-wrap"
    assert show.locator(".ft-turn.assistant").first.evaluate(STYLE, "borderLeftColor") == "rgb(63, 144, 218)"
    assert signal.locator("[style*='linear-gradient']").first.bounding_box()["width"] == 90
    for view in (card, run):
        assert view.locator("img").evaluate_all(DRAWN)
    signal.locator("summary").first.click()
    assert signal.locator("img").evaluate_all(DRAWN)
    for number in (0, 1):
        assert compare.get_by_text(f'{{"page": {number}}}').count() == 1


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_axe_finds_nothing_serious_in_the_static_views(notebook, axe, theme):
    page = notebook.page
    page.evaluate(TRUST)
    page.emulate_media(color_scheme=theme.lower())
    notebook.set_theme(theme)
    page.evaluate("jupyterapp.shell.collapseLeft()")
    page.evaluate(axe)
    found = {}
    for width in (1400, 1000, 700, 390):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(500)
        for place, name in enumerate(NAMES):
            notebook.output(place).scroll_into_view_if_needed()
            found |= serious(notebook.output(place).locator(".ft").first, (name, width))
    page.set_viewport_size({"width": 1300, "height": 1000})
    assert found == {}


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_report_which_fits_the_width_there_is(browser, axe, tmp_path, scheme):
    epochs = [make_epoch({f"q{q}": [float(q < i), 1.0, 0.0] for q in range(6)}, i, validation=0.5) for i in range(4)]
    epochs.append(epoch_of([[rollout(generation) for generation in range(4)]], 4))
    report = Views(*epochs).export(tmp_path / "report.html")
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(report.as_uri())
    page.evaluate(axe)
    found = {}
    for width, columns in ((1400, 2), (1000, 1), (700, 1), (390, 1)):
        page.set_viewport_size({"width": width, "height": 1000})
        found |= serious(page.locator("html"), (width,))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        tops = page.locator(".columns > figure").evaluate_all("all => all.map(node => node.offsetTop)")
        assert (len(tops) - len(set(tops)) > 0) == (columns == 2), width
    context.close()
    assert found == {}


def serious(shown, key):
    """What axe calls serious or critical in an element with all its folds open, by key and rule."""
    shown.locator("details").evaluate_all("all => all.forEach(fold => fold.open = true)")
    run = "node => axe.run(node, {resultTypes: ['violations']}).then(found => found.violations)"
    try:
        violations = shown.evaluate(run)
    except Error as error:
        # JupyterLab takes a cell out of the page, and puts it back, where it lays the notebook out anew.
        if "No elements found" not in str(error):
            raise
        violations = shown.evaluate(run)
    shown.locator("details").evaluate_all("all => all.forEach(fold => fold.open = false)")
    return {
        (*key, violation["id"]): violation["nodes"][0]["html"]
        for violation in violations
        if violation["impact"] in ("serious", "critical")
    }
