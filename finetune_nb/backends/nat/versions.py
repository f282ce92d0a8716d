"""What depends on the version of the Toolkit: pins, names of its classes, and faults of its plugins that are mended.

A fault is mended on an instance, for a Run alone, and so that what is trained on stays what the Toolkit would train on.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ...errors import ConfigError
from ...hooks import wrap_method
from ...redaction import redact_text, redacting_logger
from ...text import text_of

__all__ = [
    "ART_ADAPTER",
    "ART_TRAINER",
    "CUSTOMIZER_ADAPTER",
    "PLUGINS",
    "RELIED_ON",
    "TRAINS_IN_RUN",
    "forget_validations",
    "is_one_of",
    "mend_adapter",
    "mend_trainer",
    "missing_package",
    "pass_on_beta",
    "pin_of",
    "with_progress",
]

logger = redacting_logger(__name__)

TRIED = "1.9.0"
"""The version that all of this was tried with."""
_PACKAGES = {
    "art": ("nvidia-nat-openpipe-art=={version}", "openpipe-art==0.5.17", "pyarrow"),
    "profiler": ("nvidia-nat-profiler=={version}",),
    "langchain": ("nvidia-nat-langchain[{extra}]=={version}",),
    "customizer": ("nvidia-nat-nemo-customizer=={version}",),
}
_EXTRAS = {
    "langchain_aws": "aws",
    "langchain_community": "community",
    "langchain_exa": "exa",
    "langchain_huggingface": "huggingface",
    "langchain_litellm": "litellm",
    "langchain_milvus": "milvus",
    "langchain_nvidia_ai_endpoints": "nvidia",
    "langchain_oci": "oci",
    "langchain_openai": "openai",
    "openevals": "judge",
}
"""Module -> the extra of nvidia-nat-langchain that installs it."""
PLUGINS = {"openpipe_art": "art", "nemo_customizer": "customizer", "dpo_traj_builder": "customizer"}
"""What the beginning of a `_type` needs."""
ART_ADAPTER = "nat.plugins.openpipe.trainer_adapter.ARTTrainerAdapter"
ART_TRAINER = "nat.plugins.openpipe.trainer.ARTTrainer"
CUSTOMIZER_ADAPTER = "nat.plugins.customizer.dpo.trainer_adapter.NeMoCustomizerTrainerAdapter"
TRAINS_IN_RUN = {"nat.plugins.customizer.dpo.trainer.NeMoCustomizerTrainer"}
"""Trainers of the Toolkit that only collect in `run_epoch`, and train once, at the end of `run`."""

RELIED_ON = {
    # of the Toolkit itself
    "nat.builder.builder:Builder": ("get_llm", "get_trainer_adapter"),
    "nat.builder.framework_enum:LLMFrameworkEnum": ("LANGCHAIN",),
    "nat.builder.llm:LLMProviderInfo": (),
    "nat.builder.workflow_builder:WorkflowBuilder": (
        "from_config",
        "get_trainer",
        "get_trainer_adapter",
        "get_trajectory_builder",
    ),
    "nat.cli.cli_utils.config_override:load_and_override_config": (),
    "nat.cli.register_workflow:register_llm_client": (),
    "nat.cli.register_workflow:register_llm_provider": (),
    "nat.cli.register_workflow:register_trainer": (),
    "nat.cli.register_workflow:register_trainer_adapter": (),
    "nat.cli.register_workflow:register_trajectory_builder": (),
    "nat.cli.type_registry:GlobalTypeRegistry": ("get",),
    "nat.data_models.component_ref:TrainerAdapterRef": (),
    "nat.data_models.config:Config": ("finetuning", "eval"),
    "nat.data_models.evaluate_runtime:EvaluationRunConfig": (
        "config_file",
        "dataset",
        "result_json_path",
        "endpoint",
        "endpoint_timeout",
        "override",
        "write_output",
    ),
    "nat.data_models.finetuning:DPOItem": ("prompt", "chosen_response", "rejected_response"),
    "nat.data_models.finetuning:EpisodeItem": ("role", "content", "logprobs", "metadata"),
    "nat.data_models.finetuning:EpisodeItemRole": (),
    "nat.data_models.finetuning:FinetuneConfig": (
        "run_configuration",
        "reward_function",
        "output_dir",
        "trainer",
        "trajectory_builder",
        "trainer_adapter",
    ),
    "nat.data_models.finetuning:FinetuneRunConfig": (
        "config_file",
        "dataset",
        "result_json_path",
        "endpoint",
        "endpoint_timeout",
        "override",
        "validation_dataset",
        "validation_interval",
        "validation_config_file",
    ),
    "nat.data_models.finetuning:OpenAIMessage": ("role", "content"),
    "nat.data_models.finetuning:TrainingJobRef": ("run_id", "backend", "metadata"),
    "nat.data_models.finetuning:TrainingJobStatus": ("status", "progress", "message", "metadata"),
    "nat.data_models.finetuning:TrainingStatusEnum": (),
    "nat.data_models.finetuning:Trajectory": ("episode", "reward", "shaped_rewards", "metadata"),
    "nat.data_models.finetuning:TrajectoryCollection": ("trajectories", "run_id"),
    "nat.data_models.intermediate_step:IntermediateStep": ("parent_id", "function_ancestry", "payload", "event_type"),
    "nat.data_models.intermediate_step:IntermediateStepPayload": (
        "event_timestamp",
        "name",
        "data",
        "metadata",
        "UUID",
    ),
    "nat.data_models.llm:LLMBaseConfig": (),
    "nat.finetuning.interfaces.finetuning_runner:Trainer": (
        "bind_components",
        "initialize",
        "run_epoch",
        "run",
        "get_metrics",
        "cleanup",
        "log_progress",
        "run_validation_evaluation",
        "apply_curriculum_learning",
        "get_curriculum_state",
    ),
    "nat.finetuning.interfaces.trainer_adapter:TrainerAdapter": (
        "initialize",
        "is_healthy",
        "submit",
        "status",
        "wait_until_complete",
        "log_progress",
    ),
    "nat.finetuning.interfaces.trajectory_builder:TrajectoryBuilder": (
        "initialize",
        "run_eval",
        "start_run",
        "finalize",
        "compute_reward",
        "log_progress",
    ),
    "nat.plugins.eval.runtime.evaluate:EvaluationRun": (
        "run_and_evaluate",
        "run_workflow_local",
        "run_workflow_remote",
    ),
    "nat.runtime.loader:PluginTypes": ("CONFIG_OBJECT",),
    "nat.runtime.loader:discover_and_register_plugins": (),
    "nat.runtime.loader:discover_entrypoints": ("cache_clear",),
    "nat.runtime.session:SessionManager": ("session",),
    "nat.runtime.session:Session": ("run",),
    "nat.runtime.runner:Runner": ("result",),
    "nat.utils.data_models.schema_validator:validate_schema": (),
    # of its plugins, which are mended
    "nat.plugins.openpipe.trainer:ARTTrainer": ("_create_reward_plot", "_log_metrics_to_file"),
    "nat.plugins.openpipe.trainer:plt": (),
    "nat.plugins.openpipe.trainer_adapter:ARTTrainerAdapter": (
        "training_jobs",
        "_construct_trajectory_groups",
        "is_healthy",
    ),
    "nat.plugins.customizer.dpo.trainer:NeMoCustomizerTrainer": (),
    "nat.plugins.customizer.dpo.trainer_adapter:NeMoCustomizerTrainerAdapter": ("is_healthy", "status"),
}
"""What is used of the Toolkit: "module:name", and attributes or fields of it. A test looks each of them up."""


def installed() -> str:
    """The Toolkit's version; the one that all of this was tried with where it is not installed."""
    try:
        return importlib.metadata.version("nvidia-nat-core")
    except importlib.metadata.PackageNotFoundError:
        return TRIED


def pin_of(part: str, extra: str = "openai") -> str:
    """The command that installs a part of the Toolkit, of the version that is there.

    Args:
        part: "art", "profiler", "langchain" or "customizer".
        extra: Of "langchain".
    """
    packages = [f'"{package.format(version=installed(), extra=extra)}"' for package in _PACKAGES[part]]
    return f"pip install {' '.join(packages)}"


def missing_package(error: ModuleNotFoundError) -> ConfigError:
    """The package whose module the Toolkit, or the config's own code, did not find, as an error that says what to install."""
    module = str(error.name).partition(".")[0]
    if module in _EXTRAS:
        fix = pin_of("langchain", _EXTRAS[module])
    elif module.startswith("langchain"):
        fix = pin_of("langchain")
    else:
        fix = f"Install the package that has the module {str(error.name)!r}"
    return ConfigError(
        f"the config needs the Python package {module.replace('_', '-')}, which is not installed (the Toolkit's plugins install "
        f"only a part of what they import). {fix}"
    )


def is_one_of(component: Any, table: set[str]) -> bool:
    """Whether a component's class, or one of its bases, is in a table."""
    return any(f"{kind.__module__}.{kind.__qualname__}" in table for kind in type(component).__mro__)


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def mend_adapter(nat: Any) -> None:
    """Mends a trainer adapter of the Toolkit, if it is one that is known."""
    if is_one_of(nat, {ART_ADAPTER}):
        training = getattr(nat.adapter_config, "training", None)
        if isinstance(training, dict):
            # It asks the dict for attributes, and so would train with its defaults whatever the config says.
            nat.adapter_config.training = _Settings(training)
        wrap_method(nat, "_construct_trajectory_groups", _art_groups)
        wrap_method(nat, "is_healthy", partial(_art_is_healthy, nat))
    if is_one_of(nat, {CUSTOMIZER_ADAPTER}):
        wrap_method(nat, "is_healthy", partial(_customizer_is_healthy, nat))


class _Settings(dict[str, Any]):
    """Settings that can be asked for as attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


async def _art_groups(original: Callable[..., Awaitable[list[Any]]], trajectory_lists: Sequence[Any]) -> list[Any]:
    """ART's groups, each trajectory made by itself: one that is invalid leaves the others alone, and messages of tools stay
    what they are. Raises ValueError if none is valid."""
    groups, errors = [], []
    for group in trajectory_lists:
        made, kind = [], None
        for trajectory in group:
            try:
                found = await original([[trajectory]])
            except ValueError as error:
                errors.append(error)
                logger.warning("a trajectory cannot be sent to ART, and is left out: %s", error)
                continue
            for each in found:
                kind = type(each)
                for sent in each.trajectories:
                    _send_tools(sent, trajectory.episode)
                    made.append(sent)
        if kind is not None and made:
            groups.append(kind(trajectories=made))
    if errors and not groups:
        raise errors[0]
    return groups


def _send_tools(sent: Any, episode: Sequence[Any]) -> None:
    """Messages of tools, and calls of them: the Toolkit sends the former as an assistant's, and drops the latter."""
    messages = sent.messages_and_choices
    for place, item in enumerate(episode):
        role, metadata = str(item.role), item.metadata or {}
        if role in ("tool", "function"):
            messages[place] = {"role": "tool", "content": item.content}
            if metadata.get("tool_call_id"):
                messages[place]["tool_call_id"] = metadata["tool_call_id"]
        elif role == "environment":
            messages[place] = {"role": "user", "content": item.content}
        elif role == "assistant" and metadata.get("tool_calls"):
            calls = [_tool_call(call) for call in metadata["tool_calls"]]
            message = messages[place]
            if isinstance(message, dict):
                message["tool_calls"] = calls
            else:
                given = message.model_dump()
                given["message"]["tool_calls"] = calls
                messages[place] = type(message).model_validate(given)


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call as OpenAI has it, also of one as LangChain has it."""
    if "function" in call:
        return dict(call)
    arguments = call.get("args")
    function = {
        "name": call.get("name"),
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
    }
    return {"id": call.get("id") or "", "type": "function", "function": function}


async def _art_is_healthy(nat: Any, original: Callable[[], Awaitable[bool]]) -> bool:
    """Whether the model is served where ART says that it is. The Toolkit asks port 8000, and takes an error for an answer."""
    address, key = getattr(nat.model, "inference_base_url", None), getattr(nat.model, "inference_api_key", None)
    if not address:
        backend = nat.adapter_config.backend
        return await _answers(f"http://{backend.ip}:{backend.port}/healthcheck")
    return await _answers(f"{str(address).rstrip('/')}/models", {"Authorization": f"Bearer {key}"})


async def _customizer_is_healthy(nat: Any, original: Callable[[], Awaitable[bool]]) -> bool:
    """Whether anybody answers there. The Toolkit asks nobody."""
    return await _answers(str(nat.adapter_config.entity_host))


async def _answers(address: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a server answers with something other than that it is broken."""
    import httpx

    try:
        async with httpx.AsyncClient(timeout=30) as client:
            status = (await client.get(address, headers=dict(headers or {}))).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        logger.warning("%s does not answer: %s", address, redact_text(text_of(error)) or type(error).__name__)
        return False
    broken = status in (500, 502, 503, 504)
    if broken:
        logger.warning("%s answers with status %d", address, status)
    return not broken


def pass_on_beta(nat: Any) -> None:
    """Gives `training.beta` to ART under its name there: the Toolkit's adapter gives it under one that ART drops.

    Args:
        nat: A trainer adapter, the second time and later left as it is.

    Raises:
        ConfigError: This version of ART has no such setting, when it trains.
    """
    beta = getattr(getattr(nat.adapter_config, "training", None), "beta", 0)
    if not beta or not is_one_of(nat, {ART_ADAPTER}) or isinstance(nat.model.train, partial):
        return

    def train(original: Callable[..., Any], *args: Any, config: Any, **options: Any) -> Any:
        if "kl_penalty_coef" not in type(config).model_fields:
            raise ConfigError(
                f"training.beta is {beta}, and the installed openpipe-art has no weight of the KL divergence. Leave beta "
                "out, or install a version whose TrainConfig has kl_penalty_coef."
            )
        return original(*args, config=config.model_copy(update={"kl_penalty_coef": float(beta)}), **options)

    # ART's model lets nobody set what is no field of it.
    object.__setattr__(nat.model, "train", partial(train, nat.model.train))


def with_progress(nat: Any, status: Any) -> Any:
    """A status as the Toolkit's own code can write it into its log: its Customizer adapter formats a number that may be
    missing, and the error hides how the job ended."""
    if status.progress is None and is_one_of(nat, {CUSTOMIZER_ADAPTER}):
        return status.model_copy(update={"progress": math.nan})
    return status


# ── trainers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def mend_trainer(nat: Any, seed: int) -> None:
    """Mends a trainer of the Toolkit, if it is one that is known.

    Args:
        nat: The trainer.
        seed: Of its draws, where it draws a subsample.
    """
    if not is_one_of(nat, {ART_TRAINER}):
        return

    def selected(original: Callable[..., Any], collection: Any, epoch: int) -> Any:
        # It draws from the generator that all of this process shares.
        before = random.getstate()
        random.seed(f"{seed}/{epoch}")
        try:
            return original(collection, epoch)
        finally:
            random.setstate(before)

    def counted(original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        # Its log would grow by a line as long as the dataset every epoch.
        state = original()
        return {**state, "included_groups": len(state["included_groups"])}

    def logged(original: Callable[..., None], epoch: int, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        nat._mended_metrics = metrics
        original(epoch, metrics, *args, **kwargs)

    def drawn(original: Callable[..., None], *args: Any) -> None:
        # The plot looks for these two where only the rewards are.
        for name in ("filtered_avg_reward", "curriculum_percentile"):
            if name in nat._mended_metrics:
                nat._reward_history[-1][name] = nat._mended_metrics[name]
        original(*args)

    wrap_method(nat, "apply_curriculum_learning", selected)
    wrap_method(nat, "get_curriculum_state", counted)
    wrap_method(nat, "log_progress", logged)
    wrap_method(nat, "_create_reward_plot", drawn)


def forget_validations(nat: Any, epochs: set[int]) -> None:
    """Takes validations that failed out of the trainer's own history, which has them with a reward of 0."""
    history = getattr(nat, "_validation_history", None)
    if isinstance(history, list):
        history[:] = [entry for entry in history if entry.get("epoch") not in epochs]
