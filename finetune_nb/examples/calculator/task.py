"""The calculator task: '12+7-3' is to be answered '16', with a tool that does one operation at a time.

The tool is strict: it takes the first operation of what remains ('12+7') and gives back what remains after it
('19-3'). A model that copies well but cannot add finds out that calling the tool beats guessing. Pure Python; the
conversation itself (who calls the tool, how often, what ends an episode) is left to the workflow.
"""

from __future__ import annotations

import random
import re

LEVELS = (2, 3, 4, 5)
"""Operands in a question; a question's level is their number."""

LARGEST = 20
"""Operands are whole numbers from 1 to this."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Does the first operation of what remains, and gives back what remains after it.",
            "parameters": {
                "type": "object",
                "properties": {
                    "expression": {"type": "string", "description": "The first operation, as it stands there: 12+7"}
                },
                "required": ["expression"],
            },
        },
    }
]

_SUM = re.compile(r"(-?\d+)([+-])(\d+)((?:[+-]\d+)*)", re.ASCII)


def make_question(rng: random.Random, level: int) -> str:
    """A random question with `level` operands, such as '12+7-3' for level 3."""
    first, *others = (rng.randint(1, LARGEST) for _ in range(level))
    return str(first) + "".join(rng.choice("+-") + str(other) for other in others)


def first_operation(expression: str) -> str | None:
    """'12+7' of '12+7-3' and '-5-3' of '-5-3'; None when nothing is left to do: a bare number, or not a sum at all."""
    found = _SUM.fullmatch(expression)
    return None if found is None else "".join(found.group(1, 2, 3))


def calculate(expression: str, remaining: str) -> str | None:
    """The tool: '19-3' for ('12+7', '12+7-3'). None, a malformed call, unless `expression` is exactly the first
    operation of `remaining`."""
    found = _SUM.fullmatch(remaining)
    if found is None or expression != first_operation(remaining):
        return None
    left, sign, right, rest = found.groups()
    return str(int(left) + int(sign + right)) + rest


def answer(question: str) -> str:
    """The right answer, by doing one operation after another. A bare number answers itself."""
    while (operation := first_operation(question)) is not None:
        question = calculate(operation, question) or ""
    return question
