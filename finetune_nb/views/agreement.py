"""Shows how far a judge agrees with labels, as text and HTML."""

from __future__ import annotations

import math

from ..analysis.agreement import Agreement
from ..text import count, number, one_line, signed
from .html import element, facts_table, table, title, view

__all__ = [
    "agreement_html",
    "agreement_text",
]

ROWS = 10
"""Most rollouts shown."""


def agreement_text(agreement: Agreement) -> str:
    """The agreement as text: its numbers in one line, then the rollouts that differ most."""
    numbers = ", ".join(f"{name} {value}" for name, value in _facts(agreement))
    lines = [f"{count(len(agreement), 'rollout')}: {numbers}"]
    for name, label, score in _differ_most(agreement):
        lines.append(f"  {name}: label {number(label)}, score {number(score)}")
    return "\n".join(lines)


def agreement_html(agreement: Agreement) -> str:
    """The agreement as HTML: its numbers, and a table of the rollouts that differ most."""
    rows = []
    for name, label, score in _differ_most(agreement):
        rows.append((one_line(name, 60), number(label), number(score), signed(score - label)))
    body = [title("agreement", count(len(agreement), "labelled rollout")), facts_table(_facts(agreement))]
    if rows:
        body.append(table(rows, ("differ most", "label", "score", "difference")))
    else:
        body.append(element("div", "Score and label are equal everywhere.", class_="ft-dim"))
    return view(*body)


def _differ_most(agreement: Agreement) -> list[tuple[str, float, float]]:
    """Name, label and score of the rollouts that differ most."""
    frame = agreement.frame[agreement.frame.difference != 0].head(ROWS)
    return list(zip(frame.trajectory.tolist(), frame.label.tolist(), frame.score.tolist(), strict=True))


def _facts(agreement: Agreement) -> list[tuple[str, str]]:
    facts = [
        ("Cohen's kappa", _number(agreement.kappa)),
        ("correlation", _number(agreement.correlation)),
        ("rank correlation", _number(agreement.rank_correlation)),
        ("bias (score - label)", _number(agreement.bias)),
        ("correlation of the bias with the output's length", _number(agreement.length_bias)),
    ]
    if agreement.missing:
        facts.append(("without a score", f"{agreement.missing:,}"))
    return facts


def _number(value: float) -> str:
    return "not defined" if math.isnan(value) else number(value)
