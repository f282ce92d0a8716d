"""What runs in the training process: `accelerate launch -m finetune_nb.backends.trl.worker JOB_FOLDER`.

Reads job.json and data.jsonl, trains with TRL, writes progress.jsonl line by line and the trained model to `trained/`.
It knows nothing of runs; whatever goes wrong is a traceback on its standard error and an exit code.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "main",
]


def main(folder: Path) -> None:
    """One job, in every process that accelerate starts; the first one writes."""
    import torch
    from transformers import AutoModelForCausalLM

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    trainer = _trainer(folder, job, rows)
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if job["lora_rank"]:
        model = model.merge_and_unload()
    if trainer.accelerator.is_main_process:
        dtype = AutoModelForCausalLM.from_pretrained(folder / "model").dtype
        model.to(dtype).save_pretrained(folder / "trained")


def _trainer(folder: Path, job: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    """TRL's trainer for the job's method."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    settings = {
        "output_dir": str(folder / "checkpoints"),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "bf16": False,
        "gradient_checkpointing": False,
        **job["settings"],
    }
    source = str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    common: dict[str, Any] = {
        "model": source,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(rows),
        "callbacks": [_report(folder)],
        "peft_config": _lora(job["lora_rank"]),
    }
    if job["method"] == "dpo":
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        return DPOTrainer(args=DPOConfig(**settings), **common)
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    return SFTTrainer(args=SFTConfig(completion_only_loss=True, **settings), **common)


def _report(folder: Path) -> Any:
    """A callback that writes one line a logged step."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if state.is_world_process_zero:
                numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float) and math.isfinite(v)}
                line = {"step": state.global_step, "steps": state.max_steps, "metrics": numbers}
                with (folder / "progress.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    return Report()


def _lora(rank: int | None) -> Any:
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
