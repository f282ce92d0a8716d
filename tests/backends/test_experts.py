"""Mixtures of experts: sampled and trained whatever their config asks for, with adapters on experts that are one parameter."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from expert_models import EXPERTS, expert_model, logprobs  # noqa: E402
from sampled_turns import PROMPT, rollouts, train  # noqa: E402
from tiny_models import byte_tokenizer, random_model  # noqa: E402

from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig, LoRAConfig  # noqa: E402
from finetune_nb.backends.local.forward import token_logprobs  # noqa: E402
from finetune_nb.backends.local.lora import merged_tensors, settings_of, with_adapter  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.errors import ConfigError  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.proof]  # they are exact, and each takes seconds

IDS = [*PROMPT, *range(30, 50)]


def stored(model, directory):
    """The model with a tokenizer, as its users have it."""
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def adapter(model, **settings):
    return LocalGRPOAdapter(LocalGRPOConfig(model=model, device="cpu", optimizer_steps=2, **settings))


async def trained(model, **settings):
    a = adapter(model, **settings)
    for _ in range(2):
        status = await train(a, await rollouts(a, lambda ids: float(sum(ids) % 5), examples=2, generations=4, tokens=3))
        assert status.status == "completed", status.message
        assert status.metadata["metrics"]["logprob_gap"] < 1e-5
    return a


def loaded(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def gap(found, expected):
    return (found - expected).abs().max().item()


def adapted(model):
    """Names of what has an adapter, with the parameter where it is one of fused experts."""
    return {
        name.replace(".base_layer", "").rpartition(".layers.")[2] + "." + getattr(layer, "parameter_name", "weight")
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


FAST = ["qwen3_moe", "llama4"]
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in EXPERTS if family not in FAST]


@pytest.mark.parametrize("family", [*FAST, *SLOW])
async def test_adapter_on_all_linear_layers_and_experts_trains_merges_and_loads(family, tmp_path):
    base = stored(expert_model(family), tmp_path / "base")
    a = await trained(base, lora={"rank": 2}, learning_rate=2e-2)
    expected = logprobs(a.policy.model, IDS)
    assert gap(logprobs(loaded(base), IDS), expected) > 0.1
    await a.save(tmp_path / "adapter")
    await a.save(tmp_path / "merged", merge=True)
    assert torch.equal(logprobs(a.policy.model, IDS), expected)
    # By transformers, by peft, and as the model of another run.
    assert gap(logprobs(loaded(tmp_path / "adapter"), IDS), expected) == 0
    by_peft = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    assert gap(logprobs(by_peft, IDS), expected) == 0
    assert gap(logprobs(loaded(tmp_path / "merged"), IDS), expected) < 1e-5
    assert gap(logprobs(LocalPolicy.load(tmp_path / "adapter", device="cpu").model, IDS), expected) < 1e-5


@pytest.mark.parametrize("family", [*FAST, *SLOW])
def test_experts_have_an_adapter_in_every_layer_that_has_them(family):
    model = expert_model(family)
    fused = {
        f"{name}.{own}".rpartition(".layers.")[2]
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    linear = {
        f"{name}.weight".rpartition(".layers.")[2]
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name != "lm_head"
    }
    assert fused
    assert adapted(with_adapter(model, LoRAConfig(rank=2))) == fused | linear


async def test_every_weight_of_an_adapter_on_experts_gets_a_gradient():
    model = with_adapter(expert_model("deepseek_v3"), LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model(torch.tensor([IDS])).logits.logsumexp(-1).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("family", "target", "expected"),
    [
        ("qwen3_moe", ["experts"], {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("qwen3_moe", ["down_proj"], {"mlp.experts.down_proj"}),
        ("mixtral", ["w1", "w2", "w3"], {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("mixtral", ["q_proj", "w2"], {"self_attn.q_proj.weight", "mlp.experts.down_proj"}),
        ("gpt_oss", ["gate_up_proj"], {"mlp.experts.gate_up_proj"}),
        ("gpt_oss", ["router"], {"mlp.router.weight"}),
        ("llama4", ["router"], {"feed_forward.router.weight"}),
    ],
)
def test_experts_and_routers_can_be_named(family, target, expected):
    model = with_adapter(expert_model(family), LoRAConfig(rank=2, target=target))
    assert {name.partition(".")[2] for name in adapted(model)} == expected


def test_regular_expression_names_layers_of_a_mixture_one_by_one():
    target = r".*layers\.1\..*(q_proj|experts\.down_proj)"
    model = with_adapter(expert_model("qwen3_moe"), LoRAConfig(rank=2, target=target))
    assert adapted(model) == {"1.self_attn.q_proj.weight", "1.mlp.experts.down_proj"}


def test_shared_experts_keep_their_adapter_though_they_are_called_as_fused_ones_were():
    found = adapted(with_adapter(expert_model("deepseek_v3"), LoRAConfig(rank=2)))
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert f"0.mlp.{part}.weight" in found and f"1.mlp.shared_experts.{part}.weight" in found


def test_adapter_that_names_no_experts_is_described_as_it_always_was():
    dense = settings_of(with_adapter(random_model(), LoRAConfig(rank=2, target=["q_proj"])))
    attention = settings_of(with_adapter(expert_model("qwen3_moe"), LoRAConfig(rank=2, target=["q_proj"])))
    assert dense == attention == {"lora": {"rank": 2, "alpha": 4, "target": ["q_proj"]}}
    experts = settings_of(with_adapter(expert_model("qwen3_moe"), LoRAConfig(rank=2, target=["experts"])))
    assert experts["lora"]["parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_experts_that_peft_cannot_adapt_are_refused_with_what_can_be_done():
    parts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    config = transformers.DbrxConfig(
        vocab_size=262, d_model=32, n_heads=4, n_layers=1, max_seq_len=64, ffn_config=parts,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match=r"all-linear.*Dbrx.*'v1'.*attention.*lora=None"):
        with_adapter(model, LoRAConfig(rank=2))


def test_name_that_is_nowhere_in_a_mixture_is_refused():
    with pytest.raises(ConfigError, match=r"'\.\*no_such'.*names nothing in Qwen3Moe.*experts"):
        with_adapter(expert_model("qwen3_moe"), LoRAConfig(target=".*no_such"))


def test_merging_leaves_the_model_as_it_was():
    model = with_adapter(expert_model("qwen3_moe"), LoRAConfig(rank=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in merged_tensors(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


async def test_training_with_checkpointed_activations_adapts_experts_alike(tmp_path):
    base = stored(expert_model("qwen3_moe"), tmp_path / "base")
    plain, checkpointed = [
        await trained(base, lora={"rank": 2}, learning_rate=2e-2, gradient_checkpointing=on) for on in (False, True)
    ]
    assert gap(logprobs(plain.policy.model, IDS), logprobs(checkpointed.policy.model, IDS)) < 1e-2


# ── what a config asks for beside logits ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", [*FAST, *SLOW])
async def test_model_that_returns_its_routers_logits_is_sampled_and_trained_like_one_that_does_not(family, tmp_path):
    ends = []
    for asked in (False, True):
        base = stored(expert_model(family, output_router_logits=asked), tmp_path / f"base-{asked}")
        a = await trained(base, learning_rate=1e-3)
        ends.append(logprobs(a.policy.model, IDS))
        saved = await a.save(tmp_path / f"saved-{asked}")
        assert transformers.AutoConfig.from_pretrained(saved).output_router_logits == asked
        assert gap(logprobs(loaded(saved), IDS), ends[-1]) == 0
    assert torch.equal(*ends)


def test_hidden_states_that_a_config_asks_for_are_not_computed():
    model = random_model()
    model.config.output_hidden_states = True
    returned = []
    model.register_forward_hook(lambda module, args, output: returned.append(output))
    ids = torch.tensor([IDS])
    token_logprobs(model, ids, torch.ones_like(ids), torch.arange(len(IDS))[None] > 2)
    assert returned[0].hidden_states is None and model.config.output_hidden_states


def test_logits_are_those_of_the_tokens_asked_for_where_a_model_returns_all_of_them():
    model = random_model()
    ids, mask = torch.tensor([IDS]), torch.arange(len(IDS))[None] > 7
    expected = token_logprobs(model, ids, torch.ones_like(ids), mask)
    forward = model.forward
    model.forward = lambda logits_to_keep=0, **inputs: forward(**inputs)  # takes the setting, and does nothing with it
    assert gap(token_logprobs(model, ids, torch.ones_like(ids), mask), expected) < 1e-6
