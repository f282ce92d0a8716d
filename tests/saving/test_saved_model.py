"""What `run.save_model` returns: a path, and the lines that load the model, which are run here as they stand."""

import json
import os
import shlex
from pathlib import Path

import pytest

from finetune_nb.errors import BackendError
from finetune_nb.saving.saved_model import SavedModel, saved_model


def adapter(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return saved_model(folder, ["adapter_config.json"])


def test_saved_model_is_the_path_of_its_folder(saving_run, tmp_path):
    saved = saving_run.save_model(tmp_path / "model")
    assert os.fspath(saved) == str(saved) == str(tmp_path / "model") and Path(saved) == saved.path
    assert (saved / "config.json").is_file() and saved.is_dir() and saved.name == "model"
    assert "model.safetensors" in os.listdir(saved)
    with pytest.raises(AttributeError):
        _ = saved.nothing_of_a_path


def test_size_is_that_of_what_was_saved(saving_run, tmp_path):
    (tmp_path / "other.bin").write_bytes(bytes(10_000_000))
    saved = saving_run.save_model(tmp_path)
    assert saved.bytes == sum(path.stat().st_size for path in saving_run.saving_adapter.source.iterdir())
    assert "other.bin" not in saved.files and f"{saved.bytes / 1e6:,.1f} MB" in repr(saved)


def test_line_for_transformers_loads_the_model(saving_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    saved = saving_run.save_model(tmp_path / "it's mine")
    names = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "AutoTokenizer")}
    exec(saved.transformers, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    assert names["tokenizer"].encode("a") == transformers.AutoTokenizer.from_pretrained(saved).encode("a")


def test_line_for_vllm_names_folder_or_base_model_adapter_and_rank(tmp_path):
    whole = SavedModel(tmp_path / "my model", ())
    assert shlex.split(whole.vllm) == ["vllm", "serve", str(tmp_path / "my model")]
    small = adapter(tmp_path / "small=1", base_model_name_or_path="org/base", r=8)
    modules = ["--enable-lora", "--lora-modules", f"small-1={tmp_path / 'small=1'}"]
    assert shlex.split(small.vllm) == ["vllm", "serve", "org/base", *modules]
    large = adapter(tmp_path / "large", base_model_name_or_path="org/base", r=40)
    assert shlex.split(large.vllm)[-2:] == ["--max-lora-rank", "64"]


def test_line_for_ollama_is_there_with_a_gguf_alone(tmp_path):
    saved = SavedModel(tmp_path / "My Model", (), gguf=tmp_path / "My Model" / "model-q8_0.gguf")
    expected = ["ollama", "create", "my-model", "-f", str(tmp_path / "My Model" / "Modelfile")]
    assert shlex.split(saved.ollama or "") == expected and expected[2] in repr(saved)
    assert SavedModel(tmp_path, ()).ollama is None and "Ollama" not in repr(SavedModel(tmp_path, ()))


def test_lines_name_the_folder_whatever_the_directory_they_are_run_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = SavedModel(Path("model"), (), gguf=Path("model/model-q8_0.gguf"))
    for line in (saved.transformers, saved.vllm, saved.ollama):
        assert str(tmp_path / "model") in (line or "")
    assert str(saved) == "model"


def test_names_of_folders_and_models_are_texts_in_every_view(tmp_path):
    folder = tmp_path / "<b>\x1b[2J"
    saved = adapter(folder, base_model_name_or_path="<script>\x1b[2J", r=8)
    assert "\x1b" not in repr(saved) and "\x1b" not in saved._repr_html_()
    assert "<script>" not in saved._repr_html_() and "<b>" not in saved._repr_html_()


@pytest.mark.parametrize("config", ["[]", "{", '{"base_model_name_or_path": 3}', "{}"])
def test_adapter_that_names_no_base_model_is_told(config, tmp_path):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(BackendError, match="names no base model"):
        saved_model(tmp_path, [])
