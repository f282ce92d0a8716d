"""What a config may say of Ray, with or without Ray."""

import pickle
import sys

import pytest

import finetune_nb as ft
from finetune_nb.components.builder import Builder
from finetune_nb.testing import FakeAdapter, sums


def make(tmp_path, **options):
    return ft.Run(
        lambda question: "ok", lambda item: 1.0, sums(2), adapter=FakeAdapter(), output_dir=tmp_path, **options
    )


def test_engine_is_ray_with_or_without_an_address():
    for engine in ("ray", "ray:auto", "ray:10.0.0.1:6379"):
        assert ft.load_config({"run": {"engine": engine}}).run.engine_kind == "ray"
    with pytest.raises(ft.ConfigError, match="Ray Client .* is too slow for rollouts"):
        ft.load_config({"run": {"engine": "ray:ray://10.0.0.1:10001"}})
    with pytest.raises(ft.ConfigError, match="there is no engine 'local:8'"):
        ft.load_config({"run": {"engine": "local:8"}})
    with pytest.raises(ft.ConfigError, match=r"run\.ray\.worker"):
        ft.load_config({"run": {"engine": "ray", "ray": {"worker": 2}}})


def test_orphans_stay_an_hour_or_as_long_as_asked_for():
    def timeout(**ray):
        return ft.load_config({"run": {"engine": "ray", "ray": ray}}).run.ray.orphan_timeout

    assert (timeout(), timeout(orphan_timeout=60), timeout(orphan_timeout=None)) == (3600, 60, None)
    with pytest.raises(ft.ConfigError, match="orphan_timeout"):
        timeout(orphan_timeout=0)


def test_deterministic_run_stays_on_one_engine(tmp_path):
    with pytest.raises(ft.ConfigError, match="Take engine 'local', or leave deterministic out"):
        make(tmp_path, engine="ray", deterministic=True)


def test_secrets_of_the_workers_environment_are_not_shown():
    config = ft.load_config({"run": {"ray": {"runtime_env": {"env_vars": {"HF_TOKEN": "hf_something_secret"}}}}})
    assert "hf_something_secret" not in repr(config)
    assert "hf_something_secret" not in str(config.stored())


async def test_trainer_of_an_actor_is_one_that_can_go_there(tmp_path):
    with pytest.raises(ft.ConfigError, match="a trainer adapter that was given as an object"):
        make(tmp_path, engine="ray", ray={"trainer": True})
    section = {"_type": "tinker", "model": "some/model"}
    config = {"run": {"engine": "ray", "ray": {"trainer": True}}, "trainer_adapters": {"mine": section}}
    async with Builder(ft.load_config(config)) as builder:
        with pytest.raises(ft.ConfigError, match="trainer adapter of _type 'tinker'; expected 'local_grpo'"):
            await builder.get_trainer_adapter("mine")
    assert not ft.load_config({"run": {"ray": {"trainer": True}}}).run.trains_elsewhere  # the engine is this process


def test_missing_extra_can_come_from_another_process():
    error = pickle.loads(pickle.dumps(ft.MissingExtra("the training backend local_grpo", "local")))
    assert str(error) == str(ft.MissingExtra("the training backend local_grpo", "local"))


async def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch, closing):
    monkeypatch.setitem(sys.modules, "ray", None)
    run = closing(make(tmp_path, engine="ray"))
    with pytest.raises(ft.MissingExtra, match=r"finetune_nb\[ray\]"):
        await run.next_epoch()
