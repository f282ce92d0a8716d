"""Replicas of a policy compute what the policy does, to the last digit: in every dtype, with adapters, with broken ties."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from expert_models import expert_model, logprobs  # noqa: E402
from sampled_turns import PROMPT  # noqa: E402
from tiny_models import byte_tokenizer, random_model  # noqa: E402

from finetune_nb.backends.local.config import LoRAConfig  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402

IDS = [*PROMPT, *range(30, 50)]


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_replica_is_the_policy(family, lora, dtype, tmp_path):
    model = random_model(family) if family in ("llama", "gpt2") else expert_model(family)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    policy = LocalPolicy.load(tmp_path, device="cpu", dtype=dtype, lora=lora)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    replica = policy.replica()()
    replica.take(policy.weights()[2], 1)
    dtypes = {name: parameter.dtype for name, parameter in policy.model.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in replica.model.named_parameters()}
    assert torch.equal(logprobs(replica.model, IDS), logprobs(policy.model, IDS))


def test_replica_of_a_model_whose_ties_an_adapter_broke_has_two_weights(tmp_path):
    random_model("gpt2").save_pretrained(tmp_path / "base")  # its output layer is its embeddings
    byte_tokenizer().save_pretrained(tmp_path / "base")
    adapted = LocalPolicy.load(tmp_path / "base", device="cpu", lora=LoRAConfig(rank=2, target=["lm_head"]))
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    byte_tokenizer().save_pretrained(adapted.save(tmp_path / "adapter"))
    policy = LocalPolicy.load(tmp_path / "adapter", device="cpu")
    replica = policy.replica()()
    replica.take(policy.weights()[2], 1)
    assert torch.equal(logprobs(replica.model, IDS), logprobs(policy.model, IDS))
    assert (logprobs(policy.model, IDS) - logprobs(adapted.model, IDS)).abs().max() < 1e-5
