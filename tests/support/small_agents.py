"""The agent, reward and scripted policy that runs are tested with: sums, right or wrong by the request's seed."""

from __future__ import annotations

import asyncio
import functools


async def guess(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def right(item):
    return float(item.output_obj == item.expected_output_obj)


def coin(messages, seed):
    a, b = messages[0]["content"].split("+")
    return str(int(a) + int(b) + seed % 2)


@functools.cache
def slots(number):
    """As many agents of one process as can be at something at once, such as a simulator that each node has one of."""
    return asyncio.Semaphore(number)
