"""What depends on the version of the Toolkit, and what a run over it needs again when it is opened."""

import sys
from importlib.metadata import version

import pytest
import toolkit

import finetune_nb as ft
from finetune_nb.backends.nat.versions import RELIED_ON, missing_package, pin_of
from finetune_nb.hooks import resolve

pytestmark = pytest.mark.slow


def what_moved(relied_on):
    """What is not where it was, as a list for whoever tries a new version."""
    moved = []
    for path, attributes in relied_on.items():
        try:
            found = resolve(path)
        except (ImportError, AttributeError) as error:
            moved.append(f"{path}: {error}")
            continue
        fields = getattr(found, "model_fields", {})
        moved += [f"{path} has no {name}" for name in attributes if name not in fields and not hasattr(found, name)]
    return moved


def test_all_names_of_the_toolkit_that_are_relied_on_are_where_they_were():
    assert len(RELIED_ON) > 40
    assert what_moved(RELIED_ON) == [], f"nvidia-nat-core {version('nvidia-nat-core')} moved something"


def test_what_moved_is_said():
    assert what_moved({"nat.builder.builder:Builder": ("get_llm", "get_lm"), "nat.gone:Thing": ()}) == [
        "nat.builder.builder:Builder has no get_lm",
        "nat.gone:Thing: No module named 'nat.gone'",
    ]


def test_pins_are_of_the_version_that_is_there():
    here = version("nvidia-nat-core")
    assert pin_of("profiler") == f'pip install "nvidia-nat-profiler=={here}"'
    assert pin_of("langchain", "nvidia") == f'pip install "nvidia-nat-langchain[nvidia]=={here}"'


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("langchain_nvidia_ai_endpoints", r"langchain-nvidia-ai-endpoints, which.*nvidia-nat-langchain\[nvidia\]=="),
        ("langchain_aws.chat", r"langchain-aws, which.*nvidia-nat-langchain\[aws\]=="),
        ("langchain_core", r"langchain-core, which.*nvidia-nat-langchain\[openai\]=="),
        ("numexpr", "numexpr, which.*Install the package that has the module 'numexpr'"),
    ],
)
def test_the_package_that_is_missing_is_named(module, said):
    with pytest.raises(ft.ConfigError, match=said):
        raise missing_package(ModuleNotFoundError(f"No module named {module!r}", name=module))


async def test_a_model_whose_package_is_missing_is_said_before_the_first_rollout(place, art, closing, monkeypatch):
    monkeypatch.setitem(sys.modules, "langchain_nvidia_ai_endpoints", None)  # as if it were not installed
    llms = {"model": {"_type": "nim", "model_name": "m", "base_url": "http://127.0.0.1:9/v1", "api_key": "k"}}
    run = closing(ft.Run.from_nat(toolkit.write_config(place, "", llms=llms)))
    with pytest.raises(ft.ConfigError, match=r"nvidia-nat-langchain\[nvidia\]=="):
        await run.next_epoch()


# ── opened again ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_is_opened_with_what_was_overridden(place, llm, art, closing):
    path = toolkit.write_config(place, "http://127.0.0.1:9/v1")
    override = [("llms.model.base_url", llm.base_url), ("llms.model.api_key", "sk-of-the-override")]
    run = closing(ft.Run.from_nat(path, override=override, name="opened"))
    await run.next_epoch()
    with pytest.raises(ft.ConfigError, match="'opened' is open here.*run.close"):
        ft.Run.open(run.folder, override=override)
    run.close()
    assert not [each for each in run.folder.rglob("*") if each.is_file() and b"sk-of-the" in each.read_bytes()]
    again = closing(
        ft.Run.open(run.folder, override=[("llms.model.api_key", "sk-another"), ("finetuning.num_epochs", 9)])
    )
    assert again.config.finetuning.num_epochs == 9
    llm.requests.clear()
    assert (await again.next_epoch()).job.status == "completed"
    assert {request.headers["authorization"] for request in llm.requests} == {"Bearer sk-another"}


async def test_only_a_run_over_the_toolkit_takes_an_override(tmp_path, closing):
    from finetune_nb.testing import FakeAdapter, ScriptedBuilder

    builder = ScriptedBuilder(lambda epoch: {"a": [0, 1]})
    run = closing(ft.Run(builder=builder, adapter=FakeAdapter(), output_dir=tmp_path, name="ours"))
    await run.next_epoch()
    run.close()
    with pytest.raises(ft.ConfigError, match="is for runs that were made by Run.from_nat"):
        ft.Run.open(tmp_path / "ours", override=[("run.seed", 3)])
