"""`ft.Run(env=...)`: how a name, an object or a class becomes dataset, agent and reward, and how a run finds it again."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from typing import Any

import pytest

import finetune_nb as ft
from finetune_nb.components.environments import ENVIRONMENTS, environment_from
from finetune_nb.errors import ConfigError, MissingExtra, RunError
from finetune_nb.interfaces import Environment
from finetune_nb.testing import FakeAdapter, ScriptedPolicy


async def answer(question: str, llm: Any) -> str:
    return (await llm.chat([{"role": "user", "content": question}])).content


def is_echo(output: str, question: str) -> float:
    return float(output == question)


class Echo(Environment):
    """Asks for its own words."""

    package = "echo"

    @classmethod
    def takes(cls, given: Any) -> bool:
        return given is Parrot or isinstance(given, Parrot)

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        self.size = options.get("size", 3)
        self.words = given if isinstance(given, str) else given.words
        self.closed = False

    def rows(self, role: str) -> list[dict[str, Any]]:
        return [{"question": f"{self.words}{n}", "level": n} for n in range(self.size)] if role == "train" else []

    @property
    def workflow(self) -> Any:
        return answer

    @property
    def reward(self) -> Any:
        return is_echo

    @property
    def fingerprint(self) -> str:
        return self.words

    async def aclose(self) -> None:
        CLOSED.append(self)


class Parrot:
    words = "polly"


CLOSED: list[Echo] = []


@pytest.fixture(autouse=True)
def known(monkeypatch):
    CLOSED.clear()
    monkeypatch.setitem(ENVIRONMENTS, "echo", f"{__name__}:Echo")


def echoing(**options: Any) -> dict[str, Any]:
    policy = ScriptedPolicy(lambda messages, seed: messages[-1]["content"])
    return {"adapter": FakeAdapter(policy=policy), "generations": 2, **options}


def scores(run: ft.Run) -> list[float]:
    return run.trajectories().reward.tolist()


async def test_a_name_is_dataset_agent_and_reward(tmp_path):
    run = ft.Run(env="echo:hello", env_options={"size": 2}, output_dir=tmp_path, **echoing())
    await run.next_epoch()
    assert run.trajectories().output.tolist() == ["hello0", "hello0", "hello1", "hello1"]
    assert scores(run) == [1.0] * 4
    run.close()
    assert len(CLOSED) == 1


async def test_what_is_given_beside_an_environment_takes_the_place_of_its_own(tmp_path):
    async def shout(question, llm):
        return (await answer(question, llm)).upper()

    rows = [{"question": "a", "level": 7}]
    run = ft.Run(shout, lambda level: float(level), rows, env="echo:x", output_dir=tmp_path, **echoing())
    await run.next_epoch()
    assert (run.trajectories().output.tolist(), scores(run)) == (["A", "A"], [7.0, 7.0])
    assert run.config.workflow.static_type() == "python_function"
    assert run.config.finetuning.run_configuration.dataset == "train"
    run.close()


async def test_a_run_of_a_named_environment_continues_from_its_folder_and_forks(tmp_path):
    run = ft.Run(env="echo:hello", env_options={"size": 2}, output_dir=tmp_path, name="named", **echoing())
    await run.next_epoch()
    run.close()
    again = ft.Run.open(tmp_path / "named", adapter=echoing()["adapter"])
    epoch = await again.next_epoch()
    assert (epoch.index, scores(again)) == (1, [1.0] * 8)
    assert not any(change.source == "resume" for change in again.changes)
    fork = again.fork(adapter=echoing()["adapter"])
    await fork.next_epoch()
    assert scores(fork) == [1.0] * 4
    fork.close()
    again.close()


async def test_a_run_of_an_object_says_that_it_must_be_passed_again(tmp_path):
    run = ft.Run(env=Parrot, output_dir=tmp_path, name="object", **echoing())
    await run.next_epoch()
    assert run.trajectories().output.iloc[0] == "polly0"
    run.close()
    again = ft.Run.open(tmp_path / "object", adapter=echoing()["adapter"])
    assert len(again.trajectories()) == 6  # to read it, nothing is needed
    with pytest.raises(ConfigError, match="'Parrot' was given as an object or a class.*env="):
        await again.next_epoch()
    again.close()
    again = ft.Run.open(tmp_path / "object", env=Parrot, adapter=echoing()["adapter"])
    assert (await again.next_epoch()).index == 1
    again.close()


async def test_another_version_of_the_environment_is_in_the_journal(tmp_path, monkeypatch):
    run = ft.Run(env=Parrot, output_dir=tmp_path, name="object", **echoing())
    await run.next_epoch()
    run.close()
    monkeypatch.setattr(Parrot, "words", "jack")
    again = ft.Run.open(tmp_path / "object", env=Parrot, adapter=echoing()["adapter"])
    await again.next_epoch()
    assert {"environment", "dataset.environment:train"} <= {change.field for change in again.changes}
    again.close()


async def test_a_folder_of_somebody_else_makes_no_environment(tmp_path):
    run = ft.Run(env="echo:hello", output_dir=tmp_path, name="theirs", **echoing())
    await run.next_epoch()
    run.close()
    (tmp_path / "theirs" / "signature").unlink()
    theirs = ft.Run.open(tmp_path / "theirs", adapter=echoing()["adapter"])
    assert len(theirs.trajectories()) == 6
    with pytest.raises(RunError, match="trust=True"):
        await theirs.next_epoch()
    with pytest.raises((ConfigError, RunError), match="trust|dataset"):
        theirs.rescore(is_echo)
    theirs.close()


async def test_a_yaml_names_an_environment(tmp_path):
    run = ft.Run(env="echo:hello", env_options={"size": 2}, output_dir=tmp_path, name="first")
    written = run.config.stored()
    run.close()
    again = ft.Run.from_config(written, name="second")
    assert again.config.run.environment.name == "echo:hello"
    again.close()


def test_unknown_names_say_what_is_known():
    with pytest.raises(ConfigError, match="no environment 'ecko:x'.*Did you mean 'echo'.*\"reasoning_gym:...\""):
        ft.Run(env="ecko:x")
    with pytest.raises(ConfigError, match="no environment 'echo'"):
        ft.Run(env="echo")
    with pytest.raises(ConfigError, match="env is 'object', which no kind of environment takes.*reasoning_gym"):
        ft.Run(env=object())
    with pytest.raises(ConfigError, match="env_options.*give env="):
        ft.Run(answer, is_echo, [{"question": "a"}], env_options={"size": 3})
    with pytest.raises(ConfigError, match="env_options are written to config.yml"):
        ft.Run(env="echo:x", env_options={"size": 2, "make": print})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra, match="pip install reasoning-gym") as raised:
        ft.Run(env="reasoning_gym:chain_sum")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_an_environment_itself_is_taken_as_it_is():
    made = Echo("a", {})
    assert environment_from(made) is made
    with pytest.raises(ConfigError, match="leave env_options out"):
        environment_from(made, {"size": 1})


def test_no_kind_imports_its_package_to_say_that_an_object_is_not_its_own():
    before = set(sys.modules)
    with pytest.raises(ConfigError):
        environment_from(object())
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not loaded & {"reasoning_gym", "textarena", "gem", "gymnasium", "skyrl_gym", "trl", "openenv", "torch"}
