"""What classes of the package tell a front end to show: plain values, which every front end can encode."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.analysis.agreement import agreement
from finetune_nb.notebook.display import ProgressLine
from finetune_nb.notebook.panel import Panel, StaticPanel
from finetune_nb.saving.saved_model import SavedModel
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, ScriptedPolicy, sums
from finetune_nb.types import RolloutFailure

PACKAGE = Path(ft.__file__).parent
ENCODED = {str, bytes, int, float, bool, type(None)}
"""A front end may encode by `type(value)`: marimo makes `{}` of a subclass of str."""


def is_display(name: str) -> bool:
    """Whether IPython or marimo calls a method of that name to show an object."""
    return name in ("_mime_", "_display_", "_ipython_display_") or (name.startswith("_repr_") and name.endswith("_"))


def names_in(node: ast.ClassDef) -> Iterator[str]:
    """Names that a class's body defines or assigns."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name
        if isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def classes_with_displays() -> list[type]:
    """Read from the source, so that a module whose packages are missing here is looked into as well."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(map(is_display, names_in(node))):
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
                found.append(getattr(importlib.import_module(module), node.name))
    return found


@pytest.fixture
def shown(tmp_path, closing, monkeypatch) -> list[Any]:
    """One of everything that shows itself."""

    def dealt(epoch: int) -> dict[str, list[float | None]]:
        return {f"q{i}": [0.0, i / 10, 1.0] for i in range(10)} | {"lost": [None, 0.0, 1.0]}

    def run(name: str) -> ft.Run:
        parts = dict(builder=ScriptedBuilder(dealt), adapter=FakeAdapter(policy=ScriptedPolicy(coin)))
        made = closing(ft.Run(guess, right, sums(4), output_dir=tmp_path, name=name, curriculum={}, **parts))
        ft.run_sync(made.next_epoch())
        return made

    first, second = run("first"), run("second")
    still = first.panel()
    monkeypatch.setattr("finetune_nb.notebook.panel.has_frontend", lambda: True)
    panel = first.panel()
    panel.close()
    assert isinstance(still, StaticPanel) and isinstance(panel, Panel)
    return [
        first,
        first.config,
        first[0],
        first[0].collection.trajectories[0][0],
        RolloutFailure("lost", 0, "Error: lost"),
        first.show(),
        first.signal(),
        first.compare_group(),
        first.compare("e0/q1/0", "e0/q1/2"),
        first.history("q1"),
        first.find("a"),
        first.preview(percentile=0.5, enabled=True),
        ft.compare([first, second]),
        first.rescore(),
        first.diagnose(),
        agreement(["e0/a/0", "e0/b/0"], [0.0, 1.0], [0.5, 1.0], [3, 4]),
        first.plot_rewards(),
        ProgressLine("rollouts", 1, 2),
        still,
        panel,
        first.browse(),
        SavedModel(tmp_path / "model", ()),
    ]


def leaves(value: Any) -> Iterator[Any]:
    """What is inside of dicts, lists and tuples."""
    if type(value) is dict:
        for key, inside in value.items():
            yield key
            yield from leaves(inside)
    elif type(value) in (list, tuple):
        for inside in value:
            yield from leaves(inside)
    else:
        yield value


@pytest.mark.slow
@pytest.mark.proof
def test_every_display_of_every_class_is_of_plain_values(shown) -> None:
    classes = classes_with_displays()
    assert len(classes) >= 14
    for known in classes:
        assert any(isinstance(each, known) for each in shown), f"{known.__name__} shows itself: add one to `shown`."
    for each in shown:
        displays = [name for name in dir(type(each)) if is_display(name)]
        assert displays, type(each)
        for name in displays:
            for leaf in leaves(getattr(each, name)()):
                assert type(leaf) in ENCODED, f"{type(each).__name__}.{name} has a {type(leaf).__name__}"
