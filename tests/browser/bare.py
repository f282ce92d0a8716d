"""The trajectory browser in a bare page of Chromium: its module from a Blob, a model of a few lines, and the kernel's side of
this process behind it. Real layout and keys, without JupyterLab."""

from __future__ import annotations

import base64
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser as Chromium
from playwright.sync_api import Page

import finetune_nb
from finetune_nb.notebook.browser import Browser
from finetune_nb.notebook.mount import module

NOTEBOOK = Path(finetune_nb.__file__).parent / "notebook"
MODEL = """
class Model {
  constructor(mount, sheet) {
    Object.assign(this, { values: { mount, sheet }, handlers: new Map(), answers: true });
    setInterval(() => this.answers && this.pass({ op: "poll" }), 30);
  }
  get(name) { return this.values[name]; }
  on(name, call) { this.handlers.set(name, [...(this.handlers.get(name) ?? []), call]); }
  off(name, call) { this.handlers.set(name, (this.handlers.get(name) ?? []).filter((each) => each !== call)); }
  emit(name, ...values) { for (const call of this.handlers.get(name) ?? []) call(...values); }
  send(content) { if (this.answers) this.pass(content); }
  async pass(content) {
    for (const [answer, texts] of await window.askKernel(content)) {
      const buffers = texts.map((text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
      this.emit("msg:custom", answer, buffers);
    }
  }
}
"""
OPEN = """
async ([source, sheet, mount, initialize]) => {
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  window.module = await import(url);
  window.model = new Model(mount, sheet);
  const place = document.getElementById("place");
  if (initialize) module.default.initialize({ model, signal: (window.ending = new AbortController()).signal });
  else module.default.render({ model, el: place });
}
"""
VIEW = "document.getElementById('place').view"
"""The page's BrowserView, where it was rendered and not mounted."""
PAGE = """<!doctype html><html lang="en"><head><title>bare</title></head><body style="margin:8px"><main>
<div id="place" data-ft-mount="here"><p id="still">static summary</p></div></main></body></html>"""


class Channel:
    """In place of the widget: keeps what the kernel tells the page until that asks."""

    def __init__(self) -> None:
        self.told: queue.Queue[tuple[dict[str, Any], list[str]]] = queue.Queue()

    def tell(self, content: Any, buffers: Sequence[bytes] = ()) -> None:
        self.told.put((dict(content), [base64.b64encode(each).decode("ascii") for each in buffers]))

    def dispose(self) -> None:
        pass


class BarePage:
    """One page with one browser in it."""

    def __init__(
        self, chromium: Chromium, browser: Browser | None, width: int = 1200, dark: bool = False, mounts: bool = False
    ) -> None:
        self.browser, self.channel = browser, Channel()
        self.problems: list[str] = []
        self.asked: list[dict[str, Any]] = []
        scheme = "dark" if dark else "light"
        self.context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append("a dialog"), dialog.dismiss()))
        self.page.set_content(PAGE)
        if dark:
            self.page.add_style_tag(content=":root{color-scheme:dark;background:#111}")
        self.page.expose_function("askKernel", self._ask)
        self.page.add_script_tag(content=MODEL + "window.Model = Model")
        sheet = (NOTEBOOK / "browser.css").read_text("utf-8")
        if browser is not None:
            browser._widget = self.channel  # type: ignore[assignment]
        self.page.evaluate(OPEN, [module("browser.js"), sheet, "here", mounts])
        if browser is not None:
            self.page.locator(".head .measures").first.wait_for()

    def _ask(self, content: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
        if content["op"] != "poll":
            self.asked.append(content)
            if self.browser is not None:
                self.browser._answer(content)
        found = []
        while not self.channel.told.empty():
            found.append(self.channel.told.get())
        return found

    def press(self, *keys: str) -> None:
        """Presses keys, and waits after each until the kernel has answered what the page asked."""
        for key in keys:
            self.page.keyboard.press(key)
            self.settle()

    def settle(self) -> None:
        self.page.wait_for_timeout(30)
        self.page.wait_for_function(f"() => {{ const view = {VIEW}; return !view || view.kernel.waiting.size === 0; }}")
        self.page.wait_for_timeout(30)

    def focus(self) -> None:
        self.page.locator(".ftb").focus()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    @property
    def said(self) -> str:
        return self.text(".say")

    def close(self) -> None:
        self.context.close()
