"""A run on a Tinker server whose reward is the share of letters and digits in eight sampled tokens.

python letters.py URL MODEL FOLDER NAME EPOCHS    until so many epochs are recorded
"""

from __future__ import annotations

import sys

import finetune_nb as ft
from finetune_nb.backends.tinker.adapter import TinkerAdapter, TinkerConfig

__all__ = ["ROWS", "ask", "letters", "letters_adapter", "letters_run"]

ROWS = [{"id": i, "question": f"letter {i}?", "answer": ""} for i in range(4)]
TOKENS = 8


async def ask(question, llm):
    return (await llm.chat([{"role": "user", "content": question}])).content


def letters(item):
    return sum(c.isascii() and c.isalnum() for c in item.output_obj) / TOKENS


def letters_adapter(url, model, **settings):
    config = {"model": str(model), "base_url": url, "rank": 8, "learning_rate": 5e-3, "loss_reduction": "sequence_mean"}
    return TinkerAdapter(TinkerConfig(**{**config, **settings}), seed=1)


def letters_run(url, model, folder, name, adapter=None, **options):
    """adapter: settings of its config."""
    settings = {"generations": 16, "sampling": {"max_tokens": TOKENS}, "output_dir": folder, "seed": 1, **options}
    return ft.Run(ask, letters, ROWS, adapter=letters_adapter(url, model, **(adapter or {})), name=name, **settings)


if __name__ == "__main__":
    url, model, folder, name, epochs = sys.argv[1:]
    run = letters_run(url, model, folder, name, resume="auto")
    run.start(int(epochs) - len(run))
    run.wait()
    print("done", len(run), flush=True)
    run.close()
