"""Small true models for tests: random weights, a tokenizer of bytes, a chat template that only ever appends."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
APPENDING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}>{{ c.function.arguments.expression }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLS = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\A>",
            "close_pattern": r"<\|end\|>.*",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "calc", "arguments": {"expression": "{content}"}}},
        },
        "content": {"close_pattern": r"<\|end\|>.*", "content": "text"},
    },
}


def byte_tokenizer(template=APPENDING, response_template=None):
    vocabulary = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    extra = {"response_template": response_template} if response_template else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=template, **extra
    )


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
