"""A model that was trained here, converted by llama.cpp, is the model that was saved, as transformers reads it."""

import pytest
import torch
from small_agents import guess
from transformers import AutoModelForCausalLM, AutoTokenizer, CTRLConfig, CTRLLMHeadModel

import finetune_nb as ft
from finetune_nb.errors import ConfigError
from finetune_nb.testing import sums

pytestmark = pytest.mark.slow

TEXT = "what is the lazy dog, and what is a question"
LARGEST_GAP = {"f32": 0.0, "f16": 0.01, "q8_0": 0.1}
"""Of log probabilities, in nats: what the rounding of the weights makes of this model's."""


@pytest.fixture
def trained(closing, llama_folder, tmp_path):
    """A run that has trained an epoch."""
    run = closing(
        ft.Run(
            guess,
            lambda output: len(output) % 5 / 4,
            sums(2),
            model=str(llama_folder),
            generations=4,
            sampling={"max_tokens": 8, "temperature": 0.8},
            training={"learning_rate": 1e-3, "lora": {"rank": 4}, "device": "cpu"},
            output_dir=tmp_path / "runs",
        )
    )
    ft.run_sync(run.next_epoch())
    assert run[0].trained
    return run


def logprobs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("outtype", LARGEST_GAP)
def test_gguf_has_the_log_probabilities_of_the_saved_model(outtype, trained, llama_folder, tmp_path):
    saved = trained.save_model(tmp_path / "model", merge=True, gguf=outtype)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    ids = tokenizer(TEXT)["input_ids"]
    expected = logprobs(model, ids)
    assert (
        expected - logprobs(AutoModelForCausalLM.from_pretrained(llama_folder), ids)
    ).abs().max() > 0.01  # it was trained

    read = AutoModelForCausalLM.from_pretrained(saved.path, gguf_file=saved.gguf.name, dtype=torch.float32)
    gap = (expected - logprobs(read, ids)).abs().max().item()
    assert gap == 0 if outtype == "f32" else 0 < gap <= LARGEST_GAP[outtype]


def test_gguf_tells_nothing_of_this_machine(trained, tmp_path):
    saved = trained.save_model(tmp_path / "model", merge=True, gguf="q8_0")
    content = saved.gguf.read_bytes()
    assert b"<|im_start|>" in content and str(tmp_path).encode() not in content


def test_embedded_model_has_a_tokenizer_that_llama_cpp_does_not_know(closing, tmp_path):
    run = closing(ft.Run(guess, lambda output: 0.0, sums(2), output_dir=tmp_path))
    with pytest.raises(
        ConfigError, match=r"cannot hold this model: .*pre-tokenizer was not recognized.*Nothing was saved"
    ):
        run.save_model(tmp_path / "model", gguf="q8_0")
    assert not (tmp_path / "model").exists()


def test_architecture_that_llama_cpp_does_not_know_is_told(closing, llama_folder, tmp_path):
    folder = tmp_path / "ctrl"
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    config = CTRLConfig(vocab_size=len(tokenizer), n_positions=64, n_embd=16, dff=16, n_layer=1, n_head=2)
    CTRLLMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = closing(ft.Run(guess, lambda output: 0.0, sums(2), model=str(folder), output_dir=tmp_path))
    with pytest.raises(ConfigError, match=r"Model CTRLLMHeadModel is not supported.*Nothing was saved"):
        run.save_model(tmp_path / "model", gguf="q8_0")


def test_adapter_alone_is_told_before_the_converter_runs(trained, tmp_path):
    with pytest.raises(ConfigError, match="an adapter alone.*merge=True"):
        trained.save_model(tmp_path / "model", gguf="q8_0")
    assert not (tmp_path / "model").exists()
