"""OpenPipe ART as a training backend: any implementation of its public Backend protocol (`backend.train(model, groups)`),
its own local, serverless and Tinker backends among them.

Trajectories are handed over as ART's own types. Sampled tokens travel as `token_id:N`, which ART takes as they are; it
renders the prompt again with its own tokenizer and chat template. What the backend learns, and how, is ART's.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..config import FinetuneConfig, TrainerAdapterConfig
from ..episodes import check_exact
from ..errors import BackendError, ConfigError, MissingExtra, MissingLogprobs, UnknownJob, did_you_mean
from ..imports import keeping_others
from ..interfaces import TrainerAdapter
from ..jsonl import append_jsonl
from ..observe import resolve
from ..redaction import redact_text
from ..registry import Builder, register_trainer_adapter
from ..types import (
    DPOItem,
    EpisodeItem,
    EpisodeItemRole,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
    logprob_values,
)

__all__ = ["OpenPipeArtAdapter", "OpenPipeArtConfig", "art_groups"]


class OpenPipeArtConfig(TrainerAdapterConfig, name="openpipe_art"):
    """Training by OpenPipe ART."""

    backend: Literal["local", "serverless", "tinker"] = "local"
    """ART's own: "local" wants a GPU, "serverless" WANDB_API_KEY, "tinker" TINKER_API_KEY. Another implementation is handed
    over in code: `OpenPipeArtAdapter(config, backend=...)`."""
    backend_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that backend's constructor."""
    base_model: str
    """The model that is trained, as the ART backend names it."""
    name: str = "finetune-nb"
    """The model's name in ART; a run that uses it again goes on from its last step."""
    project: str = "finetune-nb"
    """What ART files the model under."""
    learning_rate: float = Field(default=5e-6, gt=0, json_schema_extra={"live": "training"})
    allow_inexact: bool = False
    """Also trains on token ids that are not known to be those that were sampled."""
    train_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the backend's `train`: epsilon, kl_penalty_coef, loss_fn, ..."""


_BACKENDS = {
    "local": "art.local:LocalBackend",
    "serverless": "art.serverless:ServerlessBackend",
    "tinker": "art.tinker:TinkerBackend",
}


@dataclass(eq=False)
class _Job:
    """One call of `backend.train`."""

    task: asyncio.Task[Any]
    trajectories: int
    canceled: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    step: int | None = None


class OpenPipeArtAdapter(TrainerAdapter):
    """Trains `model`, an art.TrainableModel, by a Backend of ART's. backend: one of your own, in place of the config's; it
    is not closed here."""

    adapter_config: OpenPipeArtConfig

    def __init__(self, adapter_config: OpenPipeArtConfig, backend: Any = None) -> None:
        super().__init__(adapter_config)
        self.backend: Any = backend
        self._own = backend is None
        self.model: Any = None
        self._jobs: dict[str, _Job] = {}
        self._checkpoint: str | None = None

    async def initialize(self, run_config: FinetuneConfig) -> None:
        """Registers the model, which starts ART's inference server. Raises MissingExtra, ConfigError, BackendError."""
        await super().initialize(run_config)
        if self.model is not None:
            return
        try:
            with keeping_others():
                trainable_model = resolve("art:TrainableModel")
        except ImportError as error:
            raise MissingExtra("the training backend openpipe_art", "art") from error
        config = self.adapter_config
        backend = self.backend or self._make_backend()
        self._check_options(backend)
        model = trainable_model(name=config.name, project=config.project, base_model=config.base_model)
        try:
            await model.register(backend)
        except ImportError as error:
            raise self._lacks(error) from error
        except Exception as error:
            raise BackendError(
                f"ART's {type(backend).__name__} did not take the model {config.base_model!r}: {_said(error)}. "
                "Start or repair it, then run the epoch again."
            ) from error
        self.backend, self.model = backend, model

    def _make_backend(self) -> Any:
        config = self.adapter_config
        try:
            kind = resolve(_BACKENDS[config.backend])
        except ImportError as error:
            raise self._lacks(error) from error
        try:
            return kind(**config.backend_options)
        except Exception as error:
            raise ConfigError(f"backend_options do not make a {kind.__name__}: {_said(error)}.") from error

    def _lacks(self, error: ImportError) -> BackendError:
        backend = self.adapter_config.backend
        return BackendError(
            f"ART's {backend} backend needs packages of its own, and the local one a GPU ({error}): pip install "
            f'"openpipe-art[{"tinker" if backend == "tinker" else "backend"}]"'
        )

    def _check_options(self, backend: Any) -> None:
        """What the backend would drop or refuse is said before the first rollout."""
        taken = inspect.signature(backend.train).parameters
        if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
            return
        for name in ("learning_rate", *self.adapter_config.train_options):
            if name not in taken:
                known = set(taken) - {"model", "trajectory_groups"}
                raise ConfigError(f"{type(backend).__name__}.train takes no {name!r}. {did_you_mean(name, known)}")

    async def is_healthy(self) -> bool:
        """Whether the backend has the model, and answers for it."""
        if self.model is None:
            return False
        try:
            await self.backend._get_step(self.model)
        except Exception:
            return False
        return True

    async def submit(self, trajectories: TrajectoryCollection) -> TrainingJobRef:
        """Starts a job. Raises BackendError or MissingLogprobs for trajectories that cannot be trained on exactly."""
        if self.model is None:
            raise BackendError("the ART model is not registered: call initialize first.")
        everything = [trajectory for group in trajectories.trajectories for trajectory in group]
        check_exact(everything, self.adapter_config.allow_inexact)
        groups = art_groups(trajectories)
        job_id = uuid.uuid4().hex
        count = sum(len(group.trajectories) for group in groups)
        self._jobs[job_id] = _Job(asyncio.create_task(self._train(job_id, groups), name=f"art-{job_id}"), count)
        return TrainingJobRef(run_id=trajectories.run_id, backend="openpipe_art", metadata={"job_id": job_id})

    async def _train(self, job_id: str, groups: list[Any]) -> None:
        config = self.adapter_config
        result = await self.backend.train(
            self.model, groups, learning_rate=config.learning_rate, **config.train_options
        )
        job = self._jobs[job_id]
        job.metrics = {name: float(value) for name, value in (result.metrics or {}).items() if _is_number(value)}
        job.step = result.step
        self._checkpoint = getattr(result, "checkpoint_path", None) or self._checkpoint

    def _job(self, ref: TrainingJobRef) -> _Job:
        job = self._jobs.get((ref.metadata or {}).get("job_id", ""))
        if job is None:
            raise UnknownJob(f"there is no ART job {ref.metadata!r} in this process: its jobs end with it.")
        return job

    async def status(self, ref: TrainingJobRef) -> TrainingJobStatus:
        job = self._job(ref)
        status, message, metadata = TrainingStatusEnum.RUNNING, None, None
        if job.task.done():
            error = None if job.task.cancelled() else job.task.exception()
            if job.task.cancelled() or job.canceled:
                status, message = TrainingStatusEnum.CANCELED, "the job was canceled"
            elif error is not None:
                status, message = TrainingStatusEnum.FAILED, _said(error)
            else:
                metrics = {"trajectories": float(job.trajectories), **job.metrics}
                status, metadata = TrainingStatusEnum.COMPLETED, {"metrics": metrics, "step": job.step}
        return TrainingJobStatus(
            run_id=ref.run_id,
            backend=ref.backend,
            status=status,
            progress=100.0 if status == TrainingStatusEnum.COMPLETED else None,
            message=message,
            metadata=metadata,
        )

    async def wait_until_complete(self, ref: TrainingJobRef, poll_interval: float = 10.0) -> TrainingJobStatus:
        """Waits for the job itself; `poll_interval` is not needed."""
        await asyncio.wait([self._job(ref).task])
        return await self.status(ref)

    async def cancel(self, ref: TrainingJobRef) -> None:
        """Stops waiting for ART; whether a remote service goes on is its affair."""
        job = self._job(ref)
        job.canceled = not job.task.done()
        job.task.cancel()

    def log_progress(self, ref: TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        """Appends a line to trainer_adapter_<run_id>.jsonl."""
        folder = Path(output_dir or (self.run_config.output_dir if self.run_config else "."))
        append_jsonl(
            folder / f"trainer_adapter_{ref.run_id}.jsonl", {"run_id": ref.run_id, "backend": ref.backend, **metrics}
        )

    async def save(self, directory: str) -> str:
        """Copies the newest checkpoint, where the backend has written one here. Raises BackendError."""
        if self._checkpoint is None:
            raise BackendError(
                f"ART's {type(self.backend).__name__} has left no checkpoint on this machine. Take it from the service."
            )
        import shutil

        await asyncio.to_thread(shutil.copytree, self._checkpoint, directory, dirs_exist_ok=True)
        return directory

    async def aclose(self) -> None:
        running = [job.task for job in self._jobs.values() if not job.task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._own and self.backend is not None:
            await self.backend.close()
            self.backend = self.model = None


def _said(error: BaseException) -> str:
    return redact_text(f"{type(error).__name__}: {error}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ── trajectories ─────────────────────────────────────────────────────────────────────────────────────────────────────


def art_groups(collection: TrajectoryCollection) -> list[Any]:
    """Groups of trajectories as art.TrajectoryGroups. Rollouts without a reward are left out. Raises BackendError or
    MissingLogprobs for a sampled turn without exact ids."""
    group_of = resolve("art:TrajectoryGroup")
    groups = []
    for group in collection.trajectories:
        made = [_art_trajectory(trajectory) for trajectory in group if math.isfinite(trajectory.reward)]
        if made:
            groups.append(group_of(made))
    return groups


def _art_trajectory(trajectory: Trajectory) -> Any:
    metadata = trajectory.metadata or {}
    where = f"example {metadata.get('id')!r}, generation {metadata.get('generation')}"
    conversations: dict[int, list[Any]] = {}
    for turn, item in enumerate(trajectory.episode):
        if isinstance(item, DPOItem):
            raise BackendError(
                f"{where} is a preference (DPOItem); expected an episode of EpisodeItems with a reward. Use a backend that "
                "learns from preferences."
            )
        place = (item.metadata or {}).get("conversation", 0)
        conversations.setdefault(place, []).append(_message(item, f"turn {turn} of {where}"))
    first, *others = conversations.values()
    tools = metadata.get("tools")
    version = metadata.get("policy_version")
    history = resolve("art.trajectories:History")
    return resolve("art:Trajectory")(
        messages_and_choices=first,
        tools=tools,
        additional_histories=[history(messages_and_choices=other, tools=tools) for other in others],
        reward=trajectory.reward,
        initial_policy_version=version,
        final_policy_version=version,
        metrics={k: v for k, v in (metadata.get("scores") or {}).items() if _is_number(v)},
        metadata={k: v for k, v in metadata.items() if isinstance(v, str | int | float | bool) and k != "reasoning"},
    )


def _message(item: EpisodeItem, where: str) -> Any:
    """A plain message; of a turn that the policy sampled, a Choice with the sampled ids."""
    known = item.metadata or {}
    message: dict[str, Any] = {"role": _ROLES.get(item.role, str(item.role.value)), "content": item.content}
    message |= {key: known[key] for key in ("tool_calls", "tool_call_id", "name") if known.get(key)}
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    if item.role != EpisodeItemRole.ASSISTANT or item.logprobs == []:
        return message
    from openai.types.chat.chat_completion import Choice

    values = logprob_values(item.logprobs)
    if values is None:
        raise MissingLogprobs(f"{where} has no logprobs, so it cannot be trained on.")
    ids, texts = known.get("token_ids"), known.get("tokens") or []
    if ids is None or len(ids) != len(values):
        raise BackendError(
            f"{where} has {len(values)} logprobs and {'no' if ids is None else len(ids)} token_ids; expected one id for each. "
            "Text is not tokenized again, as that can give other tokens than were sampled: sample from a server that "
            "returns token ids (vLLM: return_token_ids)."
        )
    content = [
        {
            "token": f"token_id:{token}",
            "bytes": list((texts[i] if i < len(texts) else "").encode()),
            "logprob": value,
            "top_logprobs": [],
        }
        for i, (token, value) in enumerate(zip(ids, values, strict=True))
    ]
    reason = known.get("finish_reason")
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": reason if reason in ("stop", "length", "tool_calls", "content_filter") else "stop",
            "logprobs": {"content": content, "refusal": None},
            "message": message,
        }
    )


_ROLES = {EpisodeItemRole.ENVIRONMENT: "user", EpisodeItemRole.OTHER: "user"}
"""Roles that no chat template knows."""


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """In OpenAI's form, whose arguments are a JSON text."""
    function = call.get("function") or {"name": call.get("name"), "arguments": call.get("args")}
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    function = {**function, "arguments": text}
    return {"id": str(call.get("id") or function.get("name")), "type": "function", "function": function}


@register_trainer_adapter(config_type=OpenPipeArtConfig)
async def openpipe_art(config: OpenPipeArtConfig, builder: Builder):
    adapter = OpenPipeArtAdapter(config)
    yield adapter
    await adapter.aclose()
