"""An adapter brought home from a service: what is taken from its archive, and that it is the model that was sampled."""

import io
import json
import tarfile
from contextlib import contextmanager

import pytest
from byte_tokenizer import byte_tokenizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from served_models import write_model  # noqa: E402

from finetune_nb.backends.local.scoring import score  # noqa: E402
from finetune_nb.backends.tinker import archive as archives  # noqa: E402
from finetune_nb.backends.tinker.archive import bring_home  # noqa: E402
from finetune_nb.errors import BackendError, ConfigError  # noqa: E402
from finetune_nb.types import Sample  # noqa: E402

PROMPT, REPLY = [3, 9, 4], [20, 21, 22, 1]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The files of an adapter whose config names no layers, and a reply that it sampled."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=LAYERS, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config).eval()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    (logprobs,) = score(model, PROMPT, REPLY, (1.0,))
    files = {WEIGHTS: (folder / WEIGHTS).read_bytes(), CONFIG: (folder / CONFIG).read_bytes()}
    said = json.loads(files[CONFIG]) | {"target_modules": None}
    return files | {CONFIG: json.dumps(said).encode()}, [(PROMPT, Sample(REPLY, logprobs, "stop"))]


def packed(files, *members):
    """A packed archive of plain files, and of other members before them."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def home(base, trained, tmp_path):
    """Brings home what it is given, by default the trained adapter."""

    def home(content=None, replies=None, **options):
        options = {"base": str(base), "limit": 0.1, **options}
        content = packed(trained[0]) if content is None else content
        return bring_home(
            tmp_path / "home",
            lambda place, longest: place.write_bytes(content),
            options.pop("base"),
            byte_tokenizer(),
            trained[1] if replies is None else replies,
            options.pop("limit"),
            **options,
        )

    return home


def logprobs(model):
    (found,) = score(model.eval(), PROMPT, REPLY, (1.0,))
    return found


def test_peft_loads_the_adapter_that_was_trained(home, base, trained):
    folder = home()
    assert sorted(path.name for path in folder.iterdir() if "tokenizer" not in path.name) == [
        CONFIG,
        WEIGHTS,
        "chat_template.jinja",
    ]
    config = json.loads((folder / CONFIG).read_text())
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == (LAYERS, 4, 32)
    assert config["base_model_name_or_path"] == str(base)
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    assert logprobs(model) == pytest.approx(trained[1][0][1].logprobs, abs=1e-4)


def test_a_merged_model_needs_no_peft(home, trained):
    model = transformers.AutoModelForCausalLM.from_pretrained(home(merge=True))
    assert not hasattr(model, "peft_config")
    assert logprobs(model) == pytest.approx(trained[1][0][1].logprobs, abs=1e-4)


def test_another_model_than_was_sampled_is_not_saved(home, trained, tmp_path):
    ((prompt, sample),) = trained[1]
    other = [(prompt, Sample(sample.ids, [value - 0.5 for value in sample.logprobs], "stop"))]
    with pytest.raises(BackendError, match=r"4 recorded tokens differ by 0\.5 nats"):
        home(replies=other)
    assert not (tmp_path / "home").exists()
    home(replies=other, prove=False)
    with pytest.raises(BackendError, match="differ by nan"):  # nothing to compare with proves nothing
        home(replies=[])


def test_a_base_model_that_is_elsewhere_is_needed_for_merging_alone(home, tmp_path, caplog):
    folder = home(base="somebody/elsewhere")
    assert (folder / WEIGHTS).exists() and "not compared" in caplog.text
    for asked in ({"merge": True}, {"prove": True}):
        with pytest.raises(ConfigError, match="is not on this machine"):
            home(base="somebody/elsewhere", **asked)
    (folder / "config.json").write_text("{}")
    with pytest.raises(BackendError, match="holds a whole model"):
        home()


@contextmanager
def nothing_written(folder):
    yield
    assert not folder.exists()
    assert not (folder.parent / "outside").exists()


def member(name, kind=tarfile.REGTYPE, size=0, link=""):
    found = tarfile.TarInfo(name)
    found.type, found.size, found.linkname = kind, size, link
    return found


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (member("../outside"), "expected an adapter's few files"),
        (member("/tmp/outside"), "expected an adapter's few files"),
        (member("a/../../outside"), "expected an adapter's few files"),
        (member(WEIGHTS, tarfile.SYMTYPE, link="/etc/passwd"), "is a link or a special file"),
        (member(WEIGHTS, tarfile.LNKTYPE, link="/etc/passwd"), "is a link or a special file"),
        (member("pipe", tarfile.FIFOTYPE), "is a link or a special file"),
        (member("device", tarfile.CHRTYPE), "is a link or a special file"),
        (member(f"elsewhere/{WEIGHTS}", size=3), f"more than one {WEIGHTS}"),
        (member(CONFIG, size=archives.LARGEST_CONFIG + 1), "too large"),
    ],
)
def test_an_archive_is_not_believed(home, trained, tmp_path, first, reason):
    with nothing_written(tmp_path / "home"), pytest.raises(BackendError, match=reason):
        home(packed(trained[0], first))


def test_archives_that_are_no_adapters_are_refused(home, trained, monkeypatch, tmp_path):
    files, _ = trained
    whole = packed(files)
    with nothing_written(tmp_path / "home"):
        with pytest.raises(BackendError, match="cannot be read"):
            home(whole[: len(whole) // 2])
        with pytest.raises(BackendError, match="cannot be read"):
            home(b"<html>not found</html>")
        with pytest.raises(BackendError, match=f"no {CONFIG}"):
            home(packed({WEIGHTS: files[WEIGHTS]}))
        with pytest.raises(BackendError, match="not one of a LoRA adapter"):
            home(packed(files | {CONFIG: b'{"lora_alpha": NaN}'}))
        with pytest.raises(BackendError, match="cannot be read"):
            home(packed(files | {WEIGHTS: b"torn"}))
        monkeypatch.setattr(archives, "LARGEST_ARCHIVE", 10_000)
        with pytest.raises(BackendError, match="too large"):
            home()
