"""Shows why a run does not learn, as text and HTML."""

from __future__ import annotations

from ..analysis.diagnosis import SEVERITIES, Diagnosis, Finding
from ..text import count, cut, one_line
from .html import Html, details, element, row, table, title, view

__all__ = [
    "diagnosis_html",
    "diagnosis_text",
]

SENTENCE_LIMIT = 500
"""Most characters of a finding's sentence: it may quote an error."""
_CLASSES = {"critical": "ft-bad", "warning": None, "info": "ft-dim"}


def diagnosis_text(found: Diagnosis) -> str:
    """The findings as text: a headline, then two lines for each."""
    lines = [f"{_where(found)}: {_headline(found)}"]
    for finding in found:
        lines.append(f"  {finding.severity:<8}  {finding.kind}: {one_line(finding.sentence, SENTENCE_LIMIT)}")
        shown = f" (see {', '.join(one_line(name, 60) for name in finding.evidence[:3])})" if finding.evidence else ""
        lines.append(f"{'':<12}next: {one_line(finding.next_step)}{shown}")
    lines += [f"  not checked: {one_line(each)}" for each in found.unchecked]
    return "\n".join(lines)


def diagnosis_html(found: Diagnosis) -> str:
    """The findings as HTML: a table of severity, sentence and next step, the rollouts that show it in a fold."""
    body = [title(f"diagnosis of run {one_line(found.run_id, 80)}", _where(found), _headline(found))]
    if found:
        rows = [
            [
                element("strong", finding.severity, class_=_CLASSES[finding.severity]),
                element("strong", finding.kind),
                [row(cut(finding.sentence, SENTENCE_LIMIT)), _evidence(finding)],
                element("code", finding.next_step),
            ]
            for finding in found
        ]
        body.append(table(rows, ["severity", "finding", "what was found", "next step"]))
    body += [element("div", f"not checked: {each}", class_="ft-dim") for each in found.unchecked]
    return view(*body)


def _evidence(finding: Finding) -> Html:
    if not finding.evidence:
        return Html()
    return details("seen in", ", ".join(one_line(name, 80) for name in finding.evidence))


def _where(found: Diagnosis) -> str:
    if not found.epochs:
        return "no epoch"
    first, last = found.epochs[0], found.epochs[-1]
    return f"epoch {first}" if len(found.epochs) == 1 else f"epochs {first} to {last}"


def _plural(severity: str, number: int) -> str:
    return "s" if severity == "warning" and number > 1 else ""


def _headline(found: Diagnosis) -> str:
    if not found:
        return "nothing was found that keeps it from learning" if found.epochs else "nothing to look at yet"
    many = [(severity, sum(finding.severity == severity for finding in found)) for severity in SEVERITIES]
    parts = ", ".join(f"{number} {severity}{_plural(severity, number)}" for severity, number in many if number)
    return f"{count(len(found), 'finding')} ({parts})"
