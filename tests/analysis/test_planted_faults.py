"""`diagnose` finds planted faults, and has nothing to say of runs that learn.

    python -m pytest tests/analysis/test_planted_faults.py -m slow -s

prints the table of notebooks/reference/troubleshooting.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from planted_faults import HEALTHY, PLANTED, after_epochs

import finetune_nb as ft
from finetune_nb.analysis.diagnosis import Diagnosis

pytestmark = pytest.mark.slow


@dataclass
class Outcome:
    expected: str | None
    """The planted fault's kind; None for a run without a fault."""
    found: Diagnosis
    as_it_went: list[str]
    """Kinds that are more than information, of any epoch's end."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    todo = [(name, None, *each) for name, each in HEALTHY.items()]
    todo += [(name, *each) for name, each in PLANTED.items()]
    found = {}
    for name, expected, epochs, make in todo:
        run = after_epochs(tmp_path_factory.mktemp(name), make, epochs)
        as_it_went = set()
        if expected is None:
            for end in range(1, epochs + 1):
                as_it_went |= {each.kind for each in run.diagnose(slice(0, end)) if each.severity != "info"}
        found[name] = Outcome(expected, run.diagnose(), sorted(as_it_went))
        run.close()
        assert repr(ft.Run.open(run.folder).diagnose()) == repr(found[name].found)  # the same from the disk
    return found


def test_planted_faults_are_found(outcomes):
    planted = {name: each for name, each in outcomes.items() if each.expected is not None}
    missed = [name for name, each in planted.items() if each.expected not in [f.kind for f in each.found]]
    for name, each in planted.items():
        known = [finding for finding in each.found if finding.kind == each.expected]
        said = known[0].sentence if known else "NOT FOUND"
        print(f"| {name.replace('_', ' ')} | `{each.expected}` | {said} |")
    kinds = {each.expected for each in planted.values()}
    print(
        f"{len(planted) - len(missed)} of {len(planted)} planted faults of {len(kinds)} kinds found; missed: {missed}"
    )
    assert len(kinds) >= 12
    assert len(missed) <= len(planted) // 12


def test_runs_that_learn_have_no_finding_at_the_end_of_any_epoch(outcomes):
    learning = {name: each for name, each in outcomes.items() if each.expected is None}
    for name, each in learning.items():
        said = ", ".join(f"{f.kind} ({f.severity})" for f in each.found) or "nothing"
        print(f"| {name.replace('_', ' ')} | {said} | {', '.join(each.as_it_went) or 'nothing'} |")
    alarmed = [name for name, each in learning.items() if each.as_it_went]
    assert len(learning) >= 10
    assert len(alarmed) <= len(learning) // 10, alarmed
