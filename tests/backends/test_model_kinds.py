"""How a model's prompts share a batch, and what is done where its positions or its weights change meanwhile."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from byte_tokenizer import byte_tokenizer  # noqa: E402
from model_families import LONGROPE, family  # noqa: E402
from tiny_models import passes_of, random_model  # noqa: E402

from finetune_nb.backends.local.families.caches import Tokens, join, select_rows  # noqa: E402
from finetune_nb.backends.local.families.kinds import batching_of  # noqa: E402
from finetune_nb.backends.local.families.positions import borders_of, last_length  # noqa: E402
from finetune_nb.backends.local.forward import collate  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.local.prefill import prefill  # noqa: E402
from finetune_nb.backends.local.sampling import SampleRequest, sample_batch  # noqa: E402
from finetune_nb.training.batch import TokenSequence  # noqa: E402
from finetune_nb.types import SamplingParams  # noqa: E402

BORDER = LONGROPE["original_max_position_embeddings"]


def ids_of(length, seed=0):
    return torch.randint(3, 262, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampled(model, lengths, tokens, batching="padded"):
    requests = [SampleRequest(ids_of(n, i), SamplingParams(1.0, tokens), i) for i, n in enumerate(lengths)]
    sample_batch(model, requests, end_ids=frozenset(), pad_id=0, text=lambda ids: "", batching=batching)
    return requests


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_model_of_attention_layers_is_known_without_a_pass(kind, monkeypatch):
    model = random_model(kind)
    shapes = passes_of(model, monkeypatch)
    assert LocalPolicy(model, byte_tokenizer()).batching == "padded"
    assert shapes == []


@pytest.mark.parametrize(
    ("name", "batching"),
    [("gpt_neox", "padded"), ("qwen3_5_text", "joined"), ("mamba2", "joined"), ("bart", "equal"), ("rwkv", "alone")],
)
def test_any_other_model_is_batched_as_its_layers_allow(name, batching):
    assert batching_of(family(name).model()) == batching


def test_a_model_without_a_usable_cache_is_sampled_without_one_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert batching_of(family("openai-gpt").model()) == "whole"
    assert "OpenAIGPTLMHeadModel keeps nothing" in caplog.text and "slow" in caplog.text


def test_states_of_recurrent_layers_see_no_padding(monkeypatch):
    model = family("qwen3_5_text").model()
    shapes = passes_of(model, monkeypatch)
    sampled(model, (4, 9, 4), 3, "joined")
    assert shapes == [(2, 4), (1, 9), (3, 1), (3, 1)]


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "mamba2", "minimax"])
def test_what_is_kept_of_several_prompts_is_joined_and_any_rows_of_it_selected(name):
    model, prompts = family(name).model(), [ids_of(length, length) for length in (3, 8, 5, 8)]
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in prompts])
        together, cache, mask = prefill(model, prompts, batching="joined")
        again, _, _ = prefill(model, prompts[::-1], batching="joined")
    assert torch.allclose(together, expected, atol=1e-5)
    assert torch.allclose(again.flip(0), expected, atol=1e-5)
    assert mask.sum(1).tolist() == [3, 8, 5, 8]
    selected = select_rows(cache, torch.tensor([3, 0, 0]))
    assert type(selected) is type(cache)


def test_tokens_are_kept_where_a_model_keeps_nothing():
    joined = join([Tokens([[1, 2]]), Tokens([[3], [4, 5]])])
    assert select_rows(joined, torch.tensor([2, 0, 2])).rows == [[4, 5], [1, 2], [4, 5]]


# ── positions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_borders_are_those_of_longrope_in_any_layer():
    assert borders_of(random_model("llama")) == ()
    assert (
        borders_of(family("llama_dynamic").model()) == ()
    )  # nothing is sampled beyond the length at which it would change
    assert borders_of(family("phi3_longrope").model()) == (BORDER,)
    assert [last_length(length, (8, 16)) for length in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, None]


@pytest.mark.parametrize(("name", "longest"), [("phi3_longrope", 40), ("phimoe_longrope", 40), ("llama_dynamic", 56)])
def test_a_short_rollout_is_not_changed_by_a_long_prompt_in_its_batch(name, longest):
    model = family(name).model()
    for request in sampled(
        model, (4, longest, 6, 30), 8
    ):  # dynamic positions change beyond 64 tokens, which a policy refuses
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([request.tokens])).logits[0].log_softmax(-1)
        begin = len(request.ids)
        expected = logprobs_TV[begin - 1 : -1].gather(1, torch.tensor(request.reply)[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(request.logprobs), expected, atol=1e-5)


def test_a_reply_that_grows_beyond_the_border_is_begun_anew_and_its_tokens_stay(monkeypatch):
    model = family("llama_longrope").model()
    shapes = passes_of(model, monkeypatch)
    requests = sampled(model, (BORDER - 3, 5), 6)
    assert [len(request.reply) for request in requests] == [6, 6]
    assert shapes[0] == (2, BORDER - 3)
    assert (1, BORDER + 1) in shapes  # the whole of the longer one, once it is one token too long
    monkeypatch.undo()
    for request in requests:
        alone = SampleRequest(request.ids, request.params, request.seed)
        sample_batch(model, [alone], end_ids=frozenset(), pad_id=0, text=lambda ids: "")
        assert alone.reply == request.reply
        for end, logprob in enumerate(request.logprobs, len(request.ids)):
            with torch.no_grad():
                logprobs_V = model(torch.tensor([request.tokens[:end]])).logits[0, -1].log_softmax(-1)
            assert logprob == pytest.approx(logprobs_V[request.tokens[end]].item(), abs=1e-5)


@pytest.mark.parametrize("length", [BORDER - 1, BORDER, BORDER + 1, BORDER + 2, BORDER + 9])
def test_training_computes_each_token_from_a_pass_over_those_before_it(length):
    model, ids = family("llama_longrope").model(), ids_of(length)
    sequence = TokenSequence(ids, [False, False] + [True] * (length - 2), [0.0] * length, 1.0, [0.0] * length)
    short = TokenSequence(ids[:7], sequence.sampled[:7], [0.0] * 7, 1.0, [0.0] * 7)
    with torch.no_grad():
        found_BT = collate([short, sequence]).scores(model).logprobs_BT
        for end in range(2, length):
            expected = model(torch.tensor([ids[:end]])).logits[0, -1].log_softmax(-1)[ids[end]].item()
            assert found_BT[1, end].item() == pytest.approx(expected, abs=1e-5)
            if end < 7:
                assert found_BT[0, end].item() == pytest.approx(expected, abs=1e-5)


# ── mending ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_time_steps_have_the_same_limits_token_by_token_as_in_a_sequence():
    model, ids = family("nemotron_h").model(), torch.tensor([ids_of(12)])
    policy = LocalPolicy(model, byte_tokenizer())
    with torch.no_grad():
        expected = model(ids).logits[0]
        cache, found = None, []
        for token in ids[0]:
            out = model(token[None, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0, -1])
    assert policy.batching == "joined"
    assert torch.allclose(torch.stack(found), expected, atol=1e-5)


def test_weights_that_a_model_halves_when_it_is_evaluated_keep_their_size():
    rwkv = family("rwkv")
    rwkv = replace(rwkv, settings=rwkv.settings | {"rescale_every": 1})
    model, untouched, ids = rwkv.model(), rwkv.model(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits  # its weights are halved from here on
        LocalPolicy(model, byte_tokenizer())
        found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-3)  # but for the epsilon of its norms, which knew of no halves
    for name, weight in untouched.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)
