"""The reference in notebooks/reference is what the code says, and says something of everything."""

import pytest
import reference

import finetune_nb
from finetune_nb.components.registry import KINDS, OUR_TYPES, config_class


@pytest.mark.parametrize("name", reference.pages())
def test_the_reference_is_what_the_code_says(name):
    written = (reference.FOLDER / name).read_text(encoding="utf-8")
    assert written == reference.pages()[name], "the code has changed: python tests/reference.py"


def test_every_public_name_is_in_it():
    listed = " ".join(reference.GROUPS.values()).split()
    configs = {name for name in finetune_nb.__all__ if name.endswith("Config") and name not in listed}
    assert sorted({*listed, *configs, "__version__"}) == sorted(finetune_nb.__all__)


def test_every_setting_of_ours_says_what_it_is():
    classes = [*reference.SECTIONS.values(), *(config_class(kind, name) for kind in KINDS for name in OUR_TYPES[kind])]
    silent = {f"{cls.__name__}.{name}" for cls in classes for name, _, _, text in reference.fields_of(cls) if not text}
    assert silent == set()
