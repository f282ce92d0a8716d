"""Writes `notebooks/reference/`: every setting of a config, and every public name, from the docstrings in the code.

    python tests/reference.py

`test_reference.py` fails while what is there is not what this would write.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import finetune_nb
from finetune_nb import config, frames, tripwires
from finetune_nb.components.registry import KINDS, OUR_TYPES, config_class

FOLDER = Path(__file__).parents[1] / "notebooks" / "reference"
SECTIONS = {
    "finetuning": config.FinetuneConfig,
    "finetuning.curriculum_learning": config.CurriculumLearningConfig,
    "finetuning.reward_function": config.RewardFunctionConfig,
    "finetuning.run_configuration": config.FinetuneRunConfig,
    "eval": config.EvalConfig,
    "eval.general": config.EvalGeneralConfig,
    "eval.general.dataset.structure": config.EvalDatasetStructureConfig,
    "run": config.RunSettings,
    "run.ray": config.RaySettings,
    "run.gateway": config.GatewaySettings,
    "run.environment": config.EnvironmentSettings,
}
PLACES = {
    "llm_provider": "llms",
    "function": "workflow",
    "evaluator": "eval.evaluators",
    "dataset": "eval.general.dataset",
    "trajectory_builder": "trajectory_builders",
    "trainer_adapter": "trainer_adapters",
    "trainer": "trainers",
}
GROUPS = {
    "The notebook": "Run compare runs load_config run_sync enable_nested_asyncio CurriculumSettings",
    "Rewards": "group_reward from_trl judge label_reward length_penalty overlong_penalty retrying step_rewards",
    "Where numbers go": "MetricsSink JsonlSink WandbSink",
    "Contracts of components": "TrajectoryBuilder TrainerAdapter Trainer Policy Environment Builder BaseEvaluator EvaluatorInfo"
    " FunctionInfo Context push_step episode_from_steps",
    "Registering components": "register_trajectory_builder register_trainer_adapter register_trainer register_evaluator"
    " register_function register_llm_provider",
    "Components that come with it": "EvalTrajectoryBuilder EpochTrainer EvaluationRun",
    "Records": "Epoch Trajectory EpisodeItem EpisodeItemRole DPOItem RolloutFailure TrajectoryCollection TrainingJobRef"
    " TrainingJobStatus TrainingStatusEnum Validation WarmUp RowError Demonstrations Demonstration WarmUpSettings LLMCall"
    " SamplingParams OpenAIMessage IntermediateStep"
    " IntermediateStepPayload IntermediateStepType StreamEventData TTCEventData EvalInput"
    " EvalInputItem EvalOutput EvalOutputItem EvaluationRunConfig EvaluationRunOutput",
    "Errors": "FinetuneError ConfigError DatasetError MissingExtra RunError EpochAborted StoreError WorkflowError RolloutTimeout"
    " BackendError JobFailed MissingLogprobs StalePolicy UnknownJob",
}
"""Config classes are in config.md."""
MODULES = (frames, tripwires)
"""Modules whose functions are public as well."""


# ── what stands in the code ──────────────────────────────────────────────────────────────────────────────────────────


@cache
def own_notes(cls: type) -> dict[str, tuple[str, str]]:
    """Attribute -> (annotation, text below it), of those that the class's own body declares."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    notes = {}
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            below = after.value if isinstance(after, ast.Expr) else None
            text = below.value if isinstance(below, ast.Constant) and isinstance(below.value, str) else ""
            annotation, shared = _shared(cls, ast.unparse(node.annotation))
            notes[node.target.id] = (annotation, inspect.cleandoc(text) or shared)
    return notes


def _shared(cls: type, annotation: str) -> tuple[str, str]:
    """(type, text) of an annotation that is the name of an `Annotated` type with a text, which several classes use. Any
    other annotation as it is, without a text."""
    found = getattr(inspect.getmodule(cls), annotation, None)
    if get_origin(found) is not Annotated:
        return annotation, ""
    return inspect.formatannotation(get_args(found)[0]), FieldInfo.from_annotation(found).description or ""


def notes_of(cls: type) -> dict[str, tuple[str, str]]:
    """The same with what is inherited, a subclass's words before its base's."""
    notes: dict[str, tuple[str, str]] = {}
    for base in (base for base in reversed(cls.__mro__) if base.__module__.startswith("finetune_nb")):
        for name, (annotation, text) in own_notes(base).items():
            notes[name] = (annotation, text or notes.get(name, ("", ""))[1])
    return notes


NEW = "new each time"


def _default(field: FieldInfo) -> Any:
    """A number or a text that is made by a factory is a time or an id."""
    default = field.get_default(call_default_factory=True)
    return NEW if field.default_factory is not None and isinstance(default, float | str) else default


def fields_of(cls: type) -> list[tuple[str, str, str, str]]:
    """(name, type, default, text) of each public field, in order. A default of "" is none: the field is required."""
    notes, rows = notes_of(cls), []
    if issubclass(cls, BaseModel):
        fields = {name: (_default(field), field) for name, field in cls.model_fields.items()}
    else:
        fields = {field.name: (default_of(field), None) for field in dataclasses.fields(cls)}
    for name, (default, field) in fields.items():
        if name.startswith("_") or getattr(field, "serialization_alias", None) == "_type":
            continue
        annotation, text = notes.get(name, ("", ""))
        live = field is not None and isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("live")
        rows.append((name, plain_type(annotation), shown(default), f"{text} Live.".strip() if live else text))
    return rows


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return PydanticUndefined if field.default is dataclasses.MISSING else field.default


def plain_type(annotation: str) -> str:
    """An annotation as a reader of the config needs it."""
    found = re.sub(r"SerializeAsAny\[((?:[^\[\]]|\[[^\]]*\])*)\]", r"\1", annotation)
    literal = re.fullmatch(r"Literal\[(.*)\]( \| None)?", found)
    return literal[1].replace(", ", " or ") + (literal[2] or "").replace("|", "or") if literal else found


def shown(default: Any) -> str:
    if default is PydanticUndefined:
        return ""
    if default is NEW:
        return NEW
    if isinstance(default, enum.Enum):
        return repr(default.value)
    if isinstance(default, BaseModel) or dataclasses.is_dataclass(default):
        return "its defaults"
    return repr(str(default)) if isinstance(default, Path) else repr(default)


# ── Markdown ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def table(cls: type) -> str:
    rows = fields_of(cls)
    if not rows:
        return ""
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, annotation, default, text in rows:
        code = f"`{cell(default)}`" if default and default != "its defaults" else default or "required"
        lines.append(f"| `{name}` | {f'`{cell(annotation)}`' if annotation else ''} | {code} | {cell(text)} |")
    return "\n".join(lines)


def prose(documented: Any) -> str:
    """A docstring as Markdown: its indented parts are code or lists that stay as they are."""
    text = documented if isinstance(documented, str) else inspect.getdoc(documented) or ""
    parts = []
    for part in re.split(r"\n\n", text.strip()):
        lines = part.splitlines()
        if lines and lines[0] in SECTIONS_OF_A_DOCSTRING:
            parts.append(section(lines[0].removesuffix(":"), textwrap.dedent("\n".join(lines[1:])).splitlines()))
        elif all(line.startswith("    ") for line in lines if line):
            parts.append(f"```python\n{textwrap.dedent(part)}\n```")
        elif lines and lines[0].startswith("===="):
            parts.append(f"```text\n{part}\n```")
        elif len(lines) > 1 and all(_ARGUMENT.match(line) or line.startswith(" ") for line in lines):
            parts.append(listed(lines))
        else:
            parts.append(part.replace("\n", " "))
    return "\n\n".join(parts)


SECTIONS_OF_A_DOCSTRING = ("Args:", "Returns:", "Yields:", "Raises:")


def section(title: str, lines: list[str]) -> str:
    """`Args:`, `Returns:` or `Raises:` of a docstring, with its lines: a list, or one sentence after the title."""
    if title in ("Returns", "Yields"):
        return f"**{title}:** {' '.join(lines)}"
    return f"**{title}:**\n\n{listed(lines)}"


_ARGUMENT = re.compile(r"([\w, *\"]+): ")


def listed(lines: list[str]) -> str:
    """Lines of `name: what it is`, those that go on being indented -> a list."""
    items: list[str] = []
    for line in lines:
        if items and line.startswith(" "):
            items[-1] += f" {line.strip()}"
        else:
            items.append(line)
    return "\n".join("- " + _ARGUMENT.sub(r"`\1`: ", item, count=1) for item in items)


def heading(level: int, name: str, called: Any) -> str:
    """A heading with the signature, or with the signature below it where that is long."""
    found = inspect.signature(called)
    named = [parameter for parameter in found.parameters.values() if parameter.name not in ("self", "cls")]
    parameters = [parameter.replace(annotation=_bare(parameter.annotation)) for parameter in named]
    before = "await " if inspect.iscoroutinefunction(called) else ""
    bare = found.replace(parameters=parameters, return_annotation=_bare(found.return_annotation))
    text = f"{before}{name}{bare}"
    if len(text) <= 100:
        return f"{'#' * level} `{text}`"
    stars = ["*"] * any(p.kind is p.KEYWORD_ONLY for p in parameters)
    first = next((n for n, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), len(parameters))
    lines = [*map(str, parameters[:first]), *stars, *map(str, parameters[first:])]
    returns = str(bare).rpartition(") -> ")[2] if bare.return_annotation is not bare.empty else None
    body = "".join(f"    {line},\n" for line in lines)
    return f"{'#' * level} `{name}`\n\n```python\n{before}{name}(\n{body}){f' -> {returns}' if returns else ''}\n```"


class _Written(str):
    """An annotation that shows itself as it is written."""

    def __repr__(self) -> str:
        return str(self)


def _bare(annotation: Any) -> Any:
    return _Written(annotation) if isinstance(annotation, str) else annotation


def members(cls: type) -> list[str]:
    """Public methods and properties, of the class and of its bases here, each once, in the order of the code."""
    lines, seen = [], set()
    bases = [base for base in cls.__mro__ if base.__module__.startswith("finetune_nb")]
    for base in bases:
        for name, member in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            inner = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            documented = getattr(cls, name).__doc__ if callable(inner) or isinstance(inner, property) else None
            if isinstance(inner, property) and documented:
                lines.append(f"#### `.{name}`\n\n{prose(inspect.cleandoc(documented))}")
            elif inspect.isfunction(inner):
                lines.append(f"{heading(4, f'.{name}', inner)}\n\n{prose(inspect.cleandoc(documented or ''))}".strip())
    return lines


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────

MADE = "<!-- Made by tests/reference.py from the docstrings in the code. -->"


def config_page() -> str:
    parts = [
        f"# Config\n\n{MADE}",
        "The sections of a config file, as `ft.Run.from_config` and `ft.load_config` read it: `llms`, `workflow`, `eval`, "
        "`trajectory_builders`, `trainer_adapters`, `trainers`, `finetuning`, `run`. A setting marked *Live* can be changed "
        "while a run is under way (`run.live`, `run.panel()`). `${NAME}` is filled from the environment.",
    ]
    for place, cls in SECTIONS.items():
        parts.append(f"## `{place}`\n\n{prose(cls)}\n\n{table(cls)}")
    for kind in KINDS:
        parts.append(f"## `{PLACES[kind]}`: {kind.replace('_', ' ')}s")
        for name in OUR_TYPES[kind]:
            cls = config_class(kind, name)
            parts.append(f"### `_type: {name}`\n\n{prose(cls)}\n\n{table(cls)}".rstrip())
            for inner in inner_models(cls):
                parts.append(f"#### `{inner.__name__}`\n\n{prose(inner)}\n\n{table(inner)}")
    return "\n\n".join(parts) + "\n"


def inner_models(cls: type[BaseModel]) -> list[type[BaseModel]]:
    """Models that stand in a field of this one and in no section of their own, such as an adapter's LoRA settings."""
    found = []
    for name, field in cls.model_fields.items():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel) and name in own_notes(cls):
                found.append(part)
    return [model for model in found if model not in SECTIONS.values()]


def api_page() -> str:
    parts = [
        f"# The public names\n\n{MADE}",
        "`import finetune_nb as ft`, then `ft.NAME`. Settings are in [config.md](config.md).",
    ]
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        parts += [entry(name, getattr(finetune_nb, name)) for name in names.split()]
    for module in MODULES:
        parts.append(f"## `{module.__name__}`\n\n{prose(module)}")
        named = {name: getattr(module, name) for name in module.__all__}
        parts += [entry(name, found) for name, found in named.items() if inspect.isfunction(found)]
    return "\n\n".join(parts) + "\n"


def entry(name: str, documented: Any) -> str:
    if inspect.isfunction(documented):
        return f"{heading(3, name, documented)}\n\n{prose(documented)}"
    if not inspect.isclass(documented):
        return f"### `{name}`"
    parts = [f"### `{name}`", prose(inspect.cleandoc(documented.__doc__ or ""))]
    if documented is finetune_nb.Run:
        parts[0] = heading(3, name, documented.__init__)
    if issubclass(documented, enum.Enum):
        parts.append(", ".join(f"`{member.value}`" for member in documented))
    elif issubclass(documented, BaseModel) or dataclasses.is_dataclass(documented):
        parts.append(table(documented))
    if not issubclass(documented, BaseException | enum.Enum):
        parts += members(documented)
    return "\n\n".join(part for part in parts if part)


def pages() -> dict[str, str]:
    """File name -> text."""
    return {"config.md": config_page(), "api.md": api_page()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
