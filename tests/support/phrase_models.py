"""A small real policy for one text game: a Llama whose vocabulary has the game's phrases, so that its prompts are short."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer
from tokenizers import AddedToken
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def phrase_model(
    folder: Path, texts: Iterable[str], replies: Iterable[str], seed: int = 0, positions: int = 512
) -> Path:
    """Writes a model with random weights, and its tokenizer.

    Args:
        folder: Where to.
        texts: What the game shows: each part without a digit and without a reply becomes one token.
        replies: One token each.
        seed: Of the weights.
        positions: Tokens that the model holds.

    Returns:
        The folder, which `model=` of Run takes.
    """
    replies = sorted(set(replies))
    between = re.compile(rf"{'|'.join(map(re.escape, replies))}|\d")
    phrases = {part for text in texts for part in between.split(text) if len(part) > 1}
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in sorted(phrases) + replies])
    tokenizer.model_max_length = positions

    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
