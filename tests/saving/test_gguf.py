"""How a llama.cpp checkout's converter is used. Here a small script stands in for it; tests/with_gguf has the real one."""

import json
import sys
from pathlib import Path

import pytest

from finetune_nb.errors import BackendError, ConfigError
from finetune_nb.saving.gguf import CHECKOUT

CONVERTER = """
import json, os, pathlib, sys
place = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
model, out = pathlib.Path(arguments[0]), pathlib.Path(arguments[arguments.index("--outfile") + 1])
files = sorted(path.name for path in model.iterdir())
seen = {"arguments": arguments[1:], "files": files, "environment": dict(os.environ)}
with open(place / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(seen) + "\\n")
out.write_bytes(b"GGUF of " + (model / "config.json").read_bytes())
"""


class Checkout:
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.does(CONVERTER)

    def does(self, script):
        (self.folder / "convert_hf_to_gguf.py").write_text(script)

    @property
    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    made = Checkout(tmp_path / "llama.cpp")
    monkeypatch.setenv(CHECKOUT, str(made.folder))
    return made


@pytest.fixture
def run(saving_run):
    """Its adapter can tell what it would save."""

    async def describe(directory, **options):
        for path in saving_run.saving_adapter.source.glob("*.json"):
            (Path(directory) / path.name).write_bytes(path.read_bytes())

    saving_run.saving_adapter.save_description = describe
    return saving_run


def test_gguf_and_modelfile_are_beside_the_model(run, checkout, tmp_path):
    saved = run.save_model(tmp_path / "model", gguf="q8_0")
    assert saved.gguf == tmp_path / "model" / "model-q8_0.gguf" and saved.gguf.read_bytes().startswith(b"GGUF")
    assert (saved / "Modelfile").read_text().startswith("# written by finetune_nb\nFROM ./model-q8_0.gguf\n")
    assert {"model-q8_0.gguf", "Modelfile"} <= set(saved.files) and saved.ollama in repr(saved)
    assert not list(saved.path.glob(".*"))


def test_converter_is_asked_before_any_weight_is_written_and_sees_the_new_model_alone(
    run, checkout, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_text("of an older model")
    run.save_model(tmp_path / "model", gguf="f16")
    asked, converted = checkout.calls
    assert "--vocab-only" in asked["arguments"] and "model.safetensors" not in asked["files"]
    assert converted["arguments"][-4:] == ["--outtype", "f16", "--model-name", "model"]
    assert "model.safetensors" in converted["files"] and "tokenizer.model" not in converted["files"]
    for call in checkout.calls:
        assert call["environment"]["HF_HUB_OFFLINE"] == "1" and "HF_TOKEN" not in call["environment"]


def test_checkout_can_be_an_argument(run, checkout, tmp_path, monkeypatch):
    monkeypatch.delenv(CHECKOUT)
    assert run.save_model(tmp_path / "model", gguf="f32", llama_cpp=checkout.folder).gguf is not None


def test_gguf_is_pushed_with_the_model(run, checkout, hub, tmp_path):
    run.save_model(tmp_path / "model", gguf="q8_0", push_to_hub="me/sums")
    assert {"model-q8_0.gguf", "Modelfile", "model.safetensors"} <= hub.repositories["me/sums"].files.keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gguf": "q8"}, r"gguf is 'q8'\. Did you mean 'q8_0'\?.*llama-quantize"),
        (
            {"gguf": "q8_0"},
            r"no checkout of llama\.cpp is named.*git clone .*finetune_nb\[gguf\].*FINETUNE_NB_LLAMA_CPP",
        ),
        ({"gguf": "q8_0", "llama_cpp": "nowhere"}, r"nowhere has no convert_hf_to_gguf\.py.*git clone"),
    ],
)
def test_without_a_converter_nothing_is_saved_and_the_recipe_is_told(options, said, run, tmp_path, monkeypatch):
    monkeypatch.delenv(CHECKOUT, raising=False)
    with pytest.raises(ConfigError, match=said):
        run.save_model(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_model_that_llama_cpp_cannot_hold_is_told_before_any_work(run, checkout, tmp_path):
    checkout.does("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    with pytest.raises(ConfigError, match=r"cannot hold this model: NotImplementedError: BPE.*Nothing was saved"):
        run.save_model(tmp_path / "model", gguf="q8_0")
    assert not (tmp_path / "model").exists()


def test_package_that_the_converter_needs_is_named(run, checkout, tmp_path):
    checkout.does("import no_such_package")
    with pytest.raises(BackendError, match=r"No module named 'no_such_package'.*finetune_nb\[gguf\]"):
        run.save_model(tmp_path / "model", gguf="q8_0")
    assert not (tmp_path / "model").exists()


def test_model_that_comes_with_code_is_not_given_to_the_converter(run, checkout, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "somebody/code--tokenizer.Mine"}}))
    run.saving_adapter.source = source
    with pytest.raises(ConfigError, match=r"config\.json names code that comes with it \(auto_map\)"):
        run.save_model(tmp_path / "model", gguf="q8_0")
    assert not (checkout.folder / "calls.jsonl").exists()


def test_adapter_alone_is_no_gguf(run, checkout, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "adapter_config.json").write_text("{}")
    run.saving_adapter.source = source
    with pytest.raises(ConfigError, match="an adapter alone.*Nothing was saved.*merge=True"):
        run.save_model(tmp_path / "model", gguf="q8_0")
    assert not (tmp_path / "model").exists()


def test_conversion_that_fails_keeps_the_model_and_the_older_gguf(run, checkout, tmp_path):
    saved = run.save_model(tmp_path / "model", gguf="q8_0")
    checkout.does(CONVERTER + "if '--outtype' in arguments: sys.exit('no space left')\n")
    with pytest.raises(BackendError, match=r"is saved in .*but not as GGUF: no space left.*same call again"):
        run.save_model(tmp_path / "model", gguf="q8_0")
    assert (saved / "model.safetensors").is_file() and (saved / "model-q8_0.gguf").read_bytes().startswith(b"GGUF")
    assert not list(saved.path.glob(".*"))


def test_adapter_that_cannot_tell_before_is_asked_after_it_saved(run, checkout, tmp_path):
    del run.saving_adapter.save_description
    checkout.does("import sys; sys.exit('Model FooForCausalLM is not supported')")
    with pytest.raises(ConfigError, match=r"Model FooForCausalLM is not supported.*is saved in"):
        run.save_model(tmp_path / "model", gguf="q8_0")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_modelfile_that_somebody_wrote_stays(run, checkout, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "Modelfile").write_text("FROM mine")
    saved = run.save_model(tmp_path / "model", gguf="q8_0")
    assert (saved / "Modelfile").read_text() == "FROM mine" and "Modelfile" not in saved.files
    assert any("FROM ./model-q8_0.gguf" in note for note in saved.notes)


def test_what_the_converter_says_is_one_plain_line(run, checkout, tmp_path):
    checkout.does(f"print('\\x1b[2J' + 'x' * 5000); raise SystemExit(1)  # {sys.executable}")
    with pytest.raises(ConfigError) as told:
        run.save_model(tmp_path / "model", gguf="q8_0")
    assert "\x1b" not in str(told.value) and len(str(told.value)) < 1500
