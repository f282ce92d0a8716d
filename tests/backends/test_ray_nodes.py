"""What is said of a node of a Ray cluster, with or without Ray."""

from importlib.util import find_spec

import pytest

import finetune_nb as ft
from finetune_nb.backends.ray import nodes
from finetune_nb.backends.ray.nodes import check_versions, clock_warning, store_warning

SEEN = {"node": "ab", "host": "host2 (10.0.0.2)", "shared_memory": 64 << 20}


def seen(**versions):
    return {**SEEN, "versions": {**nodes._versions(), **versions}}


def test_other_versions_are_an_error_that_names_them():
    here = nodes._versions()
    installed = {package for package in ("torch", "transformers") if find_spec(package)}
    assert {"finetune_nb", "python", "pydantic", *installed} <= set(here)
    check_versions("a worker", seen())
    for package in here:
        with pytest.raises(ft.BackendError) as raised:
            check_versions("a worker", seen(**{package: "0.1"}))
        told = f"a worker on host2 (10.0.0.2) has {package} 0.1; expected {package} {here[package]}, as here. Install"
        assert told in str(raised.value)


def test_what_one_of_the_two_has_not_is_no_difference(monkeypatch):
    there = seen()
    del there["versions"]["pydantic"]
    check_versions("a worker", there)
    monkeypatch.setattr(nodes, "PACKAGES", ())
    check_versions("a worker", seen(torch="2.0"))


def test_what_a_package_was_built_for_does_not_count(monkeypatch):
    monkeypatch.setattr(nodes, "version", lambda package: "2.9.0+cu128")
    there = seen()
    monkeypatch.setattr(nodes, "version", lambda package: "2.9.0+cpu")
    check_versions("a worker", there)


def test_process_of_an_older_finetune_nb_is_compared_too():
    with pytest.raises(ft.BackendError, match=r"a worker on a node has finetune_nb 0\.0\.1; expected finetune_nb"):
        check_versions("a worker", {"finetune_nb": "0.0.1", "python": nodes._versions()["python"]})


def test_object_store_that_does_not_fit_into_shared_memory_is_said():
    assert store_warning(SEEN, 64e6) is None
    assert store_warning({**SEEN, "shared_memory": None}, 1e9) is None
    told = store_warning(SEEN, 2e9)
    assert "found 67 MB in /dev/shm of host2 (10.0.0.2); expected at least 2,000 MB" in told
    assert "--shm-size=2.0g" in told


def test_clock_that_is_apart_is_said_and_a_slow_answer_is_not():
    assert clock_warning(SEEN, 100.0, before=100.0, after=100.1) is None
    assert clock_warning(SEEN, 130.0, before=100.0, after=160.0) is None
    assert clock_warning(SEEN, 104.0, before=100.0, after=100.0) is None
    assert "host2 (10.0.0.2) 90 s ahead of the clock here; expected at most 5 s" in clock_warning(
        SEEN, 191.0, 100.0, 101.0
    )
    assert "host2 (10.0.0.2) 90 s behind the clock here" in clock_warning(SEEN, 10.0, 100.0, 101.0)
