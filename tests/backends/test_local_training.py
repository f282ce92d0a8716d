"""How the local backend trains: adapters, prompts that a group shares, memory, the learning rate, what is said of it."""

import inspect
import math
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from sampled_turns import PROMPT, by_first_token, rollouts, train, turn  # noqa: E402
from tiny_models import byte_tokenizer, passes_of, random_model, weights  # noqa: E402

from finetune_nb.backends.local import models  # noqa: E402
from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LOSSES, LocalGRPOConfig, LoRAConfig  # noqa: E402
from finetune_nb.backends.local.forward import WORTH_SHARING, collate, micro_batches  # noqa: E402
from finetune_nb.backends.local.lora import switched_off, with_adapter  # noqa: E402
from finetune_nb.backends.local.memory import ran_out  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.local.prefill import can_share, prefill  # noqa: E402
from finetune_nb.config import FinetuneConfig  # noqa: E402
from finetune_nb.errors import BackendError, ConfigError  # noqa: E402
from finetune_nb.training.batch import TokenSequence  # noqa: E402
from finetune_nb.types import SamplingParams  # noqa: E402


def adapter(kind="llama", lora=None, seed=0, model=None, **settings):
    config = LocalGRPOConfig(lora=lora, **settings)
    model = model or random_model(kind)
    if config.lora is not None:
        model = with_adapter(model, config.lora, seed)
    policy = LocalPolicy(model, byte_tokenizer(), deterministic=True)
    return LocalGRPOAdapter(config, seed, deterministic=True, policy=policy)


def adapter_weights(a):
    return torch.cat([p.detach().flatten() for p in a.policy.model.parameters() if p.requires_grad]).clone()


def chance_of_reward(model):
    """Of the prompts of `rollouts`, whose reward is an odd first token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, 20 + example] for example in range(4)])).logits[:, -1]
    return logits.softmax(1)[:, 1::2].sum(1).mean().item()


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
async def test_only_the_adapter_is_trained_and_it_learns(kind):
    a = adapter(kind, LoRAConfig(rank=8), learning_rate=2e-2)
    model = a.policy.model
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    before = chance_of_reward(model)
    for _ in range(3):
        assert (await train(a, await rollouts(a, by_first_token, generations=16, tokens=1))).status == "completed"
    assert chance_of_reward(model) > before + 0.02
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if not p.requires_grad)


async def test_fresh_adapter_changes_nothing_and_is_drawn_by_the_seed():
    plain, first, again, other = (
        adapter(lora=lora, seed=seed) for lora, seed in ((None, 0), ({}, 0), ({}, 0), ({}, 1))
    )
    params = SamplingParams(1.0, 8)
    assert (await first.policy.sample(PROMPT, params, 3)).ids == (await plain.policy.sample(PROMPT, params, 3)).ids
    assert torch.equal(adapter_weights(first), adapter_weights(again))
    assert not torch.equal(adapter_weights(first), adapter_weights(other))


@pytest.mark.slow
@pytest.mark.proof
async def test_kl_is_measured_from_the_model_with_its_adapter_switched_off():
    reached = []
    for kl_coef in (1e-9, 5.0):
        a = adapter(lora={"rank": 8}, kl_coef=kl_coef, learning_rate=2e-2)
        assert a.learner.reference is None  # no second copy
        kls = []
        for _ in range(3):
            status = await train(a, await rollouts(a, by_first_token, generations=16))
            kls.append(status.metadata["metrics"]["reference_kl"])
        reached.append(kls[-1])
        untrained = random_model("llama")
        ids = torch.tensor([PROMPT])
        with switched_off(a.policy.model) as model, torch.no_grad():
            assert torch.equal(model(ids).logits, untrained(ids).logits)
    assert 0 < reached[1] < 0.5 * reached[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
async def test_saved_model_is_the_trained_one_merged_or_as_an_adapter_of_its_base(kind, tmp_path):
    random_model(kind).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    a = LocalGRPOAdapter(LocalGRPOConfig(model=str(tmp_path / "base"), lora={"rank": 4}, learning_rate=2e-2))
    for _ in range(2):
        await train(a, await rollouts(a, by_first_token))
    before = adapter_weights(a)
    await a.save(tmp_path / "merged", merge=True)
    await a.save(tmp_path / "adapter")
    assert torch.equal(before, adapter_weights(a))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        trained = a.policy.model(ids).logits
        assert not torch.allclose(trained, random_model(kind)(ids).logits, atol=1e-2)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert type(merged) is type(random_model(kind))
        assert torch.allclose(merged(ids).logits, trained, atol=1e-4)
        for directory in ("merged", "adapter"):
            assert torch.allclose(LocalPolicy.load(tmp_path / directory).model(ids).logits, trained, atol=1e-4)


async def test_checkpoint_of_an_adapter_is_small_and_goes_on_as_if_never_stopped(tmp_path):
    settings = {"lora": {"rank": 2}, "kl_coef": 0.1, "learning_rate": 2e-2}
    one = adapter(**settings)
    await train(one, await rollouts(one, by_first_token))
    await one.save_checkpoint(tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "manifest.json", "weights.safetensors", "optimizer.safetensors",
    }  # fmt: skip
    other = adapter(**settings)
    await other.load_checkpoint(tmp_path / "c")
    for a in (one, other):
        await train(a, await rollouts(a, by_first_token))
    assert torch.equal(adapter_weights(one), adapter_weights(other))


@pytest.mark.parametrize(
    ("lora", "reason"), [({"rank": 2, "alpha": 1}, "lora"), ({"rank": 3}, "lora"), (None, "lora|tensor")]
)
async def test_checkpoint_of_another_adapter_is_refused(tmp_path, lora, reason):
    one = adapter(lora={"rank": 2})
    await one.save_checkpoint(tmp_path / "c")
    with pytest.raises(BackendError, match=reason):
        await adapter(lora=lora).load_checkpoint(tmp_path / "c")


def test_layers_that_are_not_there_are_a_config_error():
    with pytest.raises(ConfigError, match=r"'no_such_layer'.*all-linear"):
        with_adapter(random_model(), LoRAConfig(target=["no_such_layer"]))


@pytest.mark.parametrize("lora", [{"rank": 0}, {"ranks": 4}, {"alpha": 0}])
def test_lora_setting_that_makes_no_sense_is_refused(lora):
    with pytest.raises(ValueError, match=next(iter(lora))):
        LocalGRPOConfig(lora=lora)


# ── losses by name ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("loss", LOSSES)
async def test_every_loss_teaches_what_is_rewarded(loss):
    a = adapter(learning_rate=1e-3, loss=loss, optimizer_steps=4, inner_epochs=2)
    before = chance_of_reward(a.policy.model)
    for _ in range(3):
        assert (await train(a, await rollouts(a, by_first_token, generations=16, tokens=1))).status == "completed"
    assert chance_of_reward(a.policy.model) > before + 0.02


@pytest.mark.slow
@pytest.mark.proof
async def test_an_entropy_bonus_keeps_the_policy_undecided():
    found = {}
    for coef in (0.0, 0.5):
        a = adapter(learning_rate=1e-3, entropy_coef=coef)
        for _ in range(4):
            status = await train(a, await rollouts(a, by_first_token, generations=16, tokens=1))
        with torch.no_grad():
            logits = a.policy.model(torch.tensor([[*PROMPT, 20]])).logits[0, -1]
        found[coef] = torch.distributions.Categorical(logits=logits).entropy().item()
        entropy = status.metadata["metrics"]["entropy"]
        assert math.isnan(entropy) if coef == 0 else entropy > 0
    assert found[0.5] > found[0.0]


async def test_groups_that_teach_nothing_count_in_the_mean_where_that_is_asked_for():
    norms = {}
    for dilute in (False, True):
        a = adapter(learning_rate=1e-9, dilute=dilute, optimizer_steps=1, max_grad_norm=1e9)
        collection = await rollouts(a, by_first_token, generations=16, tokens=1)
        for trajectory in [each for group in collection.trajectories[::2] for each in group]:
            trajectory.reward = 1.0
        norms[dilute] = (await train(a, collection)).metadata["metrics"]["grad_norm"]
    assert norms[True] == pytest.approx(norms[False] / 2, rel=1e-4)  # half of the tokens are in such groups


# ── shared prompts ───────────────────────────────────────────────────────────────────────────────────────────────────


def groups_of_replies(groups=3, replies=4, prompt=12, seed=0):
    """Replies of several lengths to few prompts, some with a turn of a tool in between."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(1, 262, (count,), generator=generator).tolist()

    made = []
    for group in range(groups):
        begin = ids(prompt + 3 * group)
        for i in range(replies):
            first, tool, second = ids(1 + i), ids(2 * (i % 2)), ids(i % 2)
            sampled = [False] * len(begin) + [True] * len(first) + [False] * len(tool) + [True] * len(second)
            advantages = [0.5 * i - group if is_sampled else 0.0 for is_sampled in sampled]
            made.append(TokenSequence(begin + first + tool + second, sampled, [0.0] * len(sampled), 0.7, advantages))
    return made


def put_before(sequence, ids):
    """Makes its prompt begin with these ids."""
    sequence.ids = ids + sequence.ids
    sequence.sampled = [False] * len(ids) + sequence.sampled
    sequence.logprobs = [0.0] * len(ids) + sequence.logprobs
    sequence.advantages = [0.0] * len(ids) + sequence.advantages


def value_and_gradient(model, sequences, max_tokens, sharing):
    model.zero_grad()
    total, shared_any = 0.0, False
    for batch, shared in micro_batches(sequences, max_tokens, sharing):
        tensors = collate(batch, shared=shared)
        scores = tensors.scores(model, entropies=True)
        value = ((scores.logprobs_BT + scores.entropies_BT) * tensors.advantages_BT).sum()
        value.backward()
        total, shared_any = total + value.item(), shared_any or shared
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone(), shared_any


@pytest.mark.parametrize(
    ("kind", "max_tokens"), [("llama", 1), ("llama", 60), ("llama", 10_000), ("qwen2", 60), ("gpt2", 60)]
)
def test_prompt_that_is_computed_once_gives_the_same_gradient(kind, max_tokens):
    model = random_model(kind)
    sequences = groups_of_replies()
    assert can_share(model)
    whole, gradient, shared = value_and_gradient(model, sequences, max_tokens, sharing=False)
    assert not shared
    value, same_gradient, shared = value_and_gradient(model, sequences, max_tokens, sharing=True)
    assert shared
    assert value == pytest.approx(whole, rel=1e-5)
    assert ((same_gradient - gradient).norm() / gradient.norm()).item() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_what_all_prompts_begin_with_is_computed_once_with_the_same_gradient(kind, monkeypatch):
    model, begin = random_model(kind), [7] * 20 + list(range(60, 80))
    sequences = groups_of_replies(prompt=3)
    for sequence in sequences:
        put_before(sequence, begin)
    whole, gradient, _ = value_and_gradient(model, sequences, 10_000, sharing=False)
    shapes = passes_of(model, monkeypatch)
    value, same_gradient, shared = value_and_gradient(model, sequences, 10_000, sharing=True)
    assert shared and shapes[:2] == [(1, 40), (3, 8)]
    assert value == pytest.approx(whole, rel=1e-5)
    assert ((same_gradient - gradient).norm() / gradient.norm()).item() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_logits_behind_prompts_with_a_common_beginning_are_those_of_each_alone(kind):
    model, begin = random_model(kind), list(range(50, 90))
    prompts = [begin + [3] * extra + [5] for extra in (0, 4, 2)] + [begin]
    with torch.no_grad():
        together, _, mask = prefill(model, prompts)
        alone = torch.cat([model(torch.tensor([prompt])).logits[:, -1] for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-4)
    assert mask.sum(1).tolist() == list(map(len, prompts))


def test_short_sequences_are_not_padded_to_long_ones_with_the_same_gradient(monkeypatch):
    model, sequences = random_model("llama"), groups_of_replies(groups=5, replies=6)
    for sequence in sequences[::7]:
        put_before(sequence, [7] * (40 + len(sequence) % 3))
    batches = [batch for batch, _ in micro_batches(sequences, 10_000)]
    assert sorted(map(id, sequences)) == sorted(id(s) for batch in batches for s in batch)
    assert len(batches) == 2
    assert sum(collate(batch).size for batch in batches) < 0.6 * collate(sequences).size
    value, gradient, _ = value_and_gradient(model, sequences, 10_000, sharing=False)

    monkeypatch.setattr("finetune_nb.backends.local.forward.WORTH_CUTTING", 10_000)
    assert len(list(micro_batches(sequences, 10_000))) == 1
    whole, same_gradient, _ = value_and_gradient(model, sequences, 10_000, sharing=False)
    assert value == pytest.approx(whole, rel=1e-5)
    assert ((same_gradient - gradient).norm() / gradient.norm()).item() < 1e-5


async def prompts_of_steps(monkeypatch, whole_groups):
    """What a job reports, and the token that tells the prompts apart, of each sequence of each step."""
    a = adapter(optimizer_steps=4, whole_groups=whole_groups, learning_rate=1e-3)
    collection = await rollouts(a, by_first_token, examples=8, tokens=1)
    before, steps, step = adapter_weights(a), [], a.learner._step

    def watched(sequences, *rest):
        steps.append([sequence.ids[len(PROMPT)] for sequence in sequences])
        return step(sequences, *rest)

    monkeypatch.setattr(a.learner, "_step", watched)
    metrics = (await train(a, collection)).metadata["metrics"]
    assert metrics["optimizer_steps"] == len(steps) == 4
    assert not torch.equal(adapter_weights(a), before)
    return metrics, steps


async def test_whole_groups_compute_each_prompt_in_one_step_alone(monkeypatch):
    prompts = {}
    for whole_groups in (False, True):
        metrics, steps = await prompts_of_steps(monkeypatch, whole_groups)
        trained = metrics["trained_groups"]
        assert len({prompt for step in steps for prompt in step}) == trained
        prompts[whole_groups] = sum(len(set(step)) for step in steps)
    assert prompts[True] <= trained + 3 < prompts[False]


def test_no_sequences_make_no_micro_batch():
    assert list(micro_batches([], 100)) == []


def test_short_prompts_are_not_worth_a_pass_of_their_own():
    sequences = groups_of_replies(prompt=12)
    saved = sum(len(s.ids) - sum(s.sampled) for s in sequences) / sum(map(len, sequences))
    assert saved > WORTH_SHARING
    assert all(shared for _, shared in micro_batches(sequences, 100, sharing=True))
    assert not any(shared for _, shared in micro_batches(sequences[::4], 100, sharing=True))  # nobody shares a prompt
    single = [TokenSequence([3, 5], [False, True], [0.0, -1.0], 1.0, [0.0, 1.0])] * 4
    assert not any(shared for _, shared in micro_batches(single, 100, sharing=True))


def test_shared_micro_batches_stay_within_their_tokens():
    sequences = groups_of_replies(groups=5, replies=8)
    batches = list(micro_batches(sequences, 80, sharing=True))
    assert sorted(map(id, sequences)) == sorted(id(s) for batch, _ in batches for s in batch)
    for batch, shared in batches:
        tensors = collate(batch, shared=shared)
        assert tensors.prompts and tensors.size <= 80


def test_model_that_keeps_a_window_only_computes_every_prompt():
    config = transformers.MistralConfig(
        vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    assert not can_share(transformers.MistralForCausalLM(config))


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
async def test_checkpointed_activations_give_the_same_weights_without_dropout(lora):
    after = []
    for checkpointing in (False, True):
        a = adapter("gpt2", lora, gradient_checkpointing=checkpointing, optimizer_steps=2)
        assert a.policy.model.config.resid_pdrop > 0
        status = await train(a, await rollouts(a, by_first_token))
        assert status.metadata["metrics"]["logprob_gap"] < 1e-4
        after.append(weights(a))
        assert not any(module.training for module in a.policy.model.modules())
    assert torch.allclose(*after, atol=2e-5)


@pytest.mark.slow
@pytest.mark.proof
async def test_out_of_memory_says_which_micro_batch_would_fit(monkeypatch):
    a = adapter(micro_batch_tokens=1000, optimizer_steps=1)
    trajectories = await rollouts(a, by_first_token)
    model, forward = a.policy.model, a.policy.model.forward

    def small(input_ids, **inputs):
        if input_ids.numel() > 60:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return forward(input_ids=input_ids, **inputs)

    small.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", small)
    before = weights(a)
    status = await train(a, trajectories)
    assert status.status == "failed"
    assert "does not fit into the memory of cpu" in status.message
    fits = int(status.message.partition("set micro_batch_tokens=")[2].partition(".")[0])
    assert 30 < fits <= 60
    assert torch.equal(before, weights(a)) and all(p.grad is None for p in model.parameters())
    a.adapter_config.micro_batch_tokens = fits
    assert (await train(a, trajectories)).status == "completed"


@pytest.mark.slow
@pytest.mark.proof
async def test_where_not_even_one_sequence_fits_other_ways_out_are_named(monkeypatch):
    a = adapter(optimizer_steps=1)
    trajectories = await rollouts(a, by_first_token)

    def never(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    never.__signature__ = inspect.signature(a.policy.model.forward)
    monkeypatch.setattr(a.policy.model, "forward", never)
    status = await train(a, trajectories)
    for advice in ("Not even one", "gradient_checkpointing", "lora"):
        assert advice in status.message


def test_what_torch_says_when_memory_is_out_is_known():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    assert ran_out(refused.value)
    assert not ran_out(RuntimeError("shapes differ"))


# ── the learning rate ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_learning_rate_follows_its_schedule_over_the_planned_epochs():
    a = adapter(lr_schedule="linear", warmup=0.25, learning_rate=1e-3, optimizer_steps=2)
    await a.initialize(FinetuneConfig(num_epochs=4))
    rates = []
    for _ in range(5):
        status = await train(a, await rollouts(a, by_first_token))
        rates.append(status.metadata["metrics"]["learning_rate"])
    assert rates == pytest.approx([1e-3, 0.85e-3, 0.55e-3, 0.25e-3, 1e-4])  # of the last step of each epoch


async def test_schedule_without_a_plan_is_refused():
    a = adapter(lr_schedule="cosine")
    trajectories = await rollouts(a, by_first_token)
    with pytest.raises(BackendError, match=r"cosine.*how many epochs are planned"):
        await a.submit(trajectories)


# ── what is there, and said ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_best_device_that_is_there_is_used(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert models.chosen_device("auto") == expected
    assert models.chosen_device("cpu") == "cpu"


def test_half_precision_is_only_for_what_is_not_trained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert models.chosen_dtype("auto", "cuda", trains_all=True) == torch.float32
    assert models.chosen_dtype("auto", "cuda", trains_all=False) == torch.bfloat16
    assert models.chosen_dtype("auto", "cpu", trains_all=False) == torch.float32
    assert models.chosen_dtype("bfloat16", "cpu", trains_all=True) == torch.bfloat16


def test_policy_says_what_is_trained_where_and_in_what():
    told = LocalPolicy.load("embedded").description
    assert told == "embedded: 230,400 weights, float32 on cpu, 1 thread"
    told = LocalPolicy.load("embedded", dtype="bfloat16", lora=LoRAConfig(rank=2)).description
    assert "LoRA adapter of rank 2" in told and "bfloat16 on cpu" in told
    assert next(p for p in adapter(lora={}).policy.model.parameters() if p.requires_grad).dtype == torch.float32


async def test_bfloat16_weights_beside_an_adapter_are_sampled_and_trained_alike():
    a = LocalGRPOAdapter(LocalGRPOConfig(dtype="bfloat16", lora={"rank": 4}, optimizer_steps=2))
    status = await train(a, await rollouts(a, by_first_token))
    assert status.status == "completed", status.message
    assert status.metadata["metrics"]["logprob_gap"] < 0.05


@pytest.mark.slow
@pytest.mark.proof
def test_lora_without_peft_names_the_extra():
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "from finetune_nb.backends.local.adapter import LocalGRPOAdapter\n"
        "from finetune_nb.backends.local.config import LocalGRPOConfig\n"
        "from finetune_nb.errors import MissingExtra\n"
        "try: LocalGRPOAdapter(LocalGRPOConfig(lora={})).policy\n"
        "except MissingExtra as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert 'pip install "finetune_nb[local]"' in done.stdout, done.stderr


def test_turns_of_tools_and_environment_are_never_trained_on():
    items = [turn([3], [5], [-1.0]), turn([3, 5, 7, 8], [9], [-2.0])]
    from finetune_nb.training.batch import token_sequences
    from finetune_nb.types import EpisodeItem, Trajectory

    said = [EpisodeItem(role=role, content="x") for role in ("tool", "environment", "function")]
    (sequence,) = token_sequences(Trajectory(episode=[items[0], *said, items[1]], reward=1.0), 1.0)
    tensors = collate([sequence])
    assert tensors.mask_BT.tolist() == [[False, True, False, False, True]]
    assert math.isclose(tensors.advantages_BT.sum().item(), 2.0)
