"""Writes rollouts as a log of Inspect AI (.eval), which its viewer and its readers open. Inspect need not be installed.

A rollout is a sample: its id is "e3/q17", example q17 of epoch 3, and its epoch in Inspect's sense is the attempt, from 1. Every
score is one of the sample's, among them "reward".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZipFile

from ..redaction import redact_text
from .json import encode, finite

__all__ = [
    "write_inspect_log",
]


def write_inspect_log(file: BinaryIO, run_id: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a log.

    Args:
        file: Where to.
        run_id: The run's id, which becomes the name of the task.
        records: Rows of trajectories with their `messages`, in OpenAI's chat format.
    """
    summaries: list[dict[str, Any]] = []
    totals: dict[str, list[float]] = {}
    with ZipFile(file, "w", ZIP_DEFLATED) as archive:

        def add(name: str, value: Any) -> None:
            archive.writestr(name, encode(finite(value)))

        about = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "task": run_id,
            "task_id": run_id,
            "run_id": run_id,
            "eval_id": run_id,
            "dataset": {"name": run_id},
            "model": "finetune_nb/policy",
            "config": {},
        }
        plan = {"name": "rollout", "steps": [{"solver": "finetune_nb"}]}
        add("_journal/start.json", {"version": 2, "eval": about, "plan": plan})
        for record in records:
            sample = _sample(record)
            add(f"samples/{sample['id']}_epoch_{sample['epoch']}.json", sample)
            summaries.append(_summary(sample))
            for name, score in (sample["scores"] or {}).items():
                totals.setdefault(name, []).append(score["value"])
        add("summaries.json", summaries)
        failed = sum("error" in each for each in summaries)
        results = {
            "total_samples": len(summaries),
            "completed_samples": len(summaries) - failed,
            "scores": [_total(name, values) for name, values in totals.items()],
        }
        header = {"version": 2, "status": "success", "eval": about, "plan": plan, "results": results, "stats": {}}
        add("header.json", header)


def _sample(record: Mapping[str, Any]) -> dict[str, Any]:
    messages = [_message(each) for each in record["messages"] if "role" in each]
    first = next((place for place, each in enumerate(messages) if each["role"] == "assistant"), len(messages))
    last = next((each for each in reversed(messages) if each["role"] == "assistant"), None)
    scores = {
        name.removeprefix("score_"): {"value": value}
        for name, value in record.items()
        if (name == "reward" or name.startswith("score_")) and name != "score_reward" and _is_number(value)
    }
    output: dict[str, Any] = {"model": "finetune_nb/policy", "choices": [], "completion": ""}
    if last is not None:
        output["choices"] = [{"message": last, "stop_reason": _stop_reason(record.get("finish_reason"), last)}]
        output["completion"] = last["content"]
    sample: dict[str, Any] = {
        "id": redact_text(f"e{record['epoch']}/{record['example']}"),
        "epoch": int(record["generation"]) + 1,
        "input": messages[:first],
        "target": "",
        "messages": messages,
        "output": output,
        "scores": scores or None,
        "metadata": {name: record[name] for name in _METADATA if record.get(name) is not None},
    }
    if record.get("error"):
        sample["error"] = {"message": str(record["error"]), "traceback": "", "traceback_ansi": ""}
    return sample


_METADATA = (
    "trajectory",
    "epoch",
    "example",
    "generation",
    "advantage",
    "selected",
    "reason",
    "policy_version",
    "tokens",
    "output",
)
"""Columns that have no place of their own in a sample."""


def _summary(sample: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: sample[name] for name in ("id", "epoch", "input", "target", "scores", "metadata")}
    known |= {"completed": True, "message_count": len(sample["messages"])}
    if "error" in sample:
        known["error"] = sample["error"]["message"]
    return known


def _total(name: str, values: list[float]) -> dict[str, Any]:
    mean = math.fsum(values) / len(values)
    return {
        "name": name,
        "scorer": name,
        "scored_samples": len(values),
        "metrics": {"mean": {"name": "mean", "value": mean}},
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _stop_reason(finish_reason: Any, message: Mapping[str, Any]) -> str:
    if message.get("tool_calls"):
        return "tool_calls"
    return {"length": "max_tokens"}.get(str(finish_reason), "stop")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role = str(message["role"])
    known: dict[str, Any] = {"role": role if role in _ROLES else "user", "content": message.get("content") or ""}
    if role == "assistant":
        known |= {"source": "generate", "model": "finetune_nb/policy"}
        if message.get("tool_calls"):
            known["tool_calls"] = [_tool_call(place, each) for place, each in enumerate(message["tool_calls"])]
    elif role == "tool":
        known |= {"tool_call_id": message.get("tool_call_id"), "function": message.get("name")}
    return known


_ROLES = ("system", "user", "assistant", "tool")


def _tool_call(place: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    given = function.get("arguments")
    made: dict[str, Any] = {
        "id": str(call.get("id") or place),
        "function": str(function.get("name")),
        "type": "function",
    }
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        return {**made, "arguments": {}, "parse_error": f"{error}: {given}"}
    return {**made, "arguments": arguments if isinstance(arguments, dict) else {"arguments": arguments}}
