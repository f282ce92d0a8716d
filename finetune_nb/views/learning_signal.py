"""Shows what an epoch teaches, as text and HTML: signals with advice, a forecast for other group sizes, and histories."""

from __future__ import annotations

from collections.abc import Sequence

from ..analysis.learning_signal import SIGNALS, Example, GroupSize, LearningSignal
from ..text import count, duration, number, one_line, short
from .html import Html, bar, details, element, some_examples, sparkline, table, title, view

__all__ = [
    "signal_html",
    "signal_text",
]

ROWS = 12
"""Most examples shown per signal."""
NOTE = (
    "Expected for the next epoch, with the current policy and examples. “At least”: if examples whose rewards did not differ "
    "never will. Time is assumed to be proportional to the number of rollouts."
)


def signal_text(signal: LearningSignal) -> str:
    """The signal as text: one line per reason, then one line per group size."""
    lines = [f"epoch {signal.epoch}: {_headline(signal)}"]
    for name, examples in signal.by_signal().items():
        ids = ", ".join(one_line(example.id, 40) for example in examples[:3])
        if len(examples) > 3:
            ids += ", …"
        text = f"{len(examples):>5,}  {SIGNALS[name][0]} ({ids})"
        advice = _what_to_do(signal, name)
        lines.append(f"{text}: {advice}" if advice else text)
    for size in signal.forecast:
        text = (
            f"{size.generations:>5,} generations: {size.share:.0%} of the groups with spread, {number(size.tokens)} tokens, "
            f"{duration(size.seconds)}"
        )
        lines.append(f"{text}  (now)" if size.generations == signal.generations else text)
    return "\n".join(lines)


def signal_html(signal: LearningSignal) -> str:
    """The signal as HTML: reasons, the forecast for other group sizes, and one fold per reason with its examples' history."""
    rows = []
    for name, examples in signal.by_signal().items():
        share = bar(len(examples), len(signal.examples), f"{len(examples):,}")
        rows.append(
            [
                element("span", share, style="white-space:nowrap"),
                element("strong", name),
                element(
                    "div", SIGNALS[name][0], some_examples([example.id for example in examples]), style="min-width:14em"
                ),
                _what_to_do(signal, name),
            ]
        )
    body = [
        title(f"epoch {signal.epoch}", _headline(signal)),
        table(rows, ["groups", "signal", "why", "what to do"]),
    ]
    if signal.forecast:
        body.append(_sizes(signal.forecast, signal.generations))
        body.append(element("div", NOTE, class_="ft-dim"))
    for name, examples in signal.by_signal().items():
        body.append(_history(name, examples))
    return view(*body)


def _headline(signal: LearningSignal) -> str:
    teaching = sum(example.signal == "teaches" for example in signal.examples)
    verb = "teaches" if len(signal.examples) == 1 else "teach"
    groups = f"{teaching:,} of {count(len(signal.examples), 'group')} {verb}"
    return f"{groups} (concluded from what the Trainer submitted)" if signal.inferred else groups


def _what_to_do(signal: LearningSignal, name: str) -> str:
    advice = SIGNALS[name][1]
    if name == "all_worst" and signal.cut:
        return (
            f"{count(signal.cut, 'rollout')} of them were cut at the token limit: raise max_tokens. Otherwise {advice}"
        )
    return advice


def _sizes(forecast: Sequence[GroupSize], now: int) -> Html:
    """A table with one row per group size. now: the current group size."""
    rows = []
    for size in forecast:
        rows.append(
            [
                f"{size.generations:,} (now)" if size.generations == now else f"{size.generations:,}",
                bar(size.share, 1.0, f"{size.share:.0%}"),
                f"{size.at_least:.0%}",
                number(size.tokens),
                duration(size.seconds),
                number(size.tokens_per_teaching_group),
            ]
        )
    headers = ["generations", "groups with spread", "at least", "tokens", "time", "tokens per group with spread"]
    return table(rows, headers, "larger or smaller groups")


def _history(name: str, examples: Sequence[Example]) -> Html:
    """A fold with the examples of one reason, and their mean rewards in earlier epochs."""
    rows = []
    for example in examples[:ROWS]:
        course = " → ".join(map(number, example.means[-6:]))
        rows.append(
            [
                short(example.id, 60),
                f"{example.rollouts:,}",
                course,
                sparkline(example.means[-40:], course, 120, 24) if len(example.means) > 1 else Html(),
                number(example.spread),
                f"{example.taught} of {count(len(example.epochs), 'epoch')}",
            ]
        )
    headers = ["example", "rollouts", "mean reward so far", "course", "spread", "rewards differed in"]
    caption = f"the first {ROWS} of {len(examples):,}" if len(examples) > ROWS else None
    return details(f"{name}: {count(len(examples), 'example')}", table(rows, headers, caption))
