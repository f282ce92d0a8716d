"""A run whose adapter saves a small true model, and a hub."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A folder with a small random model and its tokenizer."""
    pytest.importorskip("torch")
    from tiny_models import byte_tokenizer, random_model

    folder = tmp_path_factory.mktemp("model") / "small"
    random_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def saving_run(make_run, small_model):
    """A run with two epochs and held-out questions. `saving_run.adapter.source` is the folder that its adapter saves."""
    from small_agents import coin

    import finetune_nb as ft
    from finetune_nb.store.durable import model_directory
    from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

    class SavingAdapter(FakeAdapter):
        source = small_model

        async def save(self, directory):
            with model_directory(Path(directory)) as unfinished:
                shutil.copytree(self.source, unfinished, dirs_exist_ok=True)
            return directory

    adapter = SavingAdapter(policy=ScriptedPolicy(coin))
    run = make_run(adapter=adapter, validation=sums(3), validation_interval=1, num_epochs=2)
    run.saving_adapter = adapter
    for _ in range(2):
        ft.run_sync(run.next_epoch())
    return run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, at which huggingface_hub is logged in, without Xet."""
    import huggingface_hub
    from hub_server import TOKEN, HubServer

    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
