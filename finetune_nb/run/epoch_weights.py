"""The weights that epochs of a run left, loaded beside those of the run: what recorded tokens are worth under them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..analysis.rollout_group import RolloutGroup
from ..analysis.trajectory_names import trajectory_names
from ..components.builder import Builder
from ..config.sections import Config
from ..errors import ConfigError, RunError
from ..interfaces import TrainerAdapter
from ..redaction import redacting_logger
from ..rollouts.episodes import SampledTurn, sampled_turns
from ..store.checkpoints import weights_of_epochs
from ..store.durable import check_tree
from ..store.reader import RunReader
from ..threads import EngineThread
from ..types import Epoch, Trajectory

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "EpochWeights",
    "changes_of",
    "tokens_with_changes",
]

T = TypeVar("T")
KEPT_SECONDS = 120.0
"""How long a model stays loaded that nobody asks."""
logger = redacting_logger(__name__)


class EpochWeights:
    """Loads the run's model a second time, on a thread of its own, and releases it when nobody has asked for two minutes.

    Args:
        config: The run's.
        added: Components that the run was given as objects, as `Builder.added` lists them.
    """

    def __init__(self, config: Config, added: Iterable[tuple[str, str, Any]]) -> None:
        self._config = config
        self._name = config.finetuning.trainer_adapter or ""
        self._given = [component for kind, name, component in added if (kind, name) == ("trainer_adapter", self._name)]
        self._lock = threading.RLock()
        self._engine = EngineThread("ft-epoch-weights")
        self._builder: Builder | None = None
        self._loaded: tuple[Path, int, int] | None = None
        self._release: threading.Timer | None = None

    def logprobs(self, store: RunReader, epoch: int, trajectory: Trajectory) -> list[list[float]]:
        """Compute the log probabilities of a trajectory's sampled tokens.

        Args:
            store: The run's folder.
            epoch: The weights are those after this epoch.
            trajectory: Of any epoch.

        Returns:
            As `TrainerAdapter.token_logprobs`.

        Raises:
            RunError: The weights are not kept.
            ConfigError: The backend cannot do it here.
            BackendError: The trajectory lacks ids, the checkpoint does not fit, or memory runs out.
            MissingLogprobs: A sampled turn has no logprobs.
        """
        known = weights_of_epochs(store)
        if epoch not in known:
            some = ", ".join(map(str, list(known)[-12:]))
            raise RunError(
                f"the weights after epoch {epoch} of run {store.run_id!r} are not kept. "
                + (f"Those after epochs {some} are." if known else "No epoch's are.")
                + " run.checkpoint_every and run.keep_checkpoints keep more."
            )
        checkpoint = known[epoch]
        if checkpoint is not None:
            check_tree(store.folder, checkpoint)
        with self._lock:
            self._stay()
            try:
                return self._run(self._score(checkpoint, trajectory))
            finally:
                self._stay(KEPT_SECONDS)

    def close(self) -> None:
        """Releases the model. It is loaded again when it is asked for."""
        with self._lock:
            self._stay()
            builder, self._builder, self._loaded = self._builder, None, None
            if builder is not None:
                try:
                    self._engine.close_after(builder.close)
                except Exception:
                    logger.warning("the weights of an epoch could not be closed well", exc_info=True)

    def _stay(self, seconds: float | None = None) -> None:
        """Releases the model after so many seconds; None: it stays."""
        if self._release is not None:
            self._release.cancel()
            self._release = None
        if seconds is not None and self._builder is not None:
            self._release = threading.Timer(seconds, self.close)
            self._release.daemon = True
            self._release.start()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._engine.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # whoever waits was interrupted
            raise

    async def _score(self, checkpoint: Path | None, trajectory: Trajectory) -> list[list[float]]:
        if checkpoint is None and self._loaded is not None and self._builder is not None:
            builder, self._builder, self._loaded = self._builder, None, None
            await builder.close()  # the weights that the run began with come with the model
        adapter = await self._adapter()
        found = _identity(checkpoint)
        if checkpoint is not None and found != self._loaded:
            self._loaded = None
            await adapter.load_weights(checkpoint)
            self._loaded = found
        return await adapter.token_logprobs(trajectory)

    async def _adapter(self) -> TrainerAdapter:
        """A trainer adapter as the run's is, which trains nothing."""
        if self._given:
            raise ConfigError(
                f"this run was given its {type(self._given[0]).__name__} as an object, which cannot be loaded a second time. "
                "Expected one that the config names, such as model='...' of ft.Run or trainer_adapters in the YAML."
            )
        if self._config.run.trains_elsewhere:
            raise ConfigError(
                "the model of this run is on a Ray cluster (run.ray.trainer), and is not loaded here. Expected one of this "
                "process: open the run's folder with run.ray.trainer switched off in config.yml."
            )
        if self._builder is None:
            # What points back at the run's own components points at the copy's.
            own = self._config.builder
            config = copy.deepcopy(self._config, {id(own): None} if own is not None else {})
            config.trainer_adapters[self._name] = config.trainer_adapters[self._name].to_score()
            self._builder = Builder(config)
        adapter = await self._builder.get_trainer_adapter(self._name)
        if type(adapter).token_logprobs is TrainerAdapter.token_logprobs:
            raise ConfigError(
                f"{type(adapter).__name__} cannot compute the log probabilities of recorded tokens. The adapters local_grpo, "
                "trl_sft and trl_dpo can."
            )
        return adapter


def _identity(checkpoint: Path | None) -> tuple[Path, int, int] | None:
    """Tells a checkpoint from another one of its name: an epoch that is run again writes its own."""
    if checkpoint is None:
        return None
    found = checkpoint.stat()
    return checkpoint, found.st_ino, found.st_mtime_ns


def changes_of(trajectory: Trajectory, after: Sequence[Sequence[float]]) -> list[list[float]]:
    """What the log probability of each sampled token has changed by.

    Args:
        trajectory: Has those of when it was sampled.
        after: For each sampled turn one number a token.

    Returns:
        The same, minus those of when it was sampled.
    """
    changes = []
    for place, logprobs in zip(sampled_turns(trajectory), after, strict=True):
        turn = SampledTurn.of(trajectory.episode[place])
        assert turn is not None and turn.logprobs is not None  # the adapter has looked at them
        changes.append([now - then for now, then in zip(logprobs, turn.logprobs, strict=True)])
    return changes


def tokens_with_changes(
    record: Epoch, group: RolloutGroup, place: int, changes: Sequence[Sequence[float]]
) -> pd.DataFrame:
    """The tokens of one rollout, as `frames.tokens` has them, with what `changes_of` found as a column.

    Args:
        record: Of its epoch.
        group: Of its example.
        place: Its position in the group.
        changes: As `changes_of` returns them.
    """
    from .. import frames

    (name,) = trajectory_names(group.epoch, [group.example], [group.generation(place)], [place])
    tokens = frames.tokens([record], group.example)
    tokens = tokens[tokens.trajectory == name].reset_index(drop=True)
    values = [value for turn in changes for value in turn]
    if len(values) != len(tokens):
        raise RunError(f"{name} is the name of more than one rollout, whose tokens cannot be told apart.")
    return tokens.assign(change=values)
