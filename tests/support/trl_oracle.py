"""TRL's trainers, asked for their loss and nothing else, and the batches and the model to ask with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

TEMPERATURE = 0.8


def small_model(directory: Path):
    """A random model, loaded from `directory`: TRL loads its reference from where the model came from."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return transformers.LlamaForCausalLM.from_pretrained(directory).eval()


def batch(rows=12, columns=15, seed=1):
    """Right-padded random sequences of different lengths, with random masks; no row without a trained token."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(1, 40, (rows, columns), generator=generator)
    lengths_B = torch.randint(6, columns + 1, (rows,), generator=generator)
    attention_BT = (torch.arange(columns) < lengths_B[:, None]).long()
    mask_BT = (torch.rand(rows, columns, generator=generator) < 0.6) & attention_BT.bool()
    mask_BT[:, :3], mask_BT[:, 3] = False, True
    return ids_BT * attention_BT, attention_BT, mask_BT


def noise(like_BT, scale, seed):
    return scale * torch.randn(like_BT.shape, generator=torch.Generator().manual_seed(seed))


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def trl_module():
    if os.environ.get("CI"):
        import trl
    else:
        trl = pytest.importorskip("trl")
    return trl


def trainer_of(kind, config, model, tmp_path, reward=lambda completions, **_: [0.0] * len(completions), **arguments):
    """One of TRL's trainers, whose loss is asked for and nothing else."""
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models

    arguments = config(
        output_dir=str(tmp_path), num_generations=4, temperature=TEMPERATURE, use_cpu=True, bf16=False,
        activation_checkpointing=False, report_to=[], max_completion_length=12, **arguments,
    )  # fmt: skip
    vocabulary = Tokenizer(models.WordLevel({str(i): i for i in range(40)}, unk_token="0"))
    trainer = kind(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "1"}] * 12),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, pad_token="0", eos_token="1", unk_token="0"
        ),
    )
    trainer.model.train()  # the normalizers differ in eval mode; the model has no dropout
    return trainer
