"""Our components among the Toolkit's: its entry point `nat.components` imports this module, and from then on a config for
`nat finetune` may name them.

    llms:                {my_model:   {_type: finetune_nb_policy, adapter: my_adapter}}
    trajectory_builders: {my_builder: {_type: finetune_nb_eval_traj_builder, num_generations: 8}}
    trainer_adapters:    {my_adapter: {_type: finetune_nb_local_grpo}}
    trainers:            {my_trainer: {_type: finetune_nb_epoch_trainer}}

Each holds one of ours in `ours` and speaks the Toolkit's nouns. The trainer goes with any builder and adapter of the
Toolkit's, the builder with any trainer; finetune_nb_local_grpo wants the ids that our builder brings, finetune_nb_trl_dpo
preferences such as those of the Toolkit's builder for DPO. The Toolkit's own evaluation runs the workflow; what is asked of
finetune_nb_policy goes through our gateway, so that every id is exact.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

from nat.builder.builder import Builder
from nat.builder.framework_enum import LLMFrameworkEnum
from nat.builder.llm import LLMProviderInfo
from nat.cli.register_workflow import (
    register_llm_client,
    register_llm_provider,
    register_trainer,
    register_trainer_adapter,
    register_trajectory_builder,
)
from nat.data_models import finetuning as nat
from nat.data_models.component_ref import TrainerAdapterRef
from nat.data_models.llm import LLMBaseConfig
from nat.finetuning.interfaces.finetuning_runner import Trainer as NatTrainerBase
from nat.finetuning.interfaces.trainer_adapter import TrainerAdapter as NatAdapterBase
from nat.finetuning.interfaces.trajectory_builder import TrajectoryBuilder as NatBuilderBase
from pydantic import Field, create_model

from ...config.base import TrainerAdapterConfig
from ...config.sections import FinetuneConfig
from ...errors import ConfigError
from ...interfaces import Policy
from ...redaction import redacting_logger
from ...rollouts.trajectory_builder import EvalTrajectoryBuilderConfig
from ...training.trainer import EpochTrainer, EpochTrainerConfig
from ...types import SamplingParams, TrainingStatusEnum
from ..import_guard import restore_transformers
from ..local.config import LocalGRPOConfig
from ..trl.config import TRLDPOConfig
from .bridges import NatAdapter, NatBuilder, unwrap
from .conversion import collection_from_nat, collection_to_nat, ref_from_nat, ref_to_nat, status_to_nat
from .evaluation import EvaluatingBuilder, Evaluations, SharedLLM, finetuning_from_nat, without_itself

__all__ = [
    "OursAsNatAdapter",
    "OursAsNatBuilder",
    "OursAsNatTrainer",
]

logger = redacting_logger(__name__)


# ── the builder ──────────────────────────────────────────────────────────────────────────────────────────────────────


class BuilderConfig(nat.TrajectoryBuilderConfig, name="finetune_nb_eval_traj_builder"):  # type: ignore  # the Toolkit's, where it is installed
    """finetune_nb's trajectories from evaluation runs: a rollout that fails leaves the others."""

    num_generations: int = Field(default=8, ge=1)
    include_tool_calls: bool = True
    min_episode_length: int = Field(default=2, ge=1)


class OursAsNatBuilder(NatBuilderBase):
    """`ours` is an EvaluatingBuilder."""

    def __init__(self, config: BuilderConfig) -> None:
        super().__init__(config)
        own = config.model_dump(exclude={"type", "reward"})
        self.ours = EvaluatingBuilder(EvalTrajectoryBuilderConfig(**own))

    async def initialize(self, run_config: Any) -> None:
        await super().initialize(run_config)
        self.ours.run = without_itself(run_config.run_configuration)
        await self.ours.initialize(finetuning_from_nat(run_config))

    async def run_eval(self) -> Any:
        raise ConfigError("this builder evaluates by itself: call start_run and finalize.")

    async def start_run(self, run_id: str, meta: dict | None = None) -> None:
        await self.ours.start_run(run_id, meta)

    async def finalize(self, run_id: str, meta: dict | None = None) -> nat.TrajectoryCollection:
        return collection_to_nat(await self.ours.finalize(run_id, meta))

    def log_progress(self, run_id: str, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        self.ours.log_progress(run_id, metrics, output_dir)


@register_trajectory_builder(config_type=BuilderConfig)
async def trajectory_builder(config: BuilderConfig, builder: Builder) -> AsyncIterator[Any]:
    yield OursAsNatBuilder(config)


# ── the adapter ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _config_of(ours: type[TrainerAdapterConfig], name: str, doc: str, **more: Any) -> Any:
    """A config of the Toolkit's with the fields of one of ours."""
    own: dict[str, Any] = {
        field: (about.annotation, about)
        for field, about in ours.model_fields.items()
        if field not in ("type", "reward")
    }
    return create_model(
        "AdapterConfig",
        __base__=nat.TrainerAdapterConfig,
        __cls_kwargs__={"name": name},
        __module__=__name__,
        __doc__=doc,
        seed=(int, Field(default=0, ge=0)),
        **more,
        **own,
    )


AdapterConfig = _config_of(
    LocalGRPOConfig,
    "finetune_nb_local_grpo",
    "finetune_nb's GRPO in this process, with torch and transformers: the fields of its local_grpo.",
    deterministic=(bool, False),
)
DPOAdapterConfig = _config_of(
    TRLDPOConfig,
    "finetune_nb_trl_dpo",
    "finetune_nb's DPO on this machine, by TRL in a process of its own: the fields of its trl_dpo.",
)

_adapters: WeakValueDictionary[int, OursAsNatAdapter] = WeakValueDictionary()
"""By id of the config, which the adapter holds. The Toolkit builds every component anew for each evaluation; there is one
set of weights."""


class OursAsNatAdapter(NatAdapterBase):
    """`ours` is a LocalGRPOAdapter or a TRLAdapter. The trained model lies in the folder `model` of the output_dir."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        own = config.model_dump(exclude={"type", "reward", "seed", "deterministic"})
        if isinstance(config, AdapterConfig):
            from ..local.adapter import LocalGRPOAdapter

            ours: Any = LocalGRPOAdapter(LocalGRPOConfig(**own), seed=config.seed, deterministic=config.deterministic)
        else:
            from ..trl.adapter import TRLAdapter

            ours = TRLAdapter(TRLDPOConfig(**own), seed=config.seed)
        self.ours = ours
        self.initialized = False

    @property
    def policy(self) -> Policy:
        if not self.initialized:
            raise ConfigError(
                "the trainer adapter of this model is not the one that trains: a validation_config_file makes a model of its "
                "own. Leave validation_config_file out, and name the dataset by validation_dataset."
            )
        return cast(Policy, self.ours.policy)

    async def initialize(self, run_config: Any) -> None:
        await super().initialize(run_config)
        restore_transformers()  # the Toolkit has imported every plugin by now
        await self.ours.initialize(finetuning_from_nat(run_config))
        self.initialized = True

    async def is_healthy(self) -> bool:
        return await self.ours.is_healthy()

    async def submit(self, trajectories: nat.TrajectoryCollection) -> nat.TrainingJobRef:
        return ref_to_nat(await self.ours.submit(collection_from_nat(trajectories)))

    async def status(self, ref: nat.TrainingJobRef) -> nat.TrainingJobStatus:
        return status_to_nat(await self.ours.status(ref_from_nat(ref)))

    async def wait_until_complete(self, ref: nat.TrainingJobRef, poll_interval: float = 10.0) -> nat.TrainingJobStatus:
        status = await self.ours.wait_until_complete(ref_from_nat(ref), poll_interval)
        if status.status == TrainingStatusEnum.COMPLETED:
            await self.keep_model()
        return status_to_nat(status)

    async def keep_model(self) -> None:
        """Writes the model, in place of the one before: `nat finetune` ends with this process, and its weights with it."""
        place = Path(self.run_config.output_dir) / "model"
        await self.ours.save(place)
        logger.info("the trained model is in %s", place)

    def log_progress(self, ref: nat.TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        self.ours.log_progress(ref_from_nat(ref), metrics, output_dir)


@register_trainer_adapter(config_type=AdapterConfig)
async def trainer_adapter(config: Any, builder: Builder) -> AsyncIterator[Any]:
    yield _adapter_of(config)


@register_trainer_adapter(config_type=DPOAdapterConfig)
async def dpo_adapter(config: Any, builder: Builder) -> AsyncIterator[Any]:
    yield _adapter_of(config)


def _adapter_of(config: Any) -> OursAsNatAdapter:
    adapter = _adapters.get(id(config))
    if adapter is None:
        adapter = _adapters[id(config)] = OursAsNatAdapter(config)
    return adapter


# ── the trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────


class TrainerConfig(nat.TrainerConfig, name="finetune_nb_epoch_trainer"):  # type: ignore  # the Toolkit's, where it is installed
    """finetune_nb's epochs with a curriculum by reward percentile. seed: of the curriculum's random_subsample."""

    seed: int = Field(default=0, ge=0)


class RewardedTrainer(EpochTrainer):
    """Ours, with the reward that the Toolkit's config names: a Run's own config has no evaluators to name one of."""

    reward: Any = None

    async def initialize(self, run_config: FinetuneConfig) -> None:
        if self.reward is not None:
            run_config = run_config.model_copy(update={"reward_function": self.reward})
        await super().initialize(run_config)


class OursAsNatTrainer(NatTrainerBase):
    """`ours` is a RewardedTrainer."""

    def __init__(self, config: TrainerConfig) -> None:
        super().__init__(config)
        self.ours = RewardedTrainer(EpochTrainerConfig(), seed=config.seed)

    async def initialize(self, run_config: Any) -> None:
        self.run_config = run_config
        self.curriculum_config = run_config.curriculum_learning
        for component in (self.trajectory_builder, self.trainer_adapter):
            await component.initialize(run_config)
        builder, adapter = self.trajectory_builder, self.trainer_adapter
        await self.ours.bind_components(unwrap(builder, NatBuilder), unwrap(adapter, NatAdapter))
        await self.ours.initialize(finetuning_from_nat(run_config))
        self._curriculum_state = self.ours._curriculum_state

    async def run_epoch(self, epoch: int, run_id: str) -> Any:
        ref = await self.ours.run_epoch(epoch, run_id)
        return None if ref is None else ref_to_nat(ref)

    async def run(self, num_epochs: int) -> list[Any]:
        statuses = await self.ours.run(num_epochs)
        if isinstance(self.trainer_adapter, OursAsNatAdapter):
            await self.trainer_adapter.keep_model()
        return [status_to_nat(status) for status in statuses]

    async def get_metrics(self, run_id: str) -> dict[str, Any]:
        return await self.ours.get_metrics(run_id)

    async def cleanup(self) -> None:
        await self.ours.cleanup()

    def log_progress(self, epoch: int, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        self.ours.log_progress(epoch, metrics, output_dir)

    async def run_validation_evaluation(self, epoch: int, run_id: str) -> dict[str, Any]:
        return await self.ours.run_validation_evaluation(epoch, run_id)

    def apply_curriculum_learning(self, trajectory_collection: Any, epoch: int) -> Any:
        return collection_to_nat(self.ours.apply_curriculum_learning(collection_from_nat(trajectory_collection), epoch))

    def get_curriculum_state(self) -> dict[str, Any]:
        return self.ours.get_curriculum_state()


@register_trainer(config_type=TrainerConfig)
async def trainer(config: TrainerConfig, builder: Builder) -> AsyncIterator[Any]:
    yield OursAsNatTrainer(config)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


class PolicyConfig(LLMBaseConfig, name="finetune_nb_policy"):  # type: ignore  # the Toolkit's, where it is installed
    """The weights that a finetune_nb adapter trains, as a model for workflows: what is sampled is what is trained."""

    adapter: TrainerAdapterRef
    """Name of the trainer adapter."""
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: int = Field(default=256, ge=1)
    model_name: str = "policy"


@register_llm_provider(config_type=PolicyConfig)
async def policy(config: PolicyConfig, builder: Builder) -> AsyncIterator[Any]:
    yield LLMProviderInfo(config=config, description="The policy of a finetune_nb trainer adapter")


@register_llm_client(config_type=PolicyConfig, wrapper_type=LLMFrameworkEnum.LANGCHAIN)
async def policy_langchain(config: PolicyConfig, builder: Builder) -> AsyncIterator[Any]:
    """A ChatOpenAI at an address of our gateway that this evaluation has for itself."""
    from langchain_openai import ChatOpenAI

    async with _address(config, builder) as endpoint:
        yield ChatOpenAI(
            model=config.model_name,
            base_url=endpoint.base_url,
            api_key=endpoint.api_key,
            temperature=config.temperature,
            max_tokens=config.max_tokens,  # type: ignore[call-arg]
            logprobs=True,
            max_retries=0,
        )


@asynccontextmanager
async def _address(config: PolicyConfig, builder: Builder) -> AsyncIterator[Any]:
    adapter = await builder.get_trainer_adapter(config.adapter)
    if not isinstance(adapter, OursAsNatAdapter):
        raise ConfigError(
            f"llm of type finetune_nb_policy names the trainer adapter {str(config.adapter)!r}, which has no weights here. "
            "Name one of type finetune_nb_local_grpo or finetune_nb_trl_dpo."
        )
    llm = SharedLLM(lambda: adapter.policy, config.model_name, SamplingParams(config.temperature, config.max_tokens))
    with Evaluations.address(llm, adapter.ours.seed) as endpoint:
        yield endpoint
