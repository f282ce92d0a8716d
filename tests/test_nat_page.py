"""notebooks/reference/nat.md: every line names a test that is there, and no fault of the Toolkit is left out."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "notebooks" / "reference" / "nat.md"


def rows_of_tests(page):
    """The rows of the tables whose last column is "test"."""
    tables = re.findall(r"(?m)^\|.*\| test \|\n\|[-|]+\|\n((?:\|.*\n)+)", page)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for table in tables for line in table.splitlines()]


ROWS = rows_of_tests(PAGE.read_text(encoding="utf-8"))
FAULTS = [row for row in ROWS if row[0].isdigit()]


@cache
def names_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def is_there(named):
    file, _, name = named.partition("::")
    path = next((each for each in (TESTS / "with_nat" / file, TESTS / file) if each.is_file()), None)
    return path is not None and name.startswith("test_") and name in names_in(path)


def test_every_line_names_a_test_that_is_there():
    assert len(ROWS) > 100
    named = [row[-1].strip("`") for row in ROWS]
    named += re.findall(r"`(test_\w+\.py::\w+)`", PAGE.read_text(encoding="utf-8"))
    assert [each for each in named if not is_there(each)] == []
    assert not is_there("test_nat_run.py::test_that_is_not_there")
    assert not is_there("test_nowhere.py::test_it")


def test_all_faults_are_in_the_table_each_with_what_becomes_of_it():
    assert [int(row[0]) for row in FAULTS] == list(range(1, 47))
    assert {row[3] for row in FAULTS} == {"healed", "holds", "refused"}
    assert all(all(row) for row in FAULTS)
