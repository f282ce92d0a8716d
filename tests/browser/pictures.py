"""Pictures of the browser, the panel, the views and the report: light and dark, in windows of four widths. To look at, and for
notebooks/images.

    cd tests && PYTHONPATH=..:.:support python -m browser.pictures RUN OUT [NAME ...]

RUN is a run's folder, OUT where the pictures go; with names such as "browser" only those are made. A picture is called
NAME-THEME-WIDTH.png. To have it small, they are saved with 256 colours where Pillow is installed.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from .jupyterlab import CHROMIUM_FLAGS, Lab, Notebook

WIDTHS = (1400, 1000, 700, 390)
THEMES = ("light", "dark")
CELLS = {
    "browser": "run.browse()",
    "compared": "run.browse()",
    "panel": "run.panel()",
    "show": "run.show()",
    "compare": "run.compare_group()",
    "signal": "run.signal()",
}
KEYS = {"browser": ["{", "j", "."], "compared": ["{", "c", "d"]}
"""What is pressed in a browser before its picture is taken."""


def main(folder: str, out: str, *names: str) -> None:
    pictures = Path(out)
    pictures.mkdir(parents=True, exist_ok=True)
    wanted = names or (*CELLS, "report")
    with sync_playwright() as playwright:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        if "report" in wanted:
            of_report(browser, Path(folder), pictures)
        cells = [name for name in wanted if name in CELLS]
        if cells:
            lab = Lab(Path(tempfile.mkdtemp()), browser)
            try:
                of_cells(lab.start(), Path(folder), cells, pictures)
            finally:
                lab.stop()
        browser.close()


def of_cells(lab: Lab, folder: Path, names: Sequence[str], out: Path) -> None:
    """Pictures of what cells show in JupyterLab."""
    notebook = lab.open(
        [f"import finetune_nb as ft\nrun = ft.Run.open({str(folder)!r})", *map(CELLS.__getitem__, names)]
    )
    page = notebook.page
    page.evaluate("jupyterapp.shell.collapseLeft()")
    page.set_viewport_size({"width": WIDTHS[0], "height": 1100})
    for place in range(len(names) + 1):
        notebook.run(place, 120)
    for place, name in enumerate(names, 1):
        prepare(notebook, place, name)
    for theme in THEMES:
        notebook.set_theme(theme)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 2600})
            page.wait_for_timeout(700)
            for place, name in enumerate(names, 1):
                output = notebook.output(place)
                output.scroll_into_view_if_needed()
                page.wait_for_timeout(400)
                save(output.screenshot(), out / f"{name}-{theme}-{width}.png")


def prepare(notebook: Notebook, place: int, name: str) -> None:
    if name not in KEYS:
        return
    shown = notebook.output(place).locator(".ftb")
    shown.locator(".head .measures").first.wait_for()
    shown.focus()
    for key in KEYS[name]:
        notebook.press(key)
        notebook.page.wait_for_timeout(1000)


def of_report(browser, folder: Path, out: Path) -> None:
    """Pictures of the beginning of a report, of its browser, and of what a printer would have."""
    import finetune_nb as ft

    path = ft.Run.open(folder).export(out / "report.html")
    for theme in THEMES:
        page: Page = browser.new_page(color_scheme=theme)
        page.goto(path.as_uri())
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 1100})
            page.wait_for_timeout(700)
            page.evaluate("scrollTo(0, 0)")
            save(page.screenshot(), out / f"report-{theme}-{width}.png")
            page.locator(".ftb").focus()
            page.keyboard.press("l")
            page.wait_for_timeout(500)
            page.locator(".ftb").evaluate("node => node.getRootNode().host.scrollIntoView()")
            save(page.screenshot(), out / f"report_browser-{theme}-{width}.png")
        page.close()
    page = browser.new_page()
    page.goto(path.as_uri())
    page.pdf(path=out / "report.pdf", format="A4", print_background=False)
    page.close()


def save(png: bytes, path: Path) -> None:
    try:
        import io

        from PIL import Image
    except ImportError:
        path.write_bytes(png)
        return
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
