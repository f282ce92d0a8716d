"""A model card: what it says of a run, and what it never says."""

import dataclasses

import pytest
from small_agents import guess, right

import finetune_nb as ft
from finetune_nb.saving.card import Training, model_card, public_name, training_of
from finetune_nb.testing import sums

pytest.importorskip("huggingface_hub")

PLAIN = Training(base=None, method="local_grpo", settings={}, epochs=1, trajectories=8, rewards=None, held_out=())


def test_card_names_the_base_model_and_the_settings(tmp_path, closing):
    training = {"loss": "gspo", "lora": {"rank": 4}, "learning_rate": 3e-4}
    run = closing(ft.Run(guess, right, sums(2), model="org/base-1", training=training, output_dir=tmp_path))
    card = model_card(training_of(run.config, []), is_adapter=True)
    assert "base_model: org/base-1" in card
    assert "[org/base-1](https://huggingface.co/org/base-1)" in card
    for row in ("| method | local\\_grpo |", "| loss | gspo |", "| learning rate | 0.0003 |", "| LoRA rank | 4 |"):
        assert row in card
    assert "held-out" not in card and "mean reward" not in card  # nothing is known of them


@pytest.mark.parametrize(
    "name", ["embedded", "/data/me/model", "./model", "../a/b", "a/../b", "~/model", "C:\\a\\b", "a/b/c", None]
)
def test_folder_of_this_machine_is_no_public_name(name):
    assert public_name(name) is None


def test_folder_that_looks_like_a_name_on_the_hub_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("models/mine") == "models/mine"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert public_name("models/mine") is None


def test_text_that_is_no_number_is_only_a_text_in_the_card():
    method = "<script>alert(1)</script> | [x](http://a) \n# heading `code`"
    card = model_card(dataclasses.replace(PLAIN, method=method, settings={"lo|ss": "*b*"}), is_adapter=False)
    assert "<script>" not in card and "[x](" not in card and "\n# heading" not in card
    assert "| lo\\|ss | \\*b\\* |" in card
