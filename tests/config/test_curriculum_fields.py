"""The curriculum's seven fields are declared once: the config section and the settings of a run take the same values."""

from __future__ import annotations

import dataclasses
import math
from typing import get_type_hints

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from finetune_nb.components.loading import load_config
from finetune_nb.config import CurriculumLearningConfig, CurriculumSettings
from finetune_nb.config.sections import section_of, settings_from
from finetune_nb.errors import ConfigError

IN_SETTINGS = {"initial_percentile": "percentile"}
"""The one field of the section that has another name in the settings."""
SECTION_FIELDS = list(CurriculumLearningConfig.model_fields)
NUMBERS = ["initial_percentile", "increment_percentile", "expansion_interval", "min_reward_diff", "random_subsample"]


@pytest.mark.parametrize("name", SECTION_FIELDS)
def test_a_field_has_the_same_type_and_limits_in_the_section_and_in_the_settings(name):
    hints = get_type_hints(CurriculumSettings, include_extras=True)
    in_settings = FieldInfo.from_annotation(hints[IN_SETTINGS.get(name, name)])
    in_section = CurriculumLearningConfig.model_fields[name]
    assert in_section.annotation == in_settings.annotation
    assert in_section.metadata == in_settings.metadata
    assert in_section.description == in_settings.description
    assert in_settings.description


def test_the_section_s_names_order_and_defaults_are_those_of_the_toolkit():
    assert list(CurriculumLearningConfig().model_dump().items()) == [
        ("enabled", False),
        ("initial_percentile", 0.3),
        ("increment_percentile", 0.2),
        ("expansion_interval", 5),
        ("min_reward_diff", 0.1),
        ("sort_ascending", False),
        ("random_subsample", None),
    ]


@given(name=st.sampled_from(NUMBERS), value=st.integers(-2, 3) | st.floats(-1, 2) | st.just(math.nan))
def test_a_number_is_taken_by_both_or_by_neither(name, value):
    if name == "expansion_interval" and value != value // 1:
        return  # pydantic reads 2.0 as 2, and both refuse 1.5
    try:
        CurriculumLearningConfig(**{name: value})
        by_section = True
    except ValidationError:
        by_section = False
    try:
        value = int(value) if name == "expansion_interval" and math.isfinite(value) else value
        CurriculumSettings(**{IN_SETTINGS.get(name, name): value})
        by_settings = True
    except ConfigError:
        by_settings = False
    assert by_section == by_settings


@pytest.mark.parametrize("name", ["initial_percentile", "increment_percentile", "random_subsample"])
def test_a_config_with_a_share_out_of_range_names_its_path_and_what_was_found(name):
    with pytest.raises(ConfigError, match=rf"finetuning\.curriculum_learning\.{name}: .*found 1\.5"):
        load_config({"finetuning": {"curriculum_learning": {name: 1.5}}})


def test_settings_that_go_through_a_section_come_back_without_their_percentile_and_schedule():
    before = CurriculumSettings(enabled=True, percentile=0.7, schedule="manual", min_reward_diff=0.25)
    section = section_of(before, initial_percentile=0.3)
    assert section == CurriculumLearningConfig(enabled=True, initial_percentile=0.3, min_reward_diff=0.25)
    assert settings_from(section) == dataclasses.replace(before, percentile=0.3, schedule="automatic")
    assert CurriculumSettings.from_config(section) == settings_from(section)
    assert before.to_config(0.3) == section


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"random_subsample": 1.5}, r"curriculum: random_subsample is 1\.5; expected a number above 0 and at most 1\."),
        ({"expansion_interval": 0}, r"curriculum: expansion_interval is 0; expected a whole number of at least 1\."),
        ({"min_reward_diff": -0.1}, r"curriculum: min_reward_diff is -0\.1; expected a number of at least 0\."),
        ({"percentile": None}, r"curriculum: percentile is None; expected a number above 0 and at most 1\."),
        ({"sort_ascending": None}, r"curriculum: sort_ascending is None; expected True or False\."),
    ],
)
def test_an_error_gives_the_limits_of_the_field_in_words(change, expected):
    with pytest.raises(ConfigError, match=expected):
        CurriculumSettings(**change)
