"""TinkerAdapter: training on a Tinker-compatible service (Thinking Machines' cloud, SkyRL's open server).

It decides what is refused, when a job is tried again, and when the policy version rises.
"""

from __future__ import annotations

import asyncio
import functools
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...components.builder import Builder
from ...components.registry import register_trainer_adapter
from ...errors import BackendError, MissingExtra
from ...llms.chat_tokenizer import load_tokenizer
from ...redaction import redact_text, redacting_logger
from ...threads import in_daemon_thread
from ...training.batch import TrainingBatch
from ...training.jobs import PolicyAdapter, TrainingJob
from ...types import SamplingParams
from .config import TinkerConfig
from .errors import Refused, Unavailable, WeightsRefused, sdk
from .saved import Manifest, named_elsewhere, read_manifest, write_manifest
from .service import TinkerService
from .training import TinkerReport, check, train

if TYPE_CHECKING:
    from .policy import TinkerPolicy

__all__ = ["TinkerAdapter", "TinkerConfig"]

logger = redacting_logger(__name__)

DEFAULT_GAP = 0.1
"""Nats a token: what `max_logprob_gap` is by default."""
PROOF_TOKENS = 32
PARTING_SECONDS = 10.0
"""What a step that is under way may still take when the adapter is closed."""


class TinkerAdapter(PolicyAdapter[TrainingJob]):
    """Trains `policy` on the trajectories that it is given. seed: of the first weights and of the order in which
    trajectories are trained on. tokenizer: one that is loaded already.

    A job trains to its end, or it leaves the weights as they were: after a failure of the service it is begun again from
    the state before it, so that no step counts twice, and with its last failure that state is what continues. A job that is
    canceled keeps the steps that it has made.
    """

    adapter_config: TinkerConfig
    backend = "tinker"

    def __init__(self, adapter_config: TinkerConfig, seed: int = 0, *, tokenizer: Any = None) -> None:
        super().__init__(adapter_config)
        self.seed = seed
        self._tokenizer = tokenizer
        self._service = TinkerService(adapter_config, seed)

    @property
    def tell(self) -> Callable[[str | None], None]:
        """Told what a run has to wait for, in words; None: nothing any more."""
        return self._service.tell

    @tell.setter
    def tell(self, tell: Callable[[str | None], None]) -> None:
        self._service.tell = tell

    if TYPE_CHECKING:

        @property
        def policy(self) -> TinkerPolicy:  # type: ignore[override]
            """What is sampled and trained. Loads the tokenizer. Raises MissingExtra without the SDK or transformers."""
            ...

    def _make_policy(self) -> TinkerPolicy:
        sdk()
        from .policy import TinkerPolicy

        config, tokenizer = self.adapter_config, self._tokenizer
        if tokenizer is None:
            try:
                tokenizer, end_ids = load_tokenizer(config.tokenizer or config.model)
            except ImportError as error:
                raise MissingExtra("the training backend tinker", "tinker") from error
        else:
            end_ids = [tokenizer.eos_token_id]
        return TinkerPolicy(self._service, tokenizer, end_ids)

    def _probe(self) -> None:
        """Whether the service offers the model and understands this SDK. No model is put into training yet."""
        self._service.probe()

    def _check(self, batch: TrainingBatch) -> TinkerReport:
        check(batch, self._service.longest)
        return TinkerReport()

    def _exclusive(self, job: TrainingJob) -> AbstractContextManager[bool]:
        service = self._service
        return service.turns.training(job.stopped) if service.shares_weights else nullcontext(True)

    def _train(self, job: TrainingJob, batch: TrainingBatch, number: int) -> None:
        """The job's steps, begun again from the weights before them as often as `retries` says. Raises BackendError, and
        the policy is then what it was."""
        service, config, version = self._service, self.adapter_config, self.policy.version
        service.paused = job.say
        failures = 0
        while True:
            report = job.report = TinkerReport()
            kept = False
            try:
                service.keep(_name(f"before-job-{number}"), version)
                kept = True
                if service.kept_version == version:  # it is sampled meanwhile, also if the service lost the session
                    service.keep_sampler(version)
                rng = np.random.default_rng([self.seed % 2**64, number - 1])
                train(service, version, batch, config, rng, report, job.stepped, job.stopped)
                return
            except BaseException as error:
                made = report.steps
                job.report = TinkerReport()  # its steps are not in the weights that continue
                if kept:  # else the only copy of the weights is the one that has not been touched yet
                    service.drop()
                if isinstance(error, WeightsRefused) and service.takes_weights:
                    logger.info("the service takes no weights for tokens: %s", error)
                    service.takes_weights = False
                    continue
                failures += 1
                if not isinstance(error, Unavailable) or failures > config.retries or job.stopped():
                    raise
                logger.warning("training job %s is begun again after %d steps: %s", job.id, made, error)
                job.say(f"begun again (retry {failures} of {config.retries}): {redact_text(str(error))}")
                job.canceled.wait(config.retry_delay * 2 ** (failures - 1))

    async def keep_sampling(self) -> int:
        """Keeps the sampler of the weights as they are now. Raises BackendError where the service does not give it."""
        policy = await in_daemon_thread(self._load)
        await in_daemon_thread(self._service.keep_sampler, policy.version)
        return policy.version

    def _on_trained(self) -> None:
        """Offers the new weights for sampling. If that fails now, the next reply that is asked for tries again."""
        version = self.policy.version
        if self._service.kept_version is not None:
            return  # the next epoch is sampled by older ones; a service may have room for one sampler alone
        try:
            self._service.sampler(version)
        except BackendError as error:
            logger.warning("the weights of policy version %d cannot be sampled yet: %s", version, error)

    async def save(
        self,
        directory: str | Path,
        merge: bool = False,
        dtype: str | None = None,
        base: str | None = None,
        prove: bool | None = None,
    ) -> Path:
        """Brings the trained adapter home from the service, and writes it and the tokenizer to `directory`.

        What PEFT makes of the adapter is compared with the service: log probabilities that the service told when it sampled are
        computed again, which takes the base model, torch and peft.

        Args:
            directory: Where to. An older model there is replaced.
            merge: Add the adapter to the base model's weights, which takes the base model.
            dtype: With `merge`: of the weights, such as "float32". Default: the one that the base model is stored in.
            base: The base model on this machine, a directory or a name in Hugging Face's cache. Default: the config's `base`.
            prove: Whether the adapter is compared. Default: where the base model is here. False saves the time and the memory.

        Returns:
            The directory.

        Raises:
            BackendError: The service gives no archive, it is damaged, it is not the model that was sampled, or it cannot be
                written. What was in the directory is then as it was.
            ConfigError: `merge` or `prove`, and the base model is not on this machine.
            MissingExtra: They take torch and peft.
        """
        from .archive import bring_home

        policy, config = self.policy, self.adapter_config
        await self._all_ended()
        base = base or config.base or config.model
        replies = [(ids, sample) for version, ids, sample in policy.recent if version == policy.version]
        if prove is not False and not replies:
            prompt = policy.render([{"role": "user", "content": "Hello"}])
            replies = [(prompt, await policy.sample(prompt, SamplingParams(1.0, PROOF_TOKENS), 0))]

        def fetch(place: Path, longest: int) -> None:
            self._service.archive(_name("save-model"), policy.version, place, longest)

        def save() -> Path:
            limit = config.max_logprob_gap or DEFAULT_GAP
            return bring_home(
                Path(directory), fetch, base, policy.tokenizer, replies, limit, merge=merge, dtype=dtype, prove=prove
            )

        return await in_daemon_thread(save)

    async def save_checkpoint(self, directory: str | Path) -> int:
        """Saves weights and optimizer on the service, and writes to `directory` where they are; returns the bytes written.

        Waits for the jobs submitted so far. An older checkpoint of that name is replaced; the state it named stays on the
        service. Raises BackendError where either cannot be saved.
        """
        policy, config = self.policy, self.adapter_config
        ended = self._submitted
        await self._all_ended()

        def save() -> int:
            place = Path(directory).absolute()
            manifest = Manifest(
                state=self._service.save(_name(place.name), policy.version),
                model=config.model,
                rank=config.rank,
                service=redact_text(config.base_url) if config.base_url else None,
                policy_version=policy.version,
                jobs=max(ended, self._trained),
            )
            return write_manifest(place, manifest)

        return await in_daemon_thread(save)

    async def load_checkpoint(self, directory: str | Path) -> None:
        """Puts policy and optimizer where they were when `save_checkpoint` wrote `directory`; settings stay.

        The service loads a state into a new model only: the one in training is given up first. Raises BackendError while
        a job is at work, for what is no checkpoint of this model, and where the service cannot load it; what was saved
        last is then what continues.
        """
        self._require_no_job_at_work()
        policy, config, service = self.policy, self.adapter_config, self._service

        def load() -> None:
            manifest = read_manifest(Path(directory).absolute(), config.model, config.rank)
            before = service.saved
            service.begin_from(manifest.state, manifest.policy_version)
            try:
                service.model(manifest.policy_version)
            except BaseException:
                service.begin_from(*before)
                raise
            policy.version = manifest.policy_version
            self._submitted = self._trained = manifest.jobs

        await in_daemon_thread(load)

    def forget_checkpoints(self, directories: Sequence[Path]) -> None:
        """Deletes on the service what these checkpoints name, and no other checkpoint does. They are about to be deleted.

        Raises BackendError where the service cannot be asked at the moment.
        """
        config = self.adapter_config
        for directory in directories:
            try:
                state = read_manifest(directory.absolute(), config.model, config.rank).state
            except BackendError as error:
                logger.warning("nothing is deleted on the service: %s", error)
                continue
            if named_elsewhere(state, directories):
                continue
            try:
                self._service.forget(state)
            except Refused as error:
                logger.warning("the saved state %s stays on the service: %s", state, error)

    async def aclose(self) -> None:
        """Cancels what still runs, waits for the step that is under way, for a while, and gives up the model in training."""
        try:
            await asyncio.wait_for(super().aclose(), PARTING_SECONDS)
        except TimeoutError:
            self._service.closing.set()
            await self._all_ended()
        await in_daemon_thread(self._service.close)


def _name(what: str) -> str:
    """A name on the service that no other checkpoint has, of any run."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', what)[:40]}-{uuid.uuid4().hex[:12]}"


@register_trainer_adapter(config_type=TinkerConfig)
async def tinker(config: TinkerConfig, builder: Builder):
    adapter = TinkerAdapter(config, seed=builder.config.run.seed)
    adapter.tell = functools.partial(setattr, builder, "doing")
    yield adapter
    await adapter.aclose()
