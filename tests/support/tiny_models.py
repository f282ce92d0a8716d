"""Small true models for tests: random weights, and the tokenizer of byte_tokenizer.py."""

import inspect

import torch
from byte_tokenizer import APPENDING, CALLS, SPECIAL, byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

__all__ = ["APPENDING", "CALLS", "SPECIAL", "byte_tokenizer", "passes_of", "random_model", "weights"]


def random_model(kind="llama", positions=128, seed=0):
    """Two layers, wide enough logits that replies differ from each other."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 262, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=positions, **sizes)).eval()
    sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["max_position_embeddings"] = positions
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def weights(adapter):
    """All weights of an adapter's model, in one vector."""
    return torch.cat([p.detach().flatten() for p in adapter.policy.model.parameters()]).clone()


def passes_of(model, monkeypatch):
    """The shapes of the ids of each pass, as they come."""
    shapes, forward = [], model.forward

    def watched(input_ids, **inputs):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **inputs)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", watched)
    return shapes
