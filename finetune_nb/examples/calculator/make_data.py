"""Writes data/train.json and data/held_out.json: `python -m finetune_nb.examples.calculator.make_data`.

One seeded draw is cut into train, held_out and dev, so that no question is in two of them. dev is not written: it
is there to choose a warm start and settings by, so that held_out is only ever reported.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from . import task

DATA = Path(__file__).parent / "data"
PER_LEVEL = {"train": 180, "held_out": 100, "dev": 100}


def splits(seed: int = 0) -> dict[str, list[dict]]:
    """Rows {"id", "question", "answer", "level"} of each split; levels take turns, so any stretch is balanced."""
    rng = random.Random(seed)
    questions: dict[int, list[str]] = {}
    for level in task.LEVELS:
        drawn: dict[str, None] = {}
        while len(drawn) < sum(PER_LEVEL.values()):
            drawn[task.make_question(rng, level)] = None
        questions[level] = list(drawn)

    rows: dict[str, list[dict]] = {}
    for name, count in PER_LEVEL.items():
        turns = [(level, questions[level].pop()) for _ in range(count) for level in task.LEVELS]
        rows[name] = [
            {"id": f"{name}-{number:04d}", "question": question, "answer": task.answer(question), "level": level}
            for number, (level, question) in enumerate(turns, start=1)
        ]
    return rows


def main() -> None:
    rows = splits()
    DATA.mkdir(exist_ok=True)
    for name in ("train", "held_out"):
        text = ",\n".join(json.dumps(row) for row in rows[name])
        (DATA / f"{name}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
