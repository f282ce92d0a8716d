"""The base classes of component configs: a subclass with the class keyword `name="..."` is what `_type: ...` in YAML
names.

    class MyTrainerConfig(TrainerConfig, name="my_trainer"):
        warmup_epochs: int = 2

Fields and defaults are those of nvidia-nat-core 1.9.0.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import ConfigError, did_you_mean
from ..redaction import MASK, is_credential, redact

__all__ = [
    "APITypeEnum",
    "AT_TRAINING",
    "EvalDatasetBaseConfig",
    "EvalDatasetCsvConfig",
    "EvalDatasetJsonConfig",
    "EvalDatasetJsonlConfig",
    "EvalDatasetParquetConfig",
    "EvalDatasetStructureConfig",
    "EvalFilterConfig",
    "EvalFilterEntryConfig",
    "EvaluatorBaseConfig",
    "FunctionBaseConfig",
    "LLMBaseConfig",
    "RewardFunctionConfig",
    "TrainerAdapterConfig",
    "TrainerConfig",
    "TrajectoryBuilderConfig",
    "TypedBaseModel",
    "changed",
]

M = TypeVar("M", bound=BaseModel)


class TypedBaseModel(BaseModel):
    """A config that knows its `_type`. Its repr hides credentials, and its validation errors hide what was given."""

    model_config = ConfigDict(hide_input_in_errors=True)

    type: str = Field(
        default="unknown",
        serialization_alias="_type",
        validation_alias=AliasChoices("type", "_type"),
        title="Type",
        repr=False,
    )
    """The class's own `_type`, whatever was given; "unknown" for a class without one."""

    full_type: ClassVar[str]
    _typed_model_name: ClassVar[str | None] = None

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            package = getattr(sys.modules.get(cls.__module__), "__package__", None) or cls.__module__
            cls._typed_model_name = name
            cls.full_type = f"{package}/{name}"

    def model_post_init(self, context: Any, /) -> None:
        if self._typed_model_name is not None:
            # Not through setattr: the type is the class's, not a value that somebody set.
            object.__setattr__(self, "type", self._typed_model_name)

    @classmethod
    def static_type(cls) -> str | None:
        """The name that `_type` gives it.

        Returns:
            The name; None for a class without one.
        """
        return cls._typed_model_name

    @classmethod
    def static_full_type(cls) -> str:
        """The name that `_type` gives it, with its package in front.

        Returns:
            "package/name".
        """
        return cls.full_type

    @staticmethod
    def discriminator(value: Any) -> str | None:
        """The `_type` of a config or of its dump.

        Args:
            value: A config, or a dict of its fields.

        Returns:
            The name; None for a dict without one.
        """
        return value.get("_type", value.get("type")) if isinstance(value, dict) else value.type

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, MASK if name and is_credential(name) and isinstance(value, str) else redact(value)


class RewardFunctionConfig(BaseModel):
    """Which evaluator's score is the reward."""

    name: str
    """A name of the section `eval.evaluators`."""


class TrainerConfig(TypedBaseModel):
    """Base of a Trainer's config."""

    reward: RewardFunctionConfig | None = None
    """Kept for the Toolkit: the reward is the trajectory builder's."""


class TrajectoryBuilderConfig(TypedBaseModel):
    """Base of a TrajectoryBuilder's config."""

    reward: RewardFunctionConfig | None = None
    """The evaluator whose score is the reward; None: as `finetuning.reward_function` says."""


class TrainerAdapterConfig(TypedBaseModel):
    """Base of a TrainerAdapter's config."""

    saves_elsewhere: ClassVar[bool] = False
    """True where a checkpoint only names what a service keeps. The adapter then has `forget_checkpoints`."""

    reward: RewardFunctionConfig | None = None
    """Kept for the Toolkit: the reward is the trajectory builder's."""

    def overlap_problem(self) -> str | None:
        """Why an epoch cannot be sampled while the epoch before it trains, where `max_staleness` of a subclass asks for that.

        Returns:
            What was found and what to do; None: it can, as far as the config says.
        """
        return None

    def to_score(self) -> Self:
        """The same for an adapter that only scores what was recorded, and neither samples nor trains.

        Returns:
            This config, or a copy without what only sampling needs.
        """
        return self


class EvaluatorBaseConfig(TypedBaseModel):
    """Base of an evaluator's config."""


class FunctionBaseConfig(TypedBaseModel):
    """Base of a workflow's config."""

    name: str | None = None
    """What the workflow is called where it is shown; None: its type."""
    middleware: list[str] = Field(default_factory=list)
    """Always empty: NAT has function middleware, finetune_nb does not."""

    @field_validator("middleware")
    @classmethod
    def check_middleware(cls, names: list[str]) -> list[str]:
        if names:
            raise ValueError("NAT has function middleware, finetune_nb does not; call it inside the workflow instead")
        return names


class APITypeEnum(StrEnum):
    """How a model is asked."""

    CHAT_COMPLETION = "chat_completion"
    RESPONSES = "responses"


class LLMBaseConfig(TypedBaseModel):
    """Base of a language model's config."""

    api_type: APITypeEnum = APITypeEnum.CHAT_COMPLETION
    """Kept for the Toolkit: models are asked by chat completions."""


class EvalFilterEntryConfig(BaseModel):
    """Values by column."""

    model_config = ConfigDict(extra="forbid")

    field: dict[str, list[str | int | float]] = {}


class EvalFilterConfig(BaseModel):
    """Which rows of a dataset are used: those that are allowed, less those that are denied."""

    model_config = ConfigDict(extra="forbid")

    allowlist: EvalFilterEntryConfig | None = None
    denylist: EvalFilterEntryConfig | None = None


class EvalDatasetStructureConfig(BaseModel):
    """Which columns hold what."""

    model_config = ConfigDict(extra="forbid")

    disable: bool = False
    """True: the workflow's input is the whole row."""
    question_key: str = "question"
    """The column that is the workflow's input."""
    answer_key: str = "answer"
    """The column that is the expected output."""
    generated_answer_key: str = "generated_answer"
    """Kept for the Toolkit, not used here; so the next two."""
    trajectory_key: str = "intermediate_steps"
    """Kept for the Toolkit."""
    expected_trajectory_key: str = "expected_intermediate_steps"
    """Kept for the Toolkit."""


class EvalDatasetBaseConfig(TypedBaseModel):
    """Base of a dataset's config: a local file of rows."""

    model_config = ConfigDict(extra="forbid")

    id_key: str = "id"
    """The column that is the example's id."""
    structure: EvalDatasetStructureConfig = EvalDatasetStructureConfig()
    """Which columns hold what."""
    filter: EvalFilterConfig | None = EvalFilterConfig()
    """Rows that are used, by values of their columns."""
    s3: None = None
    """Always None: NAT reads S3, finetune_nb does not."""
    remote_file_path: None = None
    """Always None, as `s3`."""
    file_path: Path | str = Path(".tmp/nat/examples/default/default.json")
    """The file; a relative one is looked for in the current directory, then beside the config."""

    @field_validator("s3", "remote_file_path", mode="before")
    @classmethod
    def check_remote(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("NAT reads datasets from S3, finetune_nb does not; download the file and set file_path")


class EvalDatasetJsonConfig(EvalDatasetBaseConfig, name="json"):
    """A JSON file: a list of rows."""


class EvalDatasetJsonlConfig(EvalDatasetBaseConfig, name="jsonl"):
    """One JSON row a line."""


class EvalDatasetCsvConfig(EvalDatasetBaseConfig, name="csv"):
    """A CSV file with a header."""


class EvalDatasetParquetConfig(EvalDatasetBaseConfig, name="parquet"):
    """A Parquet file."""


def changed(config: M, changes: Mapping[str, Any], label: str) -> M:
    """A copy of a config with some of its fields changed. A default that follows from another field (`own_defaults`) follows
    from what that is now. Raises ConfigError, in which `label` names the config, for a field that it has not and for a value that
    does not fit."""
    known = type(config).model_fields
    if unknown := [name for name in changes if name not in known]:
        raise ConfigError(f"{label}: {unknown[0]!r} is not a setting. {did_you_mean(unknown[0], known)}")
    try:
        follows = getattr(config, "own_defaults", {})
        values = {name: value for name, value in config if name not in follows or value != follows[name]}
        return type(config).model_validate({**values, **changes})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join([label, *map(str, each['loc'])])}: {each['msg']}" for each in error.errors()[:3])
        raise ConfigError(f"{wrong}.") from None


AT_TRAINING: dict[str, Any] = {"live": "training"}
"""The mark of a setting that the next training job reads."""
