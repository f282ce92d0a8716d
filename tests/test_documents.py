"""What README, CONTRIBUTING, CHANGELOG, the reference and the notebooks refer to is there: links, anchors, pictures, commands,
extras, public names."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

import finetune_nb as ft
from finetune_nb.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "notebooks" / "reference").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = [pytest.param(path, id=path.name) for path in (*PAGES, *NOTEBOOKS)]


@cache
def cells(path: Path) -> list[tuple[str, str]]:
    """(kind, text); a page of Markdown is one cell of its own kind."""
    if path.suffix == ".md":
        return [("markdown", path.read_text(encoding="utf-8"))]
    return [(cell.cell_type, cell.source) for cell in nbformat.read(path, as_version=4).cells]


def prose(path: Path) -> str:
    return "\n\n".join(text for kind, text in cells(path) if kind == "markdown")


def code(path: Path) -> list[str]:
    """Cells of code, and what stands in fences of a page."""
    fenced = [
        block
        for kind, text in cells(path)
        if kind == "markdown"
        for block in re.findall(r"```python\n(.*?)```", text, re.S)
    ]
    return [text for kind, text in cells(path) if kind == "code"] + fenced


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", prose(path), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    without_code = re.sub(r"```.*?```|`[^`\n]*`", "", prose(path), flags=re.S)
    return re.findall(r"\]\(([^()\s]+)\)", without_code) + re.findall(r'(?:src|href)="([^"]+)"', without_code)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_link_leads_somewhere(path):
    broken = []
    for link in links(path):
        if re.match(r"https?://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_test_of_links_would_notice_a_broken_one():
    assert links(ROOT / "README.md")
    assert "where-it-runs" in anchors(ROOT / "README.md") and "no-such-heading" not in anchors(ROOT / "README.md")


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_command_exists(path):
    text = prose(path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = [
        extra.strip() for group in re.findall(r"(?:finetune_nb|\.)\[([\w, ]+)\]", text) for extra in group.split(",")
    ]
    assert [extra for extra in named if extra not in extras] == []
    for command in set(re.findall(r"finetune-nb ([a-z]+[a-z-]*)", text)):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, command
    modules = re.findall(r"python3? -m (finetune_nb[\w.]*)", text)
    assert [module for module in modules if find_spec(module) is None] == []
    files = re.findall(r"python3? (tests/\S+\.py)|pytest (?:-\S+ (?:slow |not slow )?)*(tests/[\w/.]+)", text)
    assert [file for pair in files for file in pair if file and not (ROOT / file).exists()] == []


MADE = ("api.md", "config.md")
"""Pages that are made from the docstrings, and have no code of their own."""

WITH_CODE = [page for page in (*PAGES, *NOTEBOOKS) if page.name not in MADE and code(page)]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in WITH_CODE])
def test_every_name_in_code_is_one_of_the_package(path):
    blocks = code(path)
    assert blocks
    wrong = []
    for block in blocks:
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(block), mode="exec")):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"ft": ft, "run": ft.Run}.get(node.value.id)
                if owner is not None and not hasattr(owner, node.attr):
                    wrong.append(ast.unparse(node))
    assert wrong == []


def test_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = {path.relative_to(ROOT / "finetune_nb").as_posix() for path in (ROOT / "finetune_nb").rglob("*.py")}
    named = re.findall(r"`([\w/]+\.py)`", text)
    assert named
    missing = [name for name in named if not any(file == name or file.endswith(f"/{name}") for file in files)]
    assert [name for name in missing if not (ROOT / name).exists()] == []


# ── plain English ────────────────────────────────────────────────────────────────────────────────────────────────────

DIALECT = re.compile(
    r"\bbehind (?:the )?(?:epoch|it|that|this)\b|\bgo(?:es)? on\b|\bgone on with\b|\bto be had\b|\bput away\b"
    r"|\bstands? (?:in|inside|into|for)\b|\bcomes? to (?:its|their|an) end\b|\bis told\b"
)
"""Phrases that are no idiomatic English for "after", "continue", "available", "archived", "is in", "ends", "means"."""


def package_text() -> list[tuple[str, str]]:
    """(where, text) of every docstring, message and comment of the package."""
    found = []
    for path in sorted((ROOT / "finetune_nb").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT):
                found.append((f"{path.relative_to(ROOT)}:{token.start[0]}", " ".join(token.string.split())))
    return found


def test_the_package_speaks_plain_english():
    assert not [(where, text) for where, text in package_text() if DIALECT.search(text)]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_documents_speak_plain_english(path):
    text = " ".join(prose(path).split())
    assert not [text[max(0, match.start() - 60) : match.end() + 60] for match in DIALECT.finditer(text)]


def test_the_test_of_phrases_would_notice_one():
    assert DIALECT.search("the weights behind epoch 5") and DIALECT.search("run the cell again to go on")
    assert not DIALECT.search("the weights after epoch 5") and not DIALECT.search("an HTTP server behind a proxy")
