"""Every family of models is sampled and trained as one plain forward pass over each sequence says, or is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from byte_tokenizer import byte_tokenizer  # noqa: E402
from family_checks import (  # noqa: E402
    logprobs_alone,
    made_policy,
    plain_gradient,
    plain_logprobs,
    sampled_episodes,
    trained_gradient,
)
from model_families import FAMILIES, family, names  # noqa: E402

from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.errors import BackendError  # noqa: E402

PROOFS = ["lfm2", "mamba2", "phi3_longrope"]
"""One of each kind, beside the fast one; the others are slow together."""
KINDS = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
REFUSED = [made.name for made in FAMILIES if made.refused is not None]


def each_family(test):
    slow, proof = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.proof]
    marks = {"llama": [], **dict.fromkeys(PROOFS, proof)}
    cases = [pytest.param(name, marks=marks.get(name, slow)) for name in names()]
    return pytest.mark.parametrize("name", cases)(test)


@each_family
@KINDS
async def test_a_family_is_sampled_and_trained_as_plain_passes_say(name, lora, record_property):
    plain_model = family(name).model()
    policy = made_policy(family(name).model(), lora)
    episodes = await sampled_episodes(policy)
    turns = [turn for episode in episodes for turn in episode]

    # The weights are those of the plain model, unless there is an adapter beside them.
    truth = policy.model if lora else plain_model
    with torch.no_grad():
        expected = [plain_logprobs(truth, turn.ids, len(turn.prompt)) for turn in turns]
    gap = max(gap_of(turn.sample.logprobs, logprobs) for turn, logprobs in zip(turns, expected, strict=True))
    company = max([gap_of(turn.sample.logprobs, await logprobs_alone(policy, turn)) for turn in turns])

    expected_gradient = plain_gradient(policy, episodes)
    gradient, report = trained_gradient(policy, episodes)
    assert gradient.keys() == expected_gradient.keys()
    largest = torch.stack([g.norm() for g in expected_gradient.values()]).norm()
    wrong = torch.stack([(gradient[weight] - g).norm() for weight, g in expected_gradient.items()]).norm()
    off = (wrong / largest).item()

    record_property("figures", f"{name} {policy.batching} {gap:.1e} {company:.1e} {off:.1e} {report.mismatch.gap:.1e}")
    assert gap <= 1e-5
    assert company <= 1e-5
    assert off <= 1e-5
    assert report.mismatch.gap <= 1e-5


@each_family
@KINDS
async def test_a_trained_family_is_saved_and_loaded_as_it_is(name, lora, tmp_path, record_property):
    base = made_policy(family(name).model())
    base.save(tmp_path / "base")
    policy = LocalPolicy.load(tmp_path / "base", deterministic=True)
    if lora:
        policy = made_policy(policy.model, lora=True)
    trained_gradient(policy, await sampled_episodes(policy, turns=1))
    policy.save(tmp_path / "trained")
    loaded = LocalPolicy.load(tmp_path / "trained").model  # an adapter is added to the weights
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, expected, found = (m(ids, use_cache=False).logits for m in (base.model, policy.model, loaded))
    assert not torch.equal(before, expected)
    off = (found - expected).abs().max().item()
    record_property("figures", f"{name} {off:.1e}")
    assert off <= (1e-5 if lora else 0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_causal_is_refused_with_the_reason(name):
    made = family(name)
    with pytest.raises(BackendError, match=made.refused):
        LocalPolicy(made.model(), byte_tokenizer())


def gap_of(found, expected):
    assert len(found) == len(expected) > 0
    return (torch.as_tensor(found) - torch.as_tensor(expected)).abs().max().item()
