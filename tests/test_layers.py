"""The architecture, held by a table: which file may import which. Imports are read with `ast`, those inside functions too;
what stands under TYPE_CHECKING does not count, for it never runs.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from finetune_nb.hooks import resolve

# From the bottom to the top. A file imports files of its own layer or of one below it; the edge may use the first three
# layers, nobody imports the edge (a config names it), and nobody imports the package itself but for __version__.
LAYERS = {
    "nouns": "errors html observe redaction yaml_text eval_types types component curriculum_settings run_settings config",
    "contracts": "interfaces type_names builder registry known_keys loading",
    "engine": "imports states controls journal_file live_fields tripwires curriculum preview metrics retention jsonl daemons"
    " episodes evaluation* trajectory_builder preferences trainer watch"
    " chat_tokenizer credit experience training_job job_adapter publishing"
    " run_folder stored_json trajectory_rows trajectory_table trajectory_files store_schema store_rows run_reader store"
    " rewind saved_weights run_log sinks recorder witness trial driver engine",
    "views": "sampled_tokens heat_map conversation pieces rollout_group rollout_view group_comparison"
    " columns spread_forecast learning_signal rollout_frames unfolding message_frames token_frames frames"
    " figure plot_parts distributions group_plots plots viewer preview_card comparison report export kernel display interrupts"
    " live_curve panel_html panel_inputs still panel",
    "surface": "from_functions from_folder shelf run_views run_on_disk steering run_progress helm live_run run cli demo testing",
    "edge": "backends* examples*",
}
BELOW_THE_EDGE = ("nouns", "contracts", "engine")
NAMED_EXCEPTIONS = {
    ("backends.local.tiny.make", "examples.calculator"): "a script: it makes the embedded model for that example",
    ("demo", "examples.calculator"): "the demo shows that example",
}
NAMED_BY_STRING = {
    ("interfaces", "finetune_nb.rollouts.evaluation:EvaluationRun"): "the seed's default run_eval",
    ("backends.trl.adapter", "finetune_nb.backends.local.policy:LocalPolicy"): "what TRL trains is sampled by it",
    ("backends.tinker.adapter", "finetune_nb.llms.chat_tokenizer:load_tokenizer"): "a tokenizer without its model",
    ("evaluation.openai", "finetune_nb.llms.chat_tokenizer:load_tokenizer"): "a tokenizer without its model",
    ("chat_tokenizer", "finetune_nb.llms.chat_tokenizer:response_template"): "what only transformers can compile",
    ("types", "finetune_nb.viewer:*"): "how a noun shows itself",
    ("eval_types", "finetune_nb.viewer:*"): "how a noun shows itself",
    ("preview", "finetune_nb.preview_card:*"): "how a noun shows itself",
    ("run", "finetune_nb.backends.nat.run:settings_of"): "Run.from_nat",
    (
        "backends.ray.trainer_adapter",
        "finetune_nb.run.run:close_all",
    ): "at exit Ray would go before the runs are closed",
    ("cli", "finetune_nb.backends.art_server.server:serve"): "a command",
    ("backends.art_server.server", "finetune_nb.backends.local.adapter:*"): "what it trains with",
    ("backends.nat.ours", "finetune_nb.backends.local.adapter:*"): "the backend that it offers to the Toolkit",
}
"""Objects of a higher layer, resolved when they are used. type_names.py, whose strings are what a config can name, apart."""

LONG_FILES = {"types.py": "every noun of an epoch's road, in its order"}
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "safetensors",
    "matplotlib",
    "pandas",
    "pyarrow",
    "ipywidgets",
    "numpy",
}
PRINTING = ("cli", "demo", "*.make")

PACKAGE = Path(__file__).parents[1] / "finetune_nb"


def name_of(path: Path) -> str:
    """`evaluation/evaluate.py` -> "evaluation.evaluate", `__init__.py` -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "notebooks" not in path.relative_to(PACKAGE).parts
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}


def running_nodes(node: ast.AST):
    """Every node but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for otherwise in child.orelse:
                yield otherwise
                yield from running_nodes(otherwise)
        else:
            yield child
            yield from running_nodes(child)


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """The module that `from x import y` names, with the leading dots resolved."""
    folders = ("finetune_nb", *path.relative_to(PACKAGE).parts[:-1])
    base = folders[: len(folders) - node.level + 1] if node.level else ()
    return ".".join((*base, *([node.module] if node.module else [])))


def imports_in(tree: ast.AST, path: Path) -> set[str]:
    """Modules that the tree imports; for `from package import name` both `package` and `package.name`."""
    found = set()
    for node in running_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def ours(imported: set[str]) -> set[str]:
    """Those that are files of ours. A package counts only where nothing inside it is meant."""
    names = {module.removeprefix("finetune_nb").removeprefix(".") for module in imported if is_ours(module)}
    names &= FILES.keys()
    return {name for name in names if not any(other.startswith(f"{name}." if name else "") for other in names - {name})}


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "finetune_nb"


IMPORTS = {name: imports_in(TREES[name], path) for name, path in FILES.items()}
OUR_IMPORTS = {name: ours(imported) for name, imported in IMPORTS.items()}


STRINGS = {
    (name, node.value)
    for name in FILES
    if name != "type_names"
    for node in running_nodes(TREES[name])
    if isinstance(node, ast.Constant) and re.fullmatch(r"finetune_nb(\.\w+)*:\w+", str(node.value))
}
"""Every "module:object" in the code, and the file that names it."""


def layers_of(name: str) -> list[str]:
    return [layer for layer, patterns in LAYERS.items() if any(fnmatchcase(name, p) for p in patterns.split())]


def edge_module(name: str) -> str:
    """What counts as one module of the edge: a backend or an example with all its files."""
    return ".".join(name.split(".")[:2])


def is_allowed(importer: str, imported: str) -> bool:
    if any(importer == a and imported.startswith(b) for a, b in NAMED_EXCEPTIONS):
        return True
    (layer,), (other,) = layers_of(importer), layers_of(imported)
    if other == "edge":
        return layer == "edge" and edge_module(importer) == edge_module(imported)
    if layer == "edge":
        return other in BELOW_THE_EDGE
    order = list(LAYERS)
    return order.index(other) <= order.index(layer)


# ── the picture ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_file_stands_in_exactly_one_layer():
    places = {name: layers_of(name) for name in FILES if name}
    assert {name: layers for name, layers in places.items() if len(layers) != 1} == {}


def test_the_map_that_contributing_draws_is_this_table():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn: dict[str, list[str]] = {}
    layer = ""
    for line in text.split("```")[1].splitlines()[2:]:
        layer = line[:14].strip() or layer
        drawn.setdefault(layer, []).extend(re.sub(r"\(.*?\)", "", line[14:]).replace("/", "*").split())
    assert drawn == {layer: patterns.split() for layer, patterns in LAYERS.items()}


def test_every_name_of_the_table_is_a_file():
    patterns = " ".join(LAYERS.values()).split()
    assert [p for p in patterns if not any(fnmatchcase(name, p) for name in FILES)] == []


def test_a_file_imports_its_own_layer_or_one_below_it():
    wrong = [
        f"{name} imports {imported}"
        for name in FILES
        if name
        for imported in sorted(OUR_IMPORTS[name])
        if imported and not is_allowed(name, imported)
    ]
    assert wrong == []


def test_the_picture_would_notice_a_wrong_import():
    assert not is_allowed("types", "viewer")
    assert not is_allowed("trainer", "run")
    assert not is_allowed("plots", "backends.local.policy")
    assert not is_allowed("backends.local.policy", "frames")
    assert not is_allowed("backends.local.policy", "examples.calculator.task")
    assert is_allowed("backends.local.policy", "backends.local.grpo")
    code = "def late():\n    from ..viewer import epoch_html\nif TYPE_CHECKING:\n    from ..run import Run\n"
    assert ours(imports_in(ast.parse(code), PACKAGE / "evaluation" / "new.py")) == {"viewer"}


def test_files_import_each_other_in_no_circle():
    try:
        TopologicalSorter(OUR_IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_only_the_version_is_taken_from_the_package_itself():
    taken = {
        (name, alias.name)
        for name, path in FILES.items()
        for node in running_nodes(TREES[name])
        if isinstance(node, ast.ImportFrom) and absolute(node, path) == "finetune_nb"
        for alias in node.names
        if alias.name not in FILES
    }
    assert {alias for _, alias in taken} <= {"__version__"}


def test_the_package_file_itself_imports_nothing_of_ours():
    assert OUR_IMPORTS[""] == set()


def test_every_named_exception_is_still_needed():
    unused = [
        (a, b)
        for a, b in NAMED_EXCEPTIONS
        if a not in FILES or not any(name.startswith(b) for name in OUR_IMPORTS[a] if name)
    ]
    assert unused == []


def test_objects_of_higher_layers_are_named_by_string_only_where_the_table_says_so():
    def is_named(name, string):
        return any(name == by and fnmatchcase(string, pattern) for by, pattern in NAMED_BY_STRING)

    assert {(name, string) for name, string in STRINGS if not is_named(name, string)} == set()
    assert all(any(is_named(name, string) for name, string in STRINGS if name == by) for by, _ in NAMED_BY_STRING)


@pytest.mark.parametrize("string", sorted({string for _, string in STRINGS}))
def test_every_string_that_names_an_object_leads_to_it(string):
    assert callable(resolve(string))


def test_modules_are_imported_by_name_in_three_places():
    dynamic = {
        name
        for name in FILES
        for node in running_nodes(TREES[name])
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__")
    }
    assert dynamic == {"", "observe", "type_names"}


# ── habits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_torch_and_its_kin_stay_in_the_backends():
    kin = {"torch", "transformers", "trl", "peft", "safetensors"}
    users = {name for name, imported in IMPORTS.items() if kin & {module.partition(".")[0] for module in imported}}
    assert {name for name in users if not name.startswith("backends.")} == set()
    assert users  # else this test would look at nothing


def test_nobody_imports_pyplot():
    assert [name for name, imported in IMPORTS.items() if any("pyplot" in module for module in imported)] == []


def test_only_the_command_line_prints():
    printing = {
        name
        for name in FILES
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert {name for name in printing if not any(fnmatchcase(name, p) for p in PRINTING)} == set()


def test_a_file_is_read_in_one_sitting():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()}
    assert {name: n for name, n in lengths.items() if n > 400 and name not in LONG_FILES} == {}


def test_every_file_says_first_what_it_does():
    assert [name for name, tree in TREES.items() if tree.body and not ast.get_docstring(tree)] == []


def test_importing_the_package_loads_nothing_heavy():
    names = sorted(HEAVY | {"ruamel", "pydantic", "IPython"})
    script = f"import sys, finetune_nb\nprint([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_a_config_loads_no_torch_and_no_table_or_plot_library():
    script = (
        "import sys, finetune_nb as ft\n"
        "ft.load_config({'trainers': {'t': {'_type': 'epoch_trainer'}}})\n"
        f"print([name for name in {sorted(HEAVY - {'numpy'})!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
