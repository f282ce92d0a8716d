"""What a run's checkpoints name on a training service, deleted before the checkpoints are."""

from __future__ import annotations

import copy
from pathlib import Path

from ..components.builder import Builder
from ..config.sections import Config
from ..errors import FinetuneError
from ..interfaces import TrainerAdapter
from ..redaction import redacting_logger
from ..store.durable import check_tree
from ..store.folder import checkpoints
from ..threads import EngineThread

__all__ = ["forget_checkpoints"]

logger = redacting_logger(__name__)


def forget_checkpoints(folder: Path, config: Config, components: Builder, adapter: TrainerAdapter | None) -> None:
    """Deletes on the service what the checkpoints in a run's folder name. Where that does not work, the log says so.

    Args:
        folder: The run's.
        config: The run's.
        components: The run's; a trainer adapter that was given as an object is among them.
        adapter: The run's, if it was used. It may be closed.
    """
    name = config.finetuning.trainer_adapter or ""
    if not getattr(config.trainer_adapters.get(name), "saves_elsewhere", False):
        return
    try:
        found = checkpoints(folder)
        for place in found.values():
            check_tree(folder, place)
        if not found:
            return
        given = [each for kind, named, each in components.added() if kind == "trainer_adapter" and named == name]
        if adapter is None and given:
            adapter = given[0]
        if adapter is not None:
            _forget(adapter, list(found.values()))
            return
        own = config.builder
        engine = EngineThread("ft-forget-checkpoints")
        builder = Builder(copy.deepcopy(config, {id(own): None} if own is not None else {}))
        try:
            _forget(engine.submit(builder.get_trainer_adapter(name)).result(), list(found.values()))
        finally:
            engine.close_after(builder.close)
    except FinetuneError as error:
        logger.warning("what the checkpoints of %s name stays on the service: %s", folder, error)


def _forget(adapter: TrainerAdapter, places: list[Path]) -> None:
    forget = getattr(adapter, "forget_checkpoints", None)
    if forget is not None:
        forget(places)
