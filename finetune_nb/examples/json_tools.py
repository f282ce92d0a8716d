"""A task for a small real model: turn a request into a JSON call of the right one of three tools.

    "Will it rain in Oslo today?"  ->  {"tool": "weather", "args": "Oslo"}

Nothing is computed and no tool is run: it is choosing and copying, which a model of 135 M weights can learn in a few
epochs of GRPO. Each tool but one is shown once in the prompt; what is never sampled is never rewarded. Held-out requests are
about cities that are not trained on.
"""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = [
    "HELD_OUT_CITIES",
    "TRAINING_CITIES",
    "all_right",
    "reward",
    "rows",
    "solve",
]

_words = str.split

TRAINING_CITIES = _words(
    "Oslo Paris Lima Cairo Tokyo Berlin Madrid Dublin Athens Vienna Quito Delhi Seoul Boston Dallas Warsaw Prague Havana "
    "Lagos Nairobi Lisbon London Munich Hamburg Cologne Porto Seville Valencia Bilbao Marseille Nantes Ghent Antwerp "
    "Malmo Tampere Riga Vilnius Tallinn Krakow Gdansk Brno Graz Linz Basel Verona Genoa Palermo Zagreb Sofia Cardiff "
    "Glasgow Leeds Denver Houston Phoenix Atlanta Seattle Portland Chicago Detroit"
)
HELD_OUT_CITIES = _words("Sydney Perth Toronto Milan Lyon Geneva Zurich Bergen Turin Naples Kyoto Osaka")

_SYSTEM = {"role": "system", "content": "Reply with a JSON call of one tool: calc, weather or time."}
_SHOWN = [
    {"role": "user", "content": "What time is it in Rome?"},
    {"role": "assistant", "content": '{"tool": "time", "args": "Rome"}'},
    {"role": "user", "content": "How much is 3 + 4?"},
    {"role": "assistant", "content": '{"tool": "calc", "args": "3 + 4"}'},
]
_REQUESTS = {
    "calc": ["What is {}?", "Compute {}.", "How much is {}?"],
    "weather": ["What is the weather in {}?", "How warm is it in {}?", "Will it rain in {} today?"],
    "time": ["What time is it in {}?", "Tell me the local time in {}."],
}


def rows(count: int, seed: int, cities: list[str] = TRAINING_CITIES) -> list[dict[str, Any]]:
    """Requests with the call that each wants as its answer: the three tools in turns, cities and numbers drawn by seed."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        tool = list(_REQUESTS)[i % 3]
        sum_ = f"{rng.randint(2, 99)} {rng.choice('+-*')} {rng.randint(2, 99)}"
        args = sum_ if tool == "calc" else rng.choice(cities)
        request = rng.choice(_REQUESTS[tool]).format(args)
        made.append({"id": f"{seed}-{i}", "question": request, "answer": {"tool": tool, "args": args}})
    return made


async def solve(question: str, llm: Any) -> str:
    """The agent: one turn. A reply that does not end is marked, so that it is no call."""
    reply = await llm.chat([_SYSTEM, *_SHOWN, {"role": "user", "content": question}])
    return reply.content if reply.finish_reason == "stop" else f"{reply.content} ..."


def reward(item: Any) -> float:
    """0.2 for a JSON call, 0.4 for the right tool, 0.4 for the right argument."""
    is_call, right_tool, right_args = _parts(item)
    return 0.2 * is_call + 0.4 * right_tool + 0.4 * right_args


def all_right(item: Any) -> float:
    """1 for the right call, else 0."""
    return float(all(_parts(item)))


def _parts(item: Any) -> tuple[bool, bool, bool]:
    try:
        call = json.loads(item.output_obj)
    except (TypeError, ValueError, RecursionError):
        return False, False, False
    if not (isinstance(call, dict) and set(call) == {"tool", "args"}):
        return False, False, False
    wanted = item.expected_output_obj
    return True, call["tool"] == wanted["tool"], _squeezed(call["args"]) == _squeezed(wanted["args"])


def _squeezed(value: Any) -> str:
    return str(value).replace(" ", "")
