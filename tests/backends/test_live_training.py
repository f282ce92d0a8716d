"""Settings of training that are changed while a run is live: the next job goes by them, and the journal says so."""

import math
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from planted_faults import demo  # noqa: E402
from sampled_turns import by_first_token, rollouts, train  # noqa: E402
from tiny_models import byte_tokenizer, random_model  # noqa: E402

import finetune_nb as ft  # noqa: E402
from finetune_nb.backends.local.adapter import LocalGRPOAdapter  # noqa: E402
from finetune_nb.backends.local.config import LocalGRPOConfig  # noqa: E402
from finetune_nb.backends.local.models import EMBEDDED  # noqa: E402
from finetune_nb.backends.local.policy import LocalPolicy  # noqa: E402
from finetune_nb.backends.local.weights import all_tensors  # noqa: E402
from finetune_nb.errors import ConfigError  # noqa: E402


def adapter(policy=None, **settings):
    return LocalGRPOAdapter(LocalGRPOConfig(optimizer_steps=2, **settings), policy=policy)


def handed_over():
    return LocalPolicy(random_model("llama"), byte_tokenizer())


async def job(a):
    return await train(a, await rollouts(a, by_first_token))


def initial(a):
    return {name: tensor.clone() for name, tensor in all_tensors(a.policy.model).items()}


def same(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


async def test_kl_that_is_asked_for_later_is_measured_from_the_initial_weights(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    a = adapter(model=str(tmp_path / "model"))
    before = initial(a)
    status = await job(a)
    assert a.learner.reference is None and math.isnan(status.metadata["metrics"]["reference_kl"])
    a.adapter_config.kl_coef = 0.1
    status = await job(a)
    assert status.metadata["metrics"]["reference_kl"] > 1e-4
    assert same(dict(all_tensors(a.learner.reference)), before)

    b = adapter(model=str(tmp_path / "model"))
    await job(b)
    weights = random_model("llama")  # what the directory holds has become another model
    weights.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    b.adapter_config.kl_coef = 0.1
    status = await job(b)
    assert status.status == "failed" and "has other weights than those that this run began with" in status.message


async def test_of_a_model_that_was_handed_over_kl_can_be_asked_for_until_it_has_been_trained():
    a = adapter(handed_over())
    before = initial(a)
    assert a.learner.reference is None
    a.adapter_config.kl_coef = 0.1
    assert (await job(a)).status == "completed" and same(dict(all_tensors(a.learner.reference)), before)

    late = adapter(handed_over())
    await job(late)
    after = initial(late)
    late.adapter_config.kl_coef = 0.1
    status = await job(late)
    assert (
        status.status == "failed" and "handed over" in status.message and "begin a run with kl_coef" in status.message
    )
    assert same(initial(late), after)
    late.adapter_config.kl_coef = 0.0
    assert (await job(late)).status == "completed"


async def test_a_checkpoint_brings_the_reference_that_it_holds_to_a_run_that_asks_for_it_later(tmp_path):
    a = adapter(handed_over(), kl_coef=0.1)
    before = initial(a)
    await job(a)
    await a.save_checkpoint(tmp_path / "one")
    b = adapter(handed_over())
    await b.load_checkpoint(tmp_path / "one")
    b.adapter_config.kl_coef = 0.1  # as a run that is continued gets its live settings
    assert (await job(b)).metadata["metrics"]["reference_kl"] > 0
    assert same(dict(all_tensors(b.learner.reference)), before)


LIVE = {
    "adapter.kl_coef": 0.1,
    "adapter.clip_low": 0.0,
    "adapter.clip_high": 0.0,
    "adapter.entropy_coef": 0.02,
    "adapter.importance_cap": 2.0,
}


@pytest.mark.slow
@pytest.mark.proof
def test_what_is_changed_live_is_in_force_in_the_next_job_and_in_the_journal(tmp_path, closing):
    run = closing(demo(tmp_path, examples_per_epoch=6, num_epochs=3))
    first = ft.run_sync(run.next_epoch()).train_metrics
    run.live.update(LIVE)
    second = ft.run_sync(run.next_epoch()).train_metrics
    names = ("reference_kl", "entropy_coef", "entropy", "importance_bounded")
    assert [math.isnan(first[name]) for name in names] == [True] * 4
    assert [math.isnan(second[name]) for name in names] == [False] * 4
    assert second["reference_kl"] > 0 and second["entropy_coef"] == 0.02
    assert second["clip_fraction"] > 2 * first["clip_fraction"]
    assert "effective_samples 1" in run[1]._repr_html_() and "importance_bounded 0" in run[1]._repr_html_()
    assert (run.epochs().train_effective_samples > 0.999).all()
    journal = run.journal()
    assert dict(zip(journal.field, journal.epoch, strict=True)) == dict.fromkeys(LIVE, 1)
    run.live["adapter.importance_cap"] = None
    assert math.isnan(ft.run_sync(run.next_epoch()).train_metrics["importance_bounded"])
    with pytest.raises(ConfigError, match="adapter.importance_cap: "):
        run.live["adapter.importance_cap"] = -1
    with pytest.raises(ConfigError, match="cannot be changed live"):
        run.live["adapter.importance_level"] = "sequence"


@pytest.mark.slow
@pytest.mark.proof
def test_a_run_that_is_continued_has_its_live_settings(tmp_path, closing):
    run = demo(tmp_path, examples_per_epoch=6, num_epochs=3, name="it")
    ft.run_sync(run.next_epoch())
    run.live["adapter.kl_coef"] = 0.1
    ft.run_sync(run.next_epoch())
    run.close()
    again = closing(demo(tmp_path, examples_per_epoch=6, num_epochs=3, name="it", resume="auto"))
    assert ft.run_sync(again.next_epoch()).train_metrics["reference_kl"] > 0
    assert again.live["adapter.kl_coef"] == 0.1
