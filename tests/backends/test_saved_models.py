"""What is saved is the model that was trained, whoever loads it: ties, dtypes, adapters, and folders with a model in them."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from expert_models import expert_model, logprobs  # noqa: E402
from safetensors import safe_open  # noqa: E402
from sampled_turns import PROMPT, rollouts, train  # noqa: E402
from tiny_models import byte_tokenizer, random_model  # noqa: E402

from finetune_nb.backends.local import models  # noqa: E402
from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.lora import as_trained  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.errors import BackendError, ConfigError  # noqa: E402

IDS = [*PROMPT, *range(30, 50)]


def dense(tied=False):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


def stored(model, directory, dtype=torch.float32):
    """The model with a tokenizer, as its users have it."""
    model.to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


async def trained(model, **settings):
    settings = {"learning_rate": 2e-2, "optimizer_steps": 2, "device": "cpu", **settings}
    a = LocalGRPOAdapter(LocalGRPOConfig(model=str(model), **settings))
    status = await train(a, await rollouts(a, lambda ids: float(sum(ids) % 5), examples=2, generations=6, tokens=4))
    assert status.status == "completed", status.message
    return a


def loaded(directory, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def gap(found, expected):
    return (found - expected).abs().max().item()


def settings(directory):
    return json.loads((directory / "config.json").read_text())


def kept_in(directory):
    """The dtypes of the weights by their names in the file."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118  # not a dict


# ── ties ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    "target", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["q_proj"], "all-linear"]
)
@pytest.mark.parametrize("tied", [True, False])
async def test_adapter_beside_tied_weights_loads_as_the_model_that_was_trained(tied, target, tmp_path):
    base = stored(dense(tied), tmp_path / "base")
    a = await trained(base, lora={"rank": 2, "target": target})
    expected = logprobs(a.policy.model, IDS)
    assert gap(logprobs(loaded(base), IDS), expected) > 0.01
    await a.save(tmp_path / "adapter")
    await a.save(tmp_path / "merged", merge=True)
    assert gap(logprobs(loaded(tmp_path / "adapter"), IDS), expected) == 0
    by_peft = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    assert gap(logprobs(by_peft, IDS), expected) == 0
    assert gap(logprobs(loaded(tmp_path / "merged"), IDS), expected) < 1e-5
    again = LocalPolicy.load(tmp_path / "adapter", device="cpu").model
    assert gap(logprobs(again, IDS), expected) < 1e-5
    still = tied and not {"lm_head", "embed_tokens"} & set(target)
    assert settings(tmp_path / "merged")["tie_word_embeddings"] == still
    assert ("lm_head.weight" in kept_in(tmp_path / "merged")) == (not still)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == again.config.tie_word_embeddings == still
    assert loaded(base).config.tie_word_embeddings == as_trained(a.policy.model).config.tie_word_embeddings == tied


async def test_run_on_a_saved_adapter_trains_all_weights_and_keeps_them_apart(tmp_path):
    base = stored(dense(tied=True), tmp_path / "base")
    first = await trained(base, lora={"rank": 2, "target": ["lm_head"]})
    await first.save(tmp_path / "adapter")
    second = await trained(tmp_path / "adapter", learning_rate=1e-3)
    model = second.policy.model
    assert all(p.requires_grad for p in model.parameters())
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    await second.save(tmp_path / "saved")
    assert gap(logprobs(loaded(tmp_path / "saved"), IDS), logprobs(model, IDS)) == 0
    assert settings(tmp_path / "saved")["tie_word_embeddings"] is False


async def test_adapter_alone_does_not_contain_the_embeddings(tmp_path):
    a = await trained(stored(dense(tied=True), tmp_path / "base"), lora={"rank": 2, "target": ["lm_head"]})
    await a.save(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118


async def test_tie_of_other_weights_that_an_adapter_breaks_is_not_saved_as_if_it_held(tmp_path):
    a = await trained(stored(dense(), tmp_path / "base"), lora={"rank": 2, "target": [r"layers.0.self_attn.q_proj"]})
    layers = as_trained(a.policy.model).model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.base_layer.weight
    with pytest.raises(BackendError, match=r"layers\.0.*are one in the model.*lora\.target"):
        await a.save(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


# ── an adapter on an adapter ─────────────────────────────────────────────────────────────────────────────────────────


async def test_adapter_of_a_model_that_was_an_adapter_is_saved_merged_and_not_alone(tmp_path):
    first = await trained(stored(dense(), tmp_path / "base"), lora={"rank": 2})
    await first.save(tmp_path / "first")
    second = await trained(tmp_path / "first", lora={"rank": 2})
    with pytest.raises(BackendError, match=r"first', an adapter that was added.*merge=True"):
        await second.save(tmp_path / "second")
    assert not (tmp_path / "second").exists()
    await second.save(tmp_path / "second", merge=True)
    assert gap(logprobs(loaded(tmp_path / "second"), IDS), logprobs(second.policy.model, IDS)) < 1e-5


async def test_whole_model_takes_the_place_of_an_adapter_and_an_adapter_of_none(tmp_path):
    a = await trained(stored(dense(), tmp_path / "base"), lora={"rank": 2})
    await a.save(tmp_path / "saved")
    await a.save(tmp_path / "saved", merge=True)
    assert not list((tmp_path / "saved").glob("adapter_*"))
    assert gap(logprobs(loaded(tmp_path / "saved"), IDS), logprobs(a.policy.model, IDS)) < 1e-5
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with pytest.raises(BackendError, match=r"holds a whole model.*another folder"):
        await a.save(tmp_path / "saved")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
async def test_model_is_saved_in_the_dtype_that_it_was_stored_in(dtype, lora, tmp_path):
    kind = getattr(torch, dtype)
    base = stored(dense(), tmp_path / "base", kind)
    a = await trained(base, lora=lora, learning_rate=1e-3)
    assert as_trained(a.policy.model).dtype == torch.float32
    await a.save(tmp_path / "saved", merge=True)
    assert settings(tmp_path / "saved")["dtype"] == settings(tmp_path / "base")["dtype"] == dtype
    assert kept_in(tmp_path / "saved") == kept_in(tmp_path / "base")
    now = loaded(tmp_path / "saved", "auto")
    assert now.dtype == kind
    if lora is None:
        trained_ones = a.policy.model.state_dict()
        assert all(torch.equal(tensor, trained_ones[name].to(kind)) for name, tensor in now.state_dict().items())


async def test_another_dtype_can_be_asked_for(tmp_path):
    a = await trained(stored(dense(), tmp_path / "base", torch.bfloat16), learning_rate=1e-3)
    await a.save(tmp_path / "saved", dtype="float32")
    assert settings(tmp_path / "saved")["dtype"] == "float32" and set(kept_in(tmp_path / "saved").values()) == {"F32"}
    assert gap(logprobs(loaded(tmp_path / "saved"), IDS), logprobs(a.policy.model, IDS)) == 0
    with pytest.raises(ConfigError, match="dtype is 'float23'"):
        await a.save(tmp_path / "other", dtype="float23")


async def test_weights_that_a_family_keeps_in_float32_stay_so(tmp_path):
    base = stored(expert_model("deepseek_v3"), tmp_path / "float32")
    loaded(base, torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    kept = {name for name, dtype in kept_in(tmp_path / "base").items() if dtype == "F32"}
    assert kept and all("e_score_correction_bias" in name for name in kept)
    a = await trained(tmp_path / "base", learning_rate=1e-3)
    await a.save(tmp_path / "saved")
    assert kept_in(tmp_path / "saved") == kept_in(tmp_path / "base")


def test_dtype_that_the_config_does_not_say_is_read_from_the_weights(tmp_path):
    base = stored(dense(), tmp_path / "base", torch.bfloat16)
    said = settings(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "dtype"}))
    policy = LocalPolicy.load(base, device="cpu")
    assert (policy.model.dtype, policy.stored_dtype) == (torch.float32, torch.bfloat16)
    policy.save(tmp_path / "saved")
    assert (
        kept_in(tmp_path / "saved") == kept_in(tmp_path / "base")
        and settings(tmp_path / "saved")["dtype"] == "bfloat16"
    )


def test_model_that_was_handed_over_is_saved_as_it_is(tmp_path):
    policy = LocalPolicy(random_model("gpt2").bfloat16(), byte_tokenizer())
    policy.save(tmp_path / "saved")
    assert set(kept_in(tmp_path / "saved").values()) == {"BF16"}
    assert models.load(tmp_path / "saved", "cpu", "auto")[2] == torch.bfloat16


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_changes_nothing(family, dtype, tmp_path):
    policy = LocalPolicy.load(stored(expert_model(family), tmp_path / "base", dtype), device="cpu")
    policy.save(tmp_path / "saved")
    one, two = loaded(tmp_path / "base", "auto"), loaded(tmp_path / "saved", "auto")
    assert one.dtype == two.dtype == dtype
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert gap(logprobs(one, IDS), logprobs(two, IDS)) == 0


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
async def test_description_is_what_is_saved_without_the_weights(lora, tmp_path):
    a = await trained(stored(dense(), tmp_path / "base"), **({"lora": lora} if lora else {}))
    for merge in (True, False):
        saved, described = tmp_path / f"saved-{merge}", tmp_path / f"described-{merge}"
        described.mkdir()
        await a.save(saved, merge=merge)
        await a.save_description(described, merge=merge)
        whole = {path.name for path in saved.iterdir()} - {"README.md", "generation_config.json"}
        assert {path.name for path in described.iterdir()} == {name for name in whole if "safetensors" not in name}
        if merge or lora is None:
            assert settings(described)["architectures"] == settings(saved)["architectures"] == ["Qwen2ForCausalLM"]
