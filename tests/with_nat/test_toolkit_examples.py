"""The Toolkit's two finetuning examples, from a checkout and as they stand there, end with trained weights on a CPU."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest
import toolkit_examples
import toolkit_figures
from loopback_customizer import LoopbackCustomizer

import finetune_nb as ft

pytestmark = pytest.mark.slow

HOST = "127.0.0.86"
"""An address of its own: the ART plugin's health check asks port 8000 whatever the config says."""
SERVED = f"    _type: openai\n    model_name: small_player\n    base_url: http://{HOST}:8000/v1\n"
"""`training_llm` as the DPO example's README has it: a server of an OpenAI-compatible API."""


def trained_here(player):
    """Lines of the DPO example's trainer adapter."""
    return toolkit_figures.TRAINED_HERE.format(model=player, learning_rate="1.0e-3")


@pytest.fixture(scope="session")
def player(checkout, tmp_path_factory):
    """A small policy that makes mostly legal moves."""
    source = str(toolkit_examples.example(checkout, toolkit_examples.ART) / "src")
    sys.path.insert(0, source)
    try:
        import small_player

        return small_player.make_player(tmp_path_factory.mktemp("player"))
    finally:
        sys.path.remove(source)


@pytest.fixture
def installed(checkout, tmp_path, monkeypatch):
    """Installs an example for this process, in which `Run.from_nat` imports it."""

    def install(name):
        import typing

        import typing_extensions

        for place in reversed(toolkit_examples.install(checkout, name, tmp_path)):
            monkeypatch.syspath_prepend(place)
        monkeypatch.setattr(typing, "override", typing_extensions.override, raising=False)
        monkeypatch.setenv("OPENAI_API_KEY", "unused-default-key")
        monkeypatch.chdir(tmp_path)  # the examples write into .tmp where they run

    return install


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def differ(one, other):
    return any(not one[name].equal(other[name]) for name in one)


# ── reinforcement learning by the ART plugin ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def served(player, tmp_path):
    """The folder of the models of every step, while `finetune-nb art-server` has the player."""
    with toolkit_figures.art_server(player, HOST, tmp_path, "--learning-rate", "1e-3", "--max-tokens", "40") as models:
        yield models


async def test_the_art_example_trains_by_nat_finetune(checkout, player, served, tmp_path):
    path = toolkit_examples.install(checkout, toolkit_examples.ART, tmp_path)
    config = toolkit_examples.art_config(checkout, tmp_path, HOST)
    asked = ("finetune", "--config_file", str(config), "--override", "finetuning.num_epochs", "2")
    await asyncio.to_thread(toolkit_figures.nat, *asked, path=path, folder=tmp_path)
    first, second = (weights(served / step) for step in ("0001", "0002"))
    assert differ(first, second) and differ(weights(player), first)
    (metrics,) = (tmp_path / ".tmp/nat/finetuning/tic_tac_toe").rglob("training_metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert min(line["num_trajectories"] for line in lines) >= 12  # most games get as far as a legal move
    assert max(line["max_reward"] for line in lines) > 10  # a position that is won, by the example's own reward
    assert "not read here" not in (tmp_path / "server.log").read_text()  # learning_rate and beta are


async def test_the_art_example_trains_in_a_notebook(checkout, player, served, installed, tmp_path, closing, caplog):
    installed(toolkit_examples.ART)
    run = closing(ft.Run.from_nat(toolkit_examples.art_config(checkout, tmp_path, HOST), name="games"))
    assert "num_generations is 1: the Toolkit then makes one group of all rollouts of an epoch" in caplog.text
    epoch = await run.next_epoch()
    assert epoch.job.status == "completed"
    assert differ(weights(player), weights(served / "0001"))
    frame = run.trajectories()
    assert len(frame) == 24
    played = frame[frame.error.isna()]
    assert len(played) >= 12
    assert set(frame.error.dropna()) <= {
        "no score by the reward 'rl_accuracy': Evaluator error: "
    }  # no legal move at all
    episodes = [t.episode for group in epoch.collection.trajectories for t in group]
    assert max(sum(item.role == "assistant" for item in episode) for episode in episodes) >= 3  # turns
    assert {item.role.value for episode in episodes for item in episode} == {"system", "user", "assistant"}


# ── preferences ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_dpo_example_trains_by_nat_finetune_and_nemo_customizer(checkout, player, served, tmp_path):
    path = toolkit_examples.install(checkout, toolkit_examples.DPO, tmp_path)
    config = toolkit_examples.dpo_config(checkout, tmp_path, SERVED)
    with LoopbackCustomizer(player, tmp_path / "customizer") as customizer:
        exported = {"CUSTOMIZER_HOST": customizer.url, "DATASTORE_HOST": customizer.url, "HF_HUB_OFFLINE": "0"}
        # Without a token the Toolkit's adapter sends an empty one, which httpx refuses.
        token = ("--override", "trainer_adapters.nemo_customizer_trainer_adapter.hf_token", "unused")
        asked = ("finetune", "--config_file", str(config), *token)
        said = await asyncio.to_thread(toolkit_figures.nat, *asked, path=path, folder=tmp_path, **exported)
        assert customizer.status, said[-3000:]
        assert customizer.status["status"] == "completed"
    assert set(customizer.namespaces) == {"nat-dpo-test"}
    assert sorted(customizer.files) == ["training/training_file.jsonl", "validation/validation_file.jsonl"]
    (job,) = customizer.jobs
    assert (job["hyperparameters"]["epochs"], job["hyperparameters"]["batch_size"]) == (5, 8)
    (deployment,) = customizer.deployments
    assert deployment["name"] == "nat_dpo_tic_tac_toe_model"
    assert differ(weights(player), weights(tmp_path / "customizer" / "model"))


async def test_the_dpo_example_trains_on_this_machine_by_nat_finetune(checkout, player, served, tmp_path):
    path = toolkit_examples.install(checkout, toolkit_examples.DPO, tmp_path)
    config = toolkit_examples.dpo_config(checkout, tmp_path, SERVED, trained_here(player))
    asked = ("finetune", "--config_file", str(config))
    await asyncio.to_thread(toolkit_figures.nat, *asked, path=path, folder=tmp_path)
    trained = tmp_path / ".tmp/nat/finetuning/dpo_tic_tac_toe/model"
    assert differ(weights(player), weights(trained))


async def test_the_dpo_example_trains_in_a_notebook_the_model_that_plays(
    checkout, player, installed, tmp_path, closing, monkeypatch
):
    installed(toolkit_examples.DPO)
    llm = "    _type: finetune_nb_policy\n    adapter: nemo_customizer_trainer_adapter\n    max_tokens: 40\n"
    config = toolkit_examples.dpo_config(checkout, tmp_path, llm, trained_here(player))
    run = closing(ft.Run.from_nat(config, name="pairs"))
    run.start()
    await run.wait_async()
    (epoch,) = run.records
    assert epoch.job.status == "completed"
    assert epoch.job.metadata["policy_version"] == 1
    frame = run.trajectories()
    pairs = frame[frame.error.isna()]
    assert len(pairs) > 24
    assert pairs.example.notna().all() and set(pairs.generation) == {0}
    run.save_model(tmp_path / "trained")
    assert differ(weights(player), weights(tmp_path / "trained"))
