"""A real JupyterLab in a real Chromium, driven through Playwright: what a user does with a notebook, as methods.

    notebook = lab.open(["1 + 1"])
    notebook.run(0)
    assert notebook.text(0) == "2"

Everything that waits has a timeout and says what it saw instead. Nothing here knows finetune_nb; what the kernel writes
with `probe.note(...)` is read by `lab.events(...)`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Browser, Locator, Page

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TESTS = Path(__file__).parents[1]
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
QUIET = {"notification": {"fetchNews": "false", "checkForUpdates": False}}
"""Settings of JupyterLab in which it asks nobody for news."""


def until(
    condition: Callable[[], Any], seconds: float = 20.0, what: str = "it", pause: Callable[[], Any] | None = None
):
    """What the condition returns once that is true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come to pass within {seconds:.0f} s")
        if pause is None:
            time.sleep(0.02)
        else:
            pause()


class Lab:
    """A JupyterLab server on 127.0.0.1 with folders of its own, and a browser window on it.

    folder: where it keeps everything. kernels: name -> python; "python3" is `python`. settings: of
    `@jupyterlab/apputils-extension`, by plugin, such as {"kernels-settings": {"commsOverSubshells": "disabled"}}. python: what
    the server runs on.
    """

    module, app, place = "jupyterlab", "LabApp", "lab/tree"
    """What is started, the class that its options are of, and where a notebook is in its addresses."""

    def __init__(
        self,
        folder: Path,
        browser: Browser,
        kernels: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.folder, self.browser, self.python = folder, browser, python
        self.notebooks = folder / "notebooks"
        self._notes = folder / "notes.jsonl"
        self._token = secrets.token_hex(8)
        self._names = itertools.count()
        self.failures = 0
        """How many tests had failed when the last picture was taken."""
        self._server: subprocess.Popen[bytes] | None = None
        self.notebooks.mkdir(parents=True)
        self._notes.touch()
        for name, value in {**QUIET, **(settings or {})}.items():
            path = folder / "settings" / "@jupyterlab" / "apputils-extension" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))
        for name, python in (kernels or {}).items():
            spec = folder / "data" / "kernels" / name / "kernel.json"
            spec.parent.mkdir(parents=True)
            argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            about = {"display_name": name, "language": "python", "interrupt_mode": "signal"}
            spec.write_text(json.dumps({"argv": argv, **about}))

    # ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> Lab:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        places = {"CONFIG": "config", "RUNTIME": "runtime", "DATA": "data"}
        environment = {
            **os.environ,
            **{f"JUPYTER_{key}_DIR": str(self.folder / name) for key, name in places.items()},
            "JUPYTERLAB_SETTINGS_DIR": str(self.folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.folder / "workspaces"),
            "IPYTHONDIR": str(self.folder / "ipython"),
            "FINETUNE_NB_TEST_NOTES": str(self._notes),
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "support")]),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        options = {
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": port,
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": self.notebooks,
            "IdentityProvider.token": self._token,
            f"{self.app}.expose_app_in_browser": True,
        }
        command = [self.python, "-m", self.module, "--no-browser", "--allow-root"]
        command += [f"--{name}={value}" for name, value in options.items()]
        log = self.folder / "server.log"
        with log.open("wb") as file:
            self._server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

        def answers() -> bool:
            assert self._server is not None
            if self._server.poll() is not None:
                raise RuntimeError(f"{self.module} ended with {self._server.returncode}:\n{log.read_text()[-3000:]}")
            with contextlib.suppress(OSError):
                return bool(self.ask("api/status"))
            return False

        until(answers, 60, "the server's first answer")
        self.context = self.browser.new_context(viewport={"width": 1300, "height": 1000})
        self.new_page()
        return self

    def stop(self) -> None:
        self.context.close()
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()

    def ask(self, path: str, method: str = "GET") -> Any:
        """The server's answer to a call of its REST interface."""
        request = urllib.request.Request(f"{self.url}/{path}", method=method)
        request.add_header("Authorization", f"token {self._token}")
        with urllib.request.urlopen(request, timeout=5) as reply:
            return json.loads(reply.read() or "null")

    def new_page(self) -> Page:
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        return self.page

    def address(self, name: str) -> str:
        return f"{self.url}/{self.place}/{name}.ipynb?token={self._token}&reset"

    # ── what is in it ────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, cells: Sequence[str], kernel: str = "python3", name: str | None = None) -> Notebook:
        """A new notebook with those cells, alone in the window, its kernel ready. Ends the kernel of the one before."""
        self.close_notebooks()
        name = name or f"notebook-{next(self._names)}"
        cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
        spec = {"name": kernel, "display_name": kernel, "language": "python"}
        written = {
            "nbformat": 4,
            "nbformat_minor": 5,
            "metadata": {"kernelspec": spec},
            "cells": [{**cell, "id": f"cell-{i}", "source": source.strip("\n")} for i, source in enumerate(cells)],
        }
        path = self.notebooks / f"{name}.ipynb"
        path.write_text(json.dumps(written))
        return Notebook(self, path)

    def close_notebooks(self) -> None:
        """Closes what is open in the window, saved or not, and ends every kernel."""
        if self.page.is_closed():
            self.new_page()
        if self.page.url.startswith(self.url):
            self.page.evaluate("[...jupyterapp.shell.widgets('main')].forEach(widget => widget.dispose())")
        for session in self.ask("api/sessions"):
            self.ask(f"api/sessions/{session['id']}", "DELETE")

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What `probe.note(name, ...)` wrote in a kernel: its values, `event` and `time` (seconds since 1970)."""
        lines = self._notes.read_text().rpartition("\n")[0].splitlines()  # a last one may be half written yet
        found = [json.loads(line) for line in lines]
        return [event for event in found if name is None or event["event"] == name]

    def wait_for_event(self, name: str, count: int = 1, seconds: float = 20.0) -> list[dict[str, Any]]:
        """The events of that name, once there are so many."""
        what = f"event {name!r} number {count}"
        return until(lambda: len(found := self.events(name)) >= count and found, seconds, what, self._breathe)

    def forget_events(self) -> None:
        self._notes.write_text("")

    def _breathe(self) -> None:
        """Lets the browser's own events through while something is waited for."""
        self.page.wait_for_timeout(20)


class Notebook7(Lab):
    """Notebook 7: JupyterLab's parts with one notebook a page."""

    module, app, place = "notebook", "JupyterNotebookApp", "notebooks"

    def close_notebooks(self) -> None:
        if not self.page.is_closed():
            self.page.goto("about:blank")
        super().close_notebooks()


class Notebook:
    """One notebook in the window. Cells are named by their position."""

    def __init__(self, lab: Lab, path: Path) -> None:
        self.lab, self.path = lab, path
        if self.page.url.startswith(lab.url):  # the page is there already, and takes seconds to load
            self.command("docmanager:open", {"path": path.name})
            self._wait_until_there()
        else:
            self.goto()

    @property
    def page(self) -> Page:
        return self.lab.page

    # ── the window ───────────────────────────────────────────────────────────────────────────────────────────────────

    def goto(self) -> None:
        """Opens the notebook in the window, alone, and waits until its kernel is connected."""
        self.page.goto(self.lab.address(self.path.stem))
        self._wait_until_there()

    def _wait_until_there(self) -> None:
        self.page.wait_for_selector(f"{PANEL} .jp-Cell", timeout=60_000)
        self.page.wait_for_function(
            """path => { const widget = window.jupyterapp?.shell.currentWidget;
                         const kernel = widget?.sessionContext?.session?.kernel;
                         return widget?.context?.path === path && kernel
                                && ['idle', 'busy'].includes(kernel.status)
                                && kernel.connectionStatus === 'connected'; }""",
            arg=self.path.name,
            timeout=60_000,
        )

    def reload(self) -> None:
        """Reloads the page, as the browser's button does; the kernel continues."""
        # JupyterLab writes the open notebook into the address some time after it has opened it.
        until(lambda: self.page.url.split("?")[0].endswith(self.path.name), 20, "its address", self.lab._breathe)
        self.page.reload()
        self._wait_until_there()

    def close_tab(self) -> None:
        """Closes the browser's tab; the kernel continues."""
        self.page.close()

    def open_tab(self) -> None:
        """A new tab on the notebook."""
        self.lab.new_page()
        self.goto()

    def set_theme(self, theme: str) -> None:
        """theme: "light" or "dark"."""
        self.command("apputils:change-theme", {"theme": f"JupyterLab {theme.capitalize()}"})
        light = str(theme.lower() != "dark").lower()
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Runs a command of JupyterLab, such as "docmanager:save"."""
        return self.page.evaluate(
            "([name, arguments]) => jupyterapp.commands.execute(name, arguments).then(() => null)",
            [name, dict(arguments or {})],
        )

    def save(self) -> nbformat.NotebookNode:
        """Saves the notebook; returns what the file holds."""
        self.command("docmanager:save")
        return nbformat.read(self.path, as_version=4)

    def screenshot(self, path: Path, cell: int | None = None) -> Path:
        """A picture of the window, or of one cell's output."""
        (self.page if cell is None else self.output(cell)).screenshot(path=str(path))
        return path

    # ── cells ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def cell(self, index: int) -> Locator:
        return self.page.locator(f"{PANEL} .jp-Cell").nth(index)

    def output(self, index: int) -> Locator:
        return self.cell(index).locator(".jp-Cell-outputArea")

    def run(self, index: int, seconds: float = 60.0) -> None:
        """Runs the cell and waits until it has ended."""
        self.start(index)
        self.wait_idle(index, seconds)

    def start(self, index: int) -> None:
        """Runs the cell; does not wait."""
        self.page.evaluate(
            """index => { const content = jupyterapp.shell.currentWidget.content;
                          content.activeCellIndex = index; content.deselectAll();
                          jupyterapp.commands.execute('notebook:run-cell'); }""",
            index,
        )

    def wait_idle(self, index: int, seconds: float = 60.0) -> None:
        """Waits until the cell has ended, with or without an error."""
        prompt = self.cell(index).locator(".jp-InputPrompt")
        self.page.wait_for_timeout(40)
        until(
            lambda: prompt.inner_text().strip("[]: \n").isdigit(),
            seconds,
            f"the end of cell {index}, which shows {self.text(index)!r},",
            self.lab._breathe,
        )

    def is_running(self, index: int) -> bool:
        return "*" in self.cell(index).locator(".jp-InputPrompt").inner_text()

    def text(self, index: int) -> str:
        """The text of the cell's outputs, one below the other."""
        outputs = self.output(index).locator(".jp-OutputArea-output")
        return "\n".join(text.strip() for text in outputs.all_inner_texts())

    def html(self, index: int) -> str:
        """The output as the page has it."""
        return self.output(index).inner_html() if self.output(index).count() else ""

    def wait_for_text(self, index: int, text: str, seconds: float = 20.0) -> None:
        """Waits until the output contains that text."""
        until(lambda: text in self.text(index), seconds, f"{text!r} in cell {index}", self.lab._breathe)

    def interrupt(self) -> None:
        """Presses the stop button of the toolbar."""
        self.page.locator(f"{PANEL} [data-jp-item-name='interrupt'] .jp-ToolbarButtonComponent").first.click()

    # ── widgets ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def focus_slider(self, index: int, slider: int = 0) -> None:
        """Puts the keyboard's focus on a slider of the cell's output."""
        handle = self.output(index).locator(".widget-slider").nth(slider).locator(".noUi-handle").first
        handle.wait_for()
        handle.focus()

    def press(self, key: str) -> float:
        """Presses a key, where the focus is: "ArrowRight". Returns when, in seconds since 1970."""
        now = time.time()
        self.page.keyboard.press(key)
        return now

    # ── the kernel's messages ────────────────────────────────────────────────────────────────────────────────────────

    def round_trip(self, code: str = "1+1") -> float:
        """Seconds from asking the kernel, beside the cells, for the value of an expression until its reply is here."""
        return self.page.evaluate(
            """async code => { const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                               const begun = performance.now();
                               await kernel.requestExecute({code, store_history: false}).done;
                               return (performance.now() - begun) / 1000; }""",
            code,
        )

    @contextlib.contextmanager
    def messages(self) -> Iterator[list[dict[str, Any]]]:
        """Inside, the messages between the page and its kernels are added to the list: `sent` (by the page), `time`,
        `channel`, `size` in bytes, `type`, `parent` (the type of the request), `content`. The kernel is reconnected for it."""
        found: list[dict[str, Any]] = []

        def note(sent: bool) -> Callable[[Any], None]:
            return lambda payload: found.append({"sent": sent, "time": time.time(), **_read_message(payload)})

        def listen(socket: Any) -> None:
            if "/channels" in socket.url:
                socket.on("framereceived", note(False))
                socket.on("framesent", note(True))

        self.page.on("websocket", listen)
        try:
            self.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.reconnect()")
            yield found
        finally:
            self.page.remove_listener("websocket", listen)


def _read_message(payload: str | bytes) -> dict[str, Any]:
    """A frame of the `v1.kernel.websocket.jupyter.org` protocol: offsets, then channel, header, parent, metadata, content."""
    if isinstance(payload, str):
        return {"channel": "", "size": len(payload), "type": "", "parent": "", "content": {}}
    (count,) = struct.unpack_from("<Q", payload)
    offsets = struct.unpack_from(f"<{count}Q", payload, 8)
    parts = [payload[start:end] for start, end in itertools.pairwise(offsets)]
    header, parent, content = json.loads(parts[1]), json.loads(parts[2]), json.loads(parts[4])
    return {
        "channel": parts[0].decode(),
        "size": len(payload),
        "type": header["msg_type"],
        "parent": parent.get("msg_type", ""),
        "content": content,
    }
