"""These tests run llama.cpp's own converter, in an environment that .ci/all makes for them.

.ci/all gguf
"""

import sys
from pathlib import Path

import pytest


def checkout():
    """What the environment has of llama.cpp's sources."""
    places = [Path(folder) / "llama.cpp" for folder in sys.path]
    return next((place for place in places if (place / "convert_hf_to_gguf.py").is_file()), None)


collect_ignore_glob = [] if checkout() else ["test_*.py"]


@pytest.fixture(autouse=True)
def llama_cpp(monkeypatch):
    monkeypatch.setenv("FINETUNE_NB_LLAMA_CPP", str(checkout()))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A small random Llama with a BPE tokenizer that llama.cpp knows, in the manner of Llama 2's."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, initial_alphabet=["▁"], show_progress=False)
    texts = ["the quick brown fox jumps over the lazy dog", "what is three plus four", "a question and an answer"]
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=template,
        additional_special_tokens=["<|im_start|>"],
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.1, bos_token_id=1, eos_token_id=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder
