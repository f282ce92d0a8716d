"""What a config holds: the finetuning and evaluation sections, and `Config` itself.

Names, defaults and validators are those of nvidia-nat-core 1.9.0, so that a dump of one validates as the other; what is
stricter or ours alone says so.
"""

from __future__ import annotations

import copy
import dataclasses
import html
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    SerializeAsAny,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from ..errors import did_you_mean
from ..redaction import MASK, SHORTEST_SECRET, KeyPath, is_text, names_credential, plain_data, redact_text
from ..types import (
    CurriculumSettings,
    Enabled,
    ExpansionInterval,
    IncrementPercentile,
    MinRewardDiff,
    Percentile,
    RandomSubsample,
    SortAscending,
)
from .base import (
    EvalDatasetBaseConfig,
    EvaluatorBaseConfig,
    FunctionBaseConfig,
    LLMBaseConfig,
    RewardFunctionConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
)
from .yaml import dump_yaml

__all__ = [
    "Config",
    "CurriculumLearningConfig",
    "EvalConfig",
    "EnvironmentSettings",
    "EvalGeneralConfig",
    "FinetuneConfig",
    "FinetuneRunConfig",
    "GatewaySettings",
    "Placeholder",
    "RaySettings",
    "RunSettings",
    "section_of",
    "settings_from",
]


class CurriculumLearningConfig(BaseModel):
    """Which groups of an epoch are kept: those whose rewards differ, the best `percentile` of them first. NAT checks
    the limits of neither `min_reward_diff` nor `random_subsample`."""

    enabled: Enabled = False
    initial_percentile: Percentile = 0.3
    """Share of the groups with spread that the first epochs train on, in (0, 1]."""
    increment_percentile: IncrementPercentile = 0.2
    expansion_interval: ExpansionInterval = 5
    min_reward_diff: MinRewardDiff = 0.1
    sort_ascending: SortAscending = False
    random_subsample: RandomSubsample = None


def settings_from(config: CurriculumLearningConfig) -> CurriculumSettings:
    """The settings with which a run of this section starts."""
    values = config.model_dump()
    percentile = values.pop("initial_percentile")
    return CurriculumSettings(percentile=percentile, **values)


def section_of(settings: CurriculumSettings, initial_percentile: float) -> CurriculumLearningConfig:
    """The settings as a section, for a Trainer that knows no other form. It has no field for `percentile` and `schedule`.

    Args:
        settings: The curriculum at one moment of a run.
        initial_percentile: Where the run started.
    """
    values = dataclasses.asdict(settings)
    del values["percentile"], values["schedule"]
    return CurriculumLearningConfig(initial_percentile=initial_percentile, **values)


ENGINES = ("local", "ray")


class RaySettings(BaseModel):
    """The `run.ray` section: what a run takes of a Ray cluster. It counts with `engine: ray` alone."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    workers: int | None = Field(default=None, ge=1)
    """Processes that roll out. None: one for each CPU of the cluster, or for what `worker_gpus` leaves room for, and no more
    than rollouts at once."""
    worker_cpus: float = Field(default=0.5, gt=0)
    """CPUs that the cluster sets aside for one worker: little, where agents mostly wait for a model elsewhere."""
    worker_gpus: float = Field(default=0, ge=0)
    """GPUs for one worker, where it samples from a replica of the policy."""
    trainer: bool = False
    """Whether `local_grpo` trains in a process of the cluster, which lives on when the kernel is killed. Otherwise training
    stays in the kernel."""
    trainer_cpus: float = Field(default=1, gt=0)
    """CPUs that the cluster sets aside for the trainer."""
    trainer_gpus: float | None = Field(default=None, ge=0)
    """GPUs for the trainer. None: one where the cluster has any."""
    tries: int = Field(default=3, ge=1)
    """How often a rollout is begun where its worker is lost each time, before it counts as failed."""
    start_timeout: float = Field(default=300.0, gt=0)
    """Seconds that workers and trainer may take to start, waiting for what others have of the cluster included."""
    orphan_timeout: float | None = Field(default=3600.0, gt=0)
    """Seconds after which the trainer's process ends by itself and frees its CPUs and GPUs: counted from when it last heard of a
    kernel, or from the end of the job that it was working on. Then the run continues from the newest checkpoint. None: never."""
    runtime_env: dict[str, Any] = {}
    """Ray's own: `working_dir`, `py_modules`, `pip`, `env_vars` of workers and trainer, for modules that the cluster does not
    have."""


class GatewaySettings(BaseModel):
    """The `run.gateway` section: how requests of client libraries are answered."""

    model_config = ConfigDict(extra="forbid")

    ignore: list[str] = []
    """Parameters of requests that are left out of account, by the names that the client's API has for them, such as "verbosity"
    or "reasoning". Each turn's record names what was ignored."""

    @field_validator("ignore")
    @classmethod
    def check_ignore(cls, names: list[str]) -> list[str]:
        needed = sorted(NEEDED_IN_REQUESTS & set(names))
        if needed:
            raise ValueError(f"found {', '.join(needed)} in ignore; a request without it is none. Name options alone")
        return names


NEEDED_IN_REQUESTS = frozenset({"input", "messages", "previous_response_id", "prompt", "stream", "system", "tools"})
"""What no run can ignore."""


class EnvironmentSettings(BaseModel):
    """The `run.environment` section: somebody else's environment, from which agent, reward and dataset come where they are not
    given by themselves. A component of `_type: environment` is the environment's own."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """Its kind and name, such as "reasoning_gym:basic_arithmetic"; of an object its class."""
    is_object: bool = False
    """Whether it was given as an object or a class, which no file can hold."""
    options: dict[str, Any] = {}
    """What Run takes as `env_options`."""


class RunSettings(BaseModel):
    """The `run` section. Ours alone."""

    model_config = ConfigDict(extra="forbid")

    engine: str = "local"
    """Where the work is done. "local": in this process. "ray": on a Ray cluster of this machine, which is started where
    none runs in this process yet; "ray:auto": on the cluster that this machine belongs to; "ray:HOST:PORT": on that one."""
    ray: RaySettings = RaySettings()
    """What it takes of a Ray cluster."""
    gateway: GatewaySettings = GatewaySettings()
    """How requests of client libraries are answered."""
    environment: EnvironmentSettings | None = None
    """Where agent, reward and dataset come from; None: they are given."""
    seed: int = Field(default=0, ge=0)
    """Of every draw and every sampled token."""
    deterministic: bool = False
    """True: a repeat is equal to the last digit, at the price of waiting for the slowest rollout of a batch."""
    checkpoint_every: int = Field(default=1, ge=0)
    """Epochs between checkpoints of the weights; a run that is killed continues after the newest one. 0: none is written, and
    it cannot be continued."""
    keep_checkpoints: int | None = Field(default=None, ge=1)
    """The newest ones that are kept, beside the one that validated best and those that runs were forked from. None: as
    many as take 500 MB together, at least 2."""

    @field_validator("engine")
    @classmethod
    def check_engine(cls, engine: str) -> str:
        kind, _, address = engine.partition(":")
        if kind not in ENGINES or (kind == "local" and engine != kind):
            raise ValueError(f"there is no engine {engine!r}. {did_you_mean(engine, ENGINES)}")
        if "://" in address:
            raise ValueError(
                f"found engine {engine!r}; expected 'ray', 'ray:auto' or 'ray:HOST:PORT'. Ray Client (ray://) is too slow for "
                "rollouts: start the kernel on a machine of the cluster, and take 'ray:auto'"
            )
        return engine

    @property
    def engine_kind(self) -> str:
        """The engine without its address."""
        return self.engine.partition(":")[0]

    @property
    def trains_elsewhere(self) -> bool:
        """Whether the engine trains, too."""
        return self.engine_kind == "ray" and self.ray.trainer


# ── finetuning ───────────────────────────────────────────────────────────────────────────────────────────────────────


class FinetuneRunConfig(BaseModel):
    """What a run is started with: in NAT these are arguments of the command line."""

    config_file: Path | BaseModel = None  # type: ignore[assignment]  # as in NAT
    """A config to evaluate with, as a file or a Config."""
    dataset: str | Path | None = None
    """Overrides the config's dataset."""
    result_json_path: str = "$"
    """Where the answer is in what a remote workflow returns; kept for the Toolkit, not used here."""
    endpoint: str | None = None
    """Always None when loaded from YAML: NAT can run a remote workflow, finetune_nb cannot."""
    endpoint_timeout: int = 300
    """Seconds, of that remote workflow."""
    override: tuple[tuple[str, str], ...] = ()
    """Pairs of dotted path and value, put into the config before it is read."""
    validation_dataset: str | Path | None = None
    """Rows to validate on, as a file; None: no validation."""
    validation_interval: int = Field(default=5, ge=1)
    """Epochs between two validations."""
    validation_config_file: str | Path | None = None
    """A config to validate with in place of this one."""

    @field_validator("config_file", mode="wrap")
    @classmethod
    def allow_none(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        # None is the default, so a dump holds it; the annotation alone would refuse to read it back.
        return None if value is None else handler(value)


class FinetuneConfig(BaseModel):
    """The `finetuning` section."""

    enabled: bool = False
    """Whether the three components below must be named. A `Run` trains either way."""
    trainer: str | None = None
    """A name of the `trainers` section; so with the next two."""
    trajectory_builder: str | None = None
    """What turns rollouts of the workflow into trajectories."""
    trainer_adapter: str | None = None
    """What trains the model, and usually what it is sampled from."""
    reward_function: RewardFunctionConfig | None = None
    """The evaluator whose score is the reward; a component that names its own comes first. None: the only one there is."""
    target_functions: list[str] = ["<workflow>"]
    """Only model calls made inside these functions make a trajectory: names of the section `functions`; "<workflow>" is the
    workflow itself, without the functions that it calls."""
    target_model: str | None = None
    """Only calls of this llm make a trajectory, by its name in the section `llms`; None: every call. The name of its trainer
    adapter, or of its model, is taken too where a single llm has it."""
    curriculum_learning: CurriculumLearningConfig = CurriculumLearningConfig()
    """Which groups of an epoch are kept to be trained on."""
    num_epochs: int = Field(default=1, ge=1)
    """Epochs that are planned; more or fewer can be run."""
    output_dir: Path = Path("./.tmp/nat/finetuning/")
    """Each run makes a folder of its own in it."""
    run_configuration: FinetuneRunConfig | None = None
    """What `nat finetune` takes on its command line: datasets, validation."""

    @model_validator(mode="before")
    @classmethod
    def validate_finetuning_enabled(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("enabled", False):
            missing = [
                name for name in ("trainer", "trajectory_builder", "trainer_adapter") if values.get(name) is None
            ]
            if missing:
                raise ValueError(f"When fine-tuning is enabled, the following fields must be set: {', '.join(missing)}")
        return values


# ── evaluation, run ──────────────────────────────────────────────────────────────────────────────────────────────────


class EvalGeneralConfig(BaseModel):
    """The `eval.general` section: what is evaluated, and how many at once."""

    max_concurrency: int = Field(default=8, ge=1, json_schema_extra={"live": "rollouts"})
    """Rollouts at one time."""
    workflow_alias: str | None = None
    """Kept for the Toolkit, not used here."""
    output_dir: Path = Path("./.tmp/nat/examples/default/")
    """Kept for the Toolkit; a run writes into `finetuning.output_dir`."""
    dataset: SerializeAsAny[EvalDatasetBaseConfig] | None = None
    """The rows that the workflow is run on."""
    item_timeout: float | None = Field(default=None, gt=0)
    """Seconds that a rollout may take; None: as long as it likes. Ours alone."""
    retries: int = Field(default=0, ge=0)
    """Attempts after a transient failure (a timeout, a lost connection). Ours alone."""


class EvalConfig(BaseModel):
    """The `eval` section."""

    general: EvalGeneralConfig = Field(default_factory=EvalGeneralConfig)
    """The dataset, and how it is run."""
    evaluators: dict[str, SerializeAsAny[EvaluatorBaseConfig]] = Field(default_factory=dict)
    """What scores the rollouts, by name."""


def overlap_problem(run: RunSettings, staleness: int) -> str | None:
    """What speaks against sampling an epoch while the epoch before it trains, whatever the backend; None: nothing does.

    Args:
        run: How the run works.
        staleness: `max_staleness` of the trainer adapter.
    """
    if staleness > 1:
        return f"found max_staleness {staleness}; expected 0, or 1: the next epoch alone is sampled while one trains"
    if staleness and run.deterministic:
        return (
            "found max_staleness 1 with run.deterministic; what is sampled while a job trains depends on when the run was begun "
            "and continued, so that a repeat would not be equal. Set one of the two to 0 or False"
        )
    if staleness and run.engine_kind != "local":
        return (
            f"found max_staleness 1 with engine {run.engine!r}; a worker holds one version of the weights. Set it to 0"
        )
    return None


def _models_of(llm: LLMBaseConfig) -> tuple[Any, Any]:
    """What an llm's config says that it is sampled from."""
    return getattr(llm, "adapter", None), getattr(llm, "model_name", None)


NAMED = {
    "trainer": "trainers",
    "trajectory_builder": "trajectory_builders",
    "trainer_adapter": "trainer_adapters",
    "reward_function.name": "eval.evaluators",
}
"""Field of `finetuning` -> the section in which the name that it has must be."""


def unknown_names(named: Mapping[str, str | None], sections: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """Find names in `finetuning` that no section has.

    Args:
        named: Field of NAMED -> the name that it has; None: none.
        sections: Field of NAMED -> the names that there are.

    Returns:
        Field and what is wrong, of each mistake.
    """
    found = []
    for field, title in NAMED.items():
        name, known = named.get(field), sections[field]
        if name is not None and name not in known:
            found.append((field, f"{name!r} is not one of {title}. {did_you_mean(str(name), known)}"))
    return found


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Placeholder:
    """What stood where a value came from the environment."""

    template: str
    """The text as written, `${NAME}` and all."""
    value: Any = dataclasses.field(repr=False)
    """What became of it."""
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    """Values of the variables in the template whose name, or whose key, names a credential, by variable."""


class Config(BaseModel):
    """A whole config. Components are config instances here; `load_config` makes them from YAML or a dict."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    llms: dict[str, SerializeAsAny[LLMBaseConfig]] = Field(default_factory=dict)
    functions: dict[str, SerializeAsAny[FunctionBaseConfig]] = Field(default_factory=dict)
    workflow: SerializeAsAny[FunctionBaseConfig] | None = None
    eval: EvalConfig = Field(default_factory=EvalConfig)
    trajectory_builders: dict[str, SerializeAsAny[TrajectoryBuilderConfig]] = Field(default_factory=dict)
    trainer_adapters: dict[str, SerializeAsAny[TrainerAdapterConfig]] = Field(default_factory=dict)
    trainers: dict[str, SerializeAsAny[TrainerConfig]] = Field(default_factory=dict)
    finetuning: FinetuneConfig = Field(default_factory=FinetuneConfig)
    run: RunSettings = Field(default_factory=RunSettings)

    _builder: Any = PrivateAttr(default=None)
    _placeholders: dict[KeyPath, Placeholder] = PrivateAttr(default_factory=dict)
    _received: bool = PrivateAttr(default=False)  # somebody else wrote it: no component is built from it

    @property
    def builder(self) -> Any:
        """The live components, while a run holds them. Copies of the config share it."""
        return self._builder

    @builder.setter
    def builder(self, builder: Any) -> None:
        self._builder = builder

    @property
    def llm_of_workflow(self) -> str | None:
        """The llm that the workflow asks: the one that it names, or the only one that there is; None: none, or not clear."""
        return getattr(self.workflow, "llm", None) or (next(iter(self.llms)) if len(self.llms) == 1 else None)

    def name_of_llm(self, config: LLMBaseConfig) -> str | None:
        """Find the name of an llm.

        Args:
            config: That very object in the section `llms`.

        Returns:
            Its name; None if it is not there.
        """
        return next((name for name, llm in self.llms.items() if llm is config), None)

    def llms_of_model(self, name: str) -> list[str]:
        """Find the llms that are sampled from one model.

        Args:
            name: Of the trainer adapter, or of the model.

        Returns:
            The names of the llms, in the config's order.
        """
        return [llm for llm, config in self.llms.items() if name in _models_of(config)]

    def problems(self) -> list[tuple[KeyPath, str]]:
        """Find what does not fit together when finetuning is enabled: names that are in no section, a curriculum under which
        nothing could train.

        Returns:
            The path of each mistake, and what is wrong.
        """
        tuning = self.finetuning
        found: list[tuple[KeyPath, str]] = []
        for name in ("workflow", "<workflow>"):
            if name in self.functions:
                problem = (
                    f"{name!r} is the name of the workflow, which would be called in this function's place. Rename it"
                )
                found.append((("functions", name), problem))
        if not tuning.enabled:
            return found
        if self.run.deterministic and self.run.engine_kind != "local":
            problem = (
                f"found deterministic with engine {self.run.engine!r}; which rollouts share a batch, and so the last digit, "
                "depends there on which worker is free. Take engine 'local', or leave deterministic out"
            )
            found.append((("run", "deterministic"), problem))
        adapter = self.trainer_adapters.get(tuning.trainer_adapter or "")
        staleness = getattr(adapter, "max_staleness", 0)
        if adapter is not None and staleness:
            problem = overlap_problem(self.run, staleness) or adapter.overlap_problem()
            if problem is not None:
                found.append((("trainer_adapters", tuning.trainer_adapter or "", "max_staleness"), problem))
        named = {
            "trainer": tuning.trainer,
            "trajectory_builder": tuning.trajectory_builder,
            "trainer_adapter": tuning.trainer_adapter,
            "reward_function.name": getattr(tuning.reward_function, "name", None),
        }
        sections = (self.trainers, self.trajectory_builders, self.trainer_adapters, self.eval.evaluators)
        for field, problem in unknown_names(named, dict(zip(NAMED, sections, strict=True))):
            found.append((("finetuning", *field.split(".")), problem))
        for place, function in enumerate(tuning.target_functions if self.workflow is not None else ()):
            if function != "<workflow>" and function not in self.functions:
                known = ["<workflow>", *self.functions]
                problem = f"{function!r} is not one of functions. {did_you_mean(function, known)}"
                found.append((("finetuning", "target_functions", place), problem))
        target = tuning.target_model
        if target is not None and self.llms and target not in self.llms:
            meant = self.llms_of_model(target)
            problem = f"{target!r} is not one of llms. {did_you_mean(target, self.llms)}"
            if len(meant) > 1:
                problem = f"{target!r} is what {', '.join(map(repr, meant))} are sampled from. Name one of these llms"
            if len(meant) != 1:
                found.append((("finetuning", "target_model"), problem))
        builder, curriculum = self.trajectory_builders.get(tuning.trajectory_builder or ""), tuning.curriculum_learning
        single = getattr(builder, "num_generations", None) == 1
        if single and curriculum.enabled and curriculum.min_reward_diff > 0:
            problem = (
                "1 rollout an example has no spread of rewards, so the curriculum would leave every group out and "
                "nothing could train. Set num_generations to at least 2, or curriculum_learning.min_reward_diff to 0"
            )
            found.append((("trajectory_builders", tuning.trajectory_builder or "", "num_generations"), problem))
        return found

    def stored(self) -> dict[str, Any]:
        """This config as plain data for a YAML file, which `load_config` reads back.

        Returns:
            The data. `${NAME}` is written where it was read, and other credentials are asterisks.
        """
        named: dict[str, str] = {}  # a secret -> the text written for it, wherever it occurs

        def collect(path: KeyPath, node: Any) -> Any:
            written = self._placeholders.get(path)
            if written is not None:
                named.update({value: f"${{{name}}}" for name, value in written.secrets.items()})
            elif isinstance(node, SecretStr):
                named.setdefault(node.get_secret_value(), MASK)
            elif is_text(node) and names_credential(path):
                named.setdefault(node, MASK)
            return node

        plain_data(self, collect)
        # A short literal may be a word ("ollama"); hiding it elsewhere would spoil a file that is to be read again.
        secrets = [value for value, shown in named.items() if len(value) >= (12 if shown == MASK else SHORTEST_SECRET)]
        secrets.sort(key=len, reverse=True)

        def replace(path: KeyPath, node: Any) -> Any:
            placeholder = self._placeholders.get(path)
            if placeholder is not None and placeholder.value == node:
                return placeholder.template
            if isinstance(node, BaseModel) and path[-1:] == ("config_file",):
                return None  # a config in memory, which is this one or has a file of its own
            if is_text(node):
                if node and names_credential(path):
                    return MASK
                # What a value contains is no placeholder, so it must not become one when the file is read again.
                text = node.replace("${", "$${")
                for secret in secrets:
                    text = text.replace(secret, named[secret])
                return text if text != node else node
            return node

        return plain_data(self, replace)

    def redacted(self) -> dict[str, Any]:
        """This config as plain data to look at.

        Returns:
            The data. Every secret, and every value that came from the environment, is asterisks.
        """

        def hide(path: KeyPath, node: Any) -> Any:
            if path in self._placeholders or (is_text(node) and node and names_credential(path)):
                return MASK
            return redact_text(node) if is_text(node) else node

        return plain_data(self, hide)

    def __repr_args__(self) -> Any:
        return self.redacted().items()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(dump_yaml(self.redacted()))}</pre>"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Config:
        # A run's config holds itself (finetuning.run_configuration.config_file), so the copy must be known before its
        # parts are copied.
        memo = {} if memo is None else memo
        twin = type(self).model_construct()
        memo[id(self)] = twin
        object.__setattr__(twin, "__dict__", copy.deepcopy(self.__dict__, memo))
        object.__setattr__(twin, "__pydantic_fields_set__", set(self.model_fields_set))
        twin._builder, twin._placeholders = self._builder, dict(self._placeholders)
        twin._received = self._received
        return twin
