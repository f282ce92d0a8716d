"""Everything a config may hold: base classes of component configs, the sections, and `Config` itself."""

from __future__ import annotations

from ..types import CurriculumSettings
from .base import (
    APITypeEnum,
    EvalDatasetBaseConfig,
    EvalDatasetCsvConfig,
    EvalDatasetJsonConfig,
    EvalDatasetJsonlConfig,
    EvalDatasetParquetConfig,
    EvalDatasetStructureConfig,
    EvalFilterConfig,
    EvalFilterEntryConfig,
    EvaluatorBaseConfig,
    FunctionBaseConfig,
    LLMBaseConfig,
    RewardFunctionConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
    TypedBaseModel,
)
from .sections import (
    Config,
    CurriculumLearningConfig,
    EvalConfig,
    EvalGeneralConfig,
    FinetuneConfig,
    FinetuneRunConfig,
    RaySettings,
    RunSettings,
)

__all__ = [
    "APITypeEnum",
    "Config",
    "CurriculumLearningConfig",
    "CurriculumSettings",
    "EvalConfig",
    "EvalDatasetBaseConfig",
    "EvalDatasetCsvConfig",
    "EvalDatasetJsonConfig",
    "EvalDatasetJsonlConfig",
    "EvalDatasetParquetConfig",
    "EvalDatasetStructureConfig",
    "EvalFilterConfig",
    "EvalFilterEntryConfig",
    "EvalGeneralConfig",
    "EvaluatorBaseConfig",
    "FinetuneConfig",
    "FinetuneRunConfig",
    "FunctionBaseConfig",
    "LLMBaseConfig",
    "RaySettings",
    "RewardFunctionConfig",
    "RunSettings",
    "TrainerAdapterConfig",
    "TrainerConfig",
    "TrajectoryBuilderConfig",
    "TypedBaseModel",
]
