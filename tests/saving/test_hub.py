"""Pushing to the hub: huggingface_hub's own client against a hub on this machine."""

import json
import logging

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hub_server import TOKEN  # noqa: E402

import finetune_nb as ft  # noqa: E402
from finetune_nb.errors import BackendError  # noqa: E402
from finetune_nb.redaction import redact_text  # noqa: E402


def weights(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def adapter_folder(folder, base):
    """What PEFT writes of an adapter, as far as the hub is concerned."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\n# Model Card for Model ID\n")
    return folder


def test_what_was_pushed_loads_as_the_model_that_was_saved(saving_run, hub, tmp_path):
    saved = saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    pushed = hub.repositories["me/sums"]
    assert saved.url == f"{hub.url}/me/sums" and not pushed.private
    for name, content in pushed.files.items():
        assert (saved.path / name).read_bytes() == content
        (tmp_path / name).write_bytes(content)
    assert same(weights(tmp_path), weights(saved))


def test_only_what_was_saved_leaves_the_machine(saving_run, hub, tmp_path):
    (tmp_path / "notes.ipynb").write_text("mine")
    (tmp_path / "passwords.json").write_text("mine")
    (tmp_path / "older.safetensors").write_text("mine")
    saving_run.save_model(tmp_path, push_to_hub="me/sums")
    files = hub.repositories["me/sums"].files
    expected = {path.name for path in saving_run.saving_adapter.source.iterdir()} | {"README.md"}
    assert files.keys() == expected
    for name, content in files.items():
        assert str(tmp_path).encode() not in content and TOKEN.encode() not in content, name


def test_card_says_how_it_was_trained(saving_run, hub, tmp_path):
    saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    card = hub.repositories["me/sums"].files["README.md"].decode()
    held_out = [validation.mean_reward for epoch in saving_run.records for validation in epoch.validations]
    assert f"`finetune_nb` {ft.__version__}" in card and "| epochs trained | 2 |" in card
    assert f"| before training | {held_out[0]:.3g} | 3 |" in card
    assert f"| after 2 epochs | {held_out[-1]:.3g} | 3 |" in card
    assert huggingface_hub.ModelCard(card).data.library_name == "transformers"


def test_new_repository_is_private_where_that_is_asked_for_and_an_old_one_stays_as_it_is(saving_run, hub, tmp_path):
    saving_run.save_model(tmp_path / "model", push_to_hub="me/sums", private=True)
    assert hub.repositories["me/sums"].private
    saving_run.save_model(tmp_path / "model", push_to_hub="me/sums", private=False)
    assert hub.repositories["me/sums"].private and len(hub.repositories["me/sums"].commits) == 2


def test_older_model_in_a_repository_is_replaced_and_other_files_stay(saving_run, hub, tmp_path):
    saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    files = hub.repositories["me/sums"].files
    files |= {"adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b"old", "paper.pdf": b"mine"}
    saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    assert "paper.pdf" in files
    assert "adapter_config.json" not in files and "model-00001-of-00002.safetensors" not in files


def test_card_that_somebody_wrote_is_kept_here_and_there(saving_run, hub, tmp_path):
    saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    files = hub.repositories["me/sums"].files
    files["README.md"] = b"written on the hub"
    saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    assert files["README.md"] == b"written on the hub"
    (tmp_path / "model" / "README.md").write_text("written here")
    saving_run.save_model(tmp_path / "model", push_to_hub="me/other")
    assert hub.repositories["me/other"].files["README.md"] == b"written here"


def test_upload_that_fails_loses_nothing_and_can_be_made_again(saving_run, hub, tmp_path):
    hub.refuse = lambda method, path: 400 if path.startswith("/lfs/") else None
    with pytest.raises(BackendError, match=r"is saved in .*not pushed to me/sums: .*refused with 400.*same call again"):
        saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    assert same(weights(tmp_path / "model"), weights(saving_run.saving_adapter.source))
    assert hub.repositories["me/sums"].commits == []
    hub.refuse = lambda method, path: None
    saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    assert len(hub.repositories["me/sums"].commits) == 1


@pytest.mark.parametrize(
    ("status", "said"), [(401, r"does not take the token.*login\(\)"), (403, "may not write there.*a name of your own")]
)
def test_token_that_is_refused_is_told_and_never_shown(status, said, saving_run, hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_somebodyElsesToken")
    hub.refuse = lambda method, path: status
    with caplog.at_level(logging.DEBUG), pytest.raises(BackendError, match=said) as told:
        saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "hf_somebodyElsesToken" not in f"{told.value} {told.value.__cause__} {caplog.text}"
    assert "hf_somebodyElsesToken" not in redact_text("hf_somebodyElsesToken")


def test_without_a_token_the_model_is_saved_and_the_login_named(saving_run, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BackendError, match=r"is saved in .*no token for the hub.*huggingface_hub\.login\(\)"):
        saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    assert (tmp_path / "model" / "model.safetensors").is_file() and hub.repositories == {}


def test_offline_the_model_is_saved_and_nobody_is_asked(saving_run, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackendError, match=r"is saved in .*HF_HUB_OFFLINE is set"):
        saving_run.save_model(tmp_path / "model", push_to_hub="me/sums")
    assert (tmp_path / "model" / "model.safetensors").is_file() and hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "me/su ms", "-sums", ""])
def test_name_that_no_repository_can_have_is_told(name, saving_run, hub, tmp_path):
    with pytest.raises(BackendError, match=r"is saved in .*such as 'me/my-model'"):
        saving_run.save_model(tmp_path / "model", push_to_hub=name)
    assert (tmp_path / "model" / "model.safetensors").is_file() and hub.repositories == {}


def test_adapter_is_pushed_with_the_name_of_its_base_model(saving_run, hub, tmp_path):
    saving_run.saving_adapter.source = adapter_folder(tmp_path / "adapter", "org/base")
    saved = saving_run.save_model(tmp_path / "saved", push_to_hub="me/sums")
    data = huggingface_hub.ModelCard(hub.repositories["me/sums"].files["README.md"].decode()).data
    assert (data.base_model, data.library_name, saved.base) == ("org/base", "peft", "org/base")


def test_adapter_of_a_model_that_only_this_machine_has_is_not_pushed(saving_run, hub, tmp_path):
    saving_run.saving_adapter.source = adapter_folder(tmp_path / "adapter", str(tmp_path))
    with pytest.raises(BackendError, match=r"is saved in .*is a folder of this machine.*merge=True"):
        saving_run.save_model(tmp_path / "saved", push_to_hub="me/sums")
    assert (tmp_path / "saved" / "adapter_config.json").is_file() and hub.requests == []
