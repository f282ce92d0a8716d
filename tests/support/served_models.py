"""A small model in a directory, of a shape that servers take: two layers, with random weights that make replies differ."""

from __future__ import annotations

from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["write_model"]


def write_model(directory: Path, seed: int = 0, positions: int = 512) -> Path:
    """Writes a Llama of heads of 32 with the byte tokenizer, and returns its directory."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=262, initializer_range=0.2, max_position_embeddings=positions, **sizes, **ends)
    )
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
