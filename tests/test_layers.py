"""The architecture, held by a table of folders: which file may import which. Imports are read with `ast`, those inside
functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from finetune_nb.hooks import resolve

# From the bottom to the top: a file imports files of its own row or of one above it in this table. A name with a star is
# a folder. In the rows of IN_ORDER the order of the words counts too. The edge may use the first three rows, and nobody
# imports the edge but where NAMED_EXCEPTIONS says so (a config names it); nobody imports the package itself but for
# __version__.
LAYERS = {
    "ground": "errors redaction text threads user_code hooks types",
    "contracts": "config* interfaces components* tripwires testing",
    "engine": "store* llms* rewards* rollouts* training* engine*",
    "views": "analysis* frames* plots* views* notebook*",
    "surface": "run* saving* cli* __main__ plugin_api* plugins* data_models*",
    "edge": "backends* environments* examples*",
}
IN_ORDER = ("engine", "views")
BELOW_THE_EDGE = ("ground", "contracts", "engine")
SHARED_EDGE = ("backends.local", "backends.import_guard", "environments.text", "environments.thread")
"""What others of the same folder may import: the models and their training on this machine, the loop of text environments."""
NAMED_EXCEPTIONS = {
    ("backends.nat.as_nat", "backends.trl"): "its adapter, for the Toolkit's configs",
    ("backends.local.tiny.make", "examples.calculator"): "a script: it makes the embedded model for that example",
    ("cli.demo", "examples.calculator"): "the demo shows that example",
    ("cli.main", "backends.art_server.server"): "a command",
    ("run.run", "backends.nat.run"): "Run.from_nat",
}
NAMED_BY_STRING = {
    ("components.environments", "finetune_nb.environments.*"): "what env= can name, as a config can",
    ("interfaces", "finetune_nb.rollouts.evaluation:EvaluationRun"): "the seed's default run_eval",
    ("types", "finetune_nb.views.*"): "how a noun shows itself",
    ("types", "finetune_nb.config.sections:*"): "CurriculumSettings.from_config and to_config, which are public",
    ("training.preview", "finetune_nb.views.*"): "how a noun shows itself",
    ("analysis.agreement", "finetune_nb.views.*"): "how a noun shows itself",
    ("analysis.diagnosis", "finetune_nb.views.*"): "how a noun shows itself",
    ("analysis.example_history", "finetune_nb.views.*"): "how a noun shows itself",
    ("analysis.group_comparison", "finetune_nb.views.*"): "how a noun shows itself",
    ("analysis.learning_signal", "finetune_nb.views.*"): "how a noun shows itself",
    ("analysis.rescoring", "finetune_nb.views.*"): "how a noun shows itself",
    ("analysis.run_comparison", "finetune_nb.views.*"): "how a noun shows itself",
    ("frames.search", "finetune_nb.views.*"): "how a noun shows itself",
}
"""Objects of a higher row, resolved when they are used. components/registry, whose strings are what a config can name, apart."""

MOST_FILES, MOST_MODULES = 12, 16
LONG = 900
"""Lines of a file that a test warns about."""
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
    "anywidget",
    "aiohttp",
    "numpy",
}
PRINTING = ("cli.*", "*.make")

PACKAGE = Path(__file__).parents[1] / "finetune_nb"


def name_of(path: Path) -> str:
    """`evaluation/evaluate.py` -> "evaluation.evaluate", `__init__.py` -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "notebooks" not in path.relative_to(PACKAGE).parts
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """The module that `from x import y` names, with the leading dots resolved."""
    folders = ("finetune_nb", *path.relative_to(PACKAGE).parts[:-1])
    base = folders[: len(folders) - node.level + 1] if node.level else ()
    return ".".join((*base, *([node.module] if node.module else [])))


def imports_in(tree: ast.AST, path: Path) -> set[str]:
    """Modules that the tree imports; for `from package import name` both `package` and `package.name`."""
    found = set()
    for node in ast.walk(tree):
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
    if name != "components.registry"
    for node in ast.walk(TREES[name])
    if isinstance(node, ast.Constant) and re.fullmatch(r"finetune_nb(\.\w+)*:\w+", str(node.value))
}
"""Every "module:object" in the code, and the file that names it."""


def places_of(name: str) -> list[tuple[str, int]]:
    """(row, place in the row) of each pattern of the table that has the file. A folder's star takes in its __init__."""
    return [
        (layer, place)
        for layer, patterns in LAYERS.items()
        for place, pattern in enumerate(patterns.split())
        if name == pattern.removesuffix("*") or (pattern.endswith("*") and name.startswith(f"{pattern[:-1]}."))
    ]


def edge_module(name: str) -> str:
    """What counts as one module of the edge: a backend or an example with all its files."""
    return ".".join(name.split(".")[:2])


def is_allowed(importer: str, imported: str) -> bool:
    if any(importer == a and imported.startswith(b) for a, b in NAMED_EXCEPTIONS):
        return True
    ((layer, place),), ((other, other_place),) = places_of(importer), places_of(imported)
    if other == "edge":
        return layer == "edge" and (
            edge_module(importer) == edge_module(imported)
            or (importer.partition(".")[0] == imported.partition(".")[0] and imported.startswith(SHARED_EDGE))
        )
    if layer == "edge":
        return other in BELOW_THE_EDGE
    if layer == other and layer in IN_ORDER:
        return other_place <= place
    order = list(LAYERS)
    return order.index(other) <= order.index(layer)


# ── the picture ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_file_stands_in_exactly_one_layer():
    places = {name: places_of(name) for name in FILES if name}
    assert {name: found for name, found in places.items() if len(found) != 1} == {}


def test_the_map_that_contributing_draws_is_this_table():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn: dict[str, list[str]] = {}
    for line in text.split("```")[1].splitlines()[2:]:
        layer, _, names = line.strip().partition(" ")
        drawn[layer] = re.sub(r"\(.*?\)", "", names).replace("/", "*").split()
    assert drawn == {layer: patterns.split() for layer, patterns in LAYERS.items()}


def test_the_files_that_contributing_names_exist():
    """Its table "to find, open" leads somewhere: each path is a file or a folder of the package, or of the checkout."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| to find | open |")[1].split("\n\n")[0]
    paths = re.findall(r"`([\w./]+/[\w./]*|[\w]+\.py)`", table)
    assert len(paths) > 20
    assert [path for path in paths if not ((PACKAGE / path).exists() or (PACKAGE.parent / path).exists())] == []


def test_every_name_of_the_table_is_a_file_or_a_folder():
    patterns = " ".join(LAYERS.values()).split()
    assert [p for p in patterns if p.removesuffix("*") not in FILES] == []


def test_the_folders_are_the_map():
    """`ls finetune_nb` is the map: few files, and no folder that cannot be read at a glance."""
    assert len([name for name in FILES if "." not in name and FILES[name].name != "__init__.py"]) < MOST_FILES
    sizes: dict[str, int] = {}
    for path in FILES.values():
        folder = path.parent.relative_to(PACKAGE).as_posix()
        sizes[folder] = sizes.get(folder, 0) + (path.name != "__init__.py")
    assert {folder: size for folder, size in sizes.items() if size > MOST_MODULES} == {}


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
    assert not is_allowed("types", "views.summary")
    assert not is_allowed("training.trainer", "run.run")
    assert not is_allowed("store.store", "training.batch")
    assert not is_allowed("analysis.learning_signal", "views.html")
    assert not is_allowed("plots.curves", "backends.local.policy")
    assert not is_allowed("backends.local.policy", "frames.epochs")
    assert not is_allowed("backends.local.policy", "backends.trl.adapter")
    assert not is_allowed("backends.local.policy", "examples.calculator.task")
    assert is_allowed("backends.local.policy", "backends.local.grpo")
    assert is_allowed("backends.trl.adapter", "backends.local.policy")
    assert is_allowed("training.batch", "store.store")
    code = "def late():\n    from ..views.summary import epoch_html\nif TYPE_CHECKING:\n    from ..run.run import Run\n"
    found = ours(imports_in(ast.parse(code), PACKAGE / "rollouts" / "new.py"))
    assert found == {"views.summary", "run.run"}


def test_files_import_each_other_in_no_circle():
    try:
        TopologicalSorter(OUR_IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_folders_import_each_other_in_no_circle():
    folders: dict[str, set[str]] = {}
    for name in filter(None, FILES):
        here = name.partition(".")[0]
        there = {imported.partition(".")[0] for imported in OUR_IMPORTS[name] if imported}
        folders.setdefault(here, set()).update(there - {here})
    try:
        TopologicalSorter(folders).prepare()
    except CycleError as error:
        pytest.fail(f"folders import each other in a circle: {' -> '.join(error.args[1])}")


def test_only_the_version_is_taken_from_the_package_itself():
    taken = {
        (name, alias.name)
        for name, path in FILES.items()
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and absolute(node, path) == "finetune_nb"
        for alias in node.names
        if alias.name not in FILES
    }
    assert {alias for _, alias in taken} <= {"__version__"}


def test_the_package_file_itself_imports_nothing_of_ours_when_it_runs():
    running = ast.Module([node for node in TREES[""].body if not isinstance(node, ast.If)], [])
    assert ours(imports_in(running, FILES[""])) == set()


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


def test_modules_are_imported_by_name_in_four_places():
    dynamic = {
        name
        for name in FILES
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__")
    }
    assert dynamic == {"", "hooks", "components.registry", "cli.train"}


# ── habits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_torch_and_its_kin_stay_in_the_backends():
    kin = {"torch", "transformers", "trl", "peft", "safetensors"}
    users = {name for name, imported in IMPORTS.items() if kin & {module.partition(".")[0] for module in imported}}
    assert {name for name in users if not name.startswith("backends.")} == {
        "llms.chat_tokenizer",
        "environments.trl",
    }
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


def test_a_file_holds_one_subject():
    """No limit cuts a subject in two; a very long file is worth a second look."""
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    long = {name: lines for name, lines in lengths.items() if lines > LONG}
    if long:
        warnings.warn(f"files of more than {LONG} lines: {long}", stacklevel=1)


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
