"""The trainer's actor as a run's process reaches it: found by the name that the run's folder gives it, or started; asked, with
its errors told apart; ended.

"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...config.base import TrainerAdapterConfig
from ...config.sections import RunSettings
from ...engine.live_settings import live_names
from ...errors import BackendError, FinetuneError
from ...redaction import known_secrets, redact_text
from ...threads import in_daemon_thread, start_daemon
from .cluster import NAMESPACE, actor_options, connect, greet, require, trainer_resources, workers_at_least
from .remote_policy import RemotePolicy
from .trainer_actor import RunState, TrainerActor

__all__ = [
    "TrainerLink",
    "TrainerLost",
    "actor_name",
]

HEARD_SECONDS = 60.0
"""Between two signs of life, at most."""
ENDING_SECONDS = 30.0
"""Until the name of an actor that was ended is free again."""


class TrainerLost(BackendError):
    """The actor is gone, and what was not saved with it."""


class TrainerLink:
    """section: the config of the adapter in the actor. folder: of the run that it trains; None: of none. in_doubt: whether the
    weights may be others than those that the last answer spoke of."""

    def __init__(
        self, section: TrainerAdapterConfig, run: RunSettings, folder: Path | None, in_doubt: Callable[[], bool]
    ) -> None:
        self.section, self.run, self.name, self._in_doubt = section, run, actor_name(folder), in_doubt
        self._made_of = {"seed": run.seed, **section.model_dump(mode="json", exclude={"reward", *live_names(section)})}
        self.ray: Any = None
        self._actor: Any = None
        self._policy: RemotePolicy | None = None
        self.found = False
        """The actor was there, and it is not known yet whether its weights are those that this run continues from."""
        self.as_asked = True
        """It was made with the settings that are asked for now."""
        self._parted: threading.Event | None = None

    @property
    def policy(self) -> RemotePolicy:
        """The actor's, sampled from here. Raises BackendError before `open`."""
        if self._policy is None:
            raise BackendError("the trainer's actor is not there yet. Await open() first; a Run does it for you.")
        return self._policy

    async def open(self) -> None:
        """Finds the run's actor, or starts one and loads the model there. Raises BackendError where the cluster cannot
        give it, and what loading raises."""
        self.ray = await in_daemon_thread(connect, self.run.engine, self.run.ray.runtime_env)
        settings = self.run.ray
        wanted = [("the trainer", 1, trainer_resources(self.ray, settings)), workers_at_least(settings)]
        require(self.ray, wanted)
        with suppress(ValueError):  # there is none
            self._actor = await in_daemon_thread(self.ray.get_actor, self.name, NAMESPACE)
            self.found = True
        if not self.found:
            await self._start()
        else:
            await self._meet()

    async def _start(self) -> None:
        settings = self.run.ray
        resources = trainer_resources(self.ray, settings)
        make = self.ray.remote(TrainerActor).options(
            name=self.name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_concurrency=1000,
            num_cpus=resources["CPU"],
            num_gpus=resources["GPU"],
            **actor_options(settings),
        )
        there = self.run.model_copy(update={"engine": "local"})
        parts = self.section, there, self._made_of, known_secrets(), list(map(os.path.abspath, sys.path))
        deadline = time.monotonic() + ENDING_SECONDS
        while True:
            try:
                self._actor = make.remote(*parts)  # in no thread: whoever is canceled must know of it
                break
            except ValueError:  # one of that name is still ending
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
        await self._meet()

    async def _meet(self) -> None:
        asked = "what run.ray asks for"
        older = f" An actor that an older process left ends by ray.kill(ray.get_actor({self.name!r}, {NAMESPACE!r}))."
        who, package = "the trainer's actor", "finetune_nb[local]"
        await greet(self.ray, self._actor, who, self.run.ray, asked, package, older if self.found else "")
        if not self.found:
            self.keep()
        face, standing = await self._answer(self._actor.open.remote())
        self.as_asked = face.made_of == self._made_of
        if self._policy is None:
            self._policy = RemotePolicy(face, self.ask, self._get, self._in_doubt)
        else:
            self._policy.moved(face)
        self._policy.heard(standing)

    def keep(self) -> None:
        """From now on the actor hears of this process regularly, until `end`: one that hears of none ends by itself."""
        if self._parted is not None:
            return
        parted = self._parted = threading.Event()
        timeout = self.run.ray.orphan_timeout
        pause = HEARD_SECONDS if timeout is None else min(HEARD_SECONDS, timeout / 4)

        def work() -> None:
            while not parted.is_set():
                with suppress(Exception):  # it is gone: that is an error of the next call
                    self._actor.heard.remote(timeout)
                parted.wait(pause)

        start_daemon(work, "finetune_nb trainer's actor", parted.set)

    async def replace(self) -> None:
        """Ends the actor, and starts another one in its place."""
        self.ray.kill(self._actor)
        await self._start()

    @property
    def is_ours(self) -> bool:
        """Whether there is an actor that no other process may be using."""
        return self._actor is not None and not self.found

    def end(self) -> None:
        """Ends the actor, unless it is one that another process may be using. The cluster keeps running."""
        if self._parted is not None:
            self._parted.set()
            self._parted = None
        if self.is_ours and self.ray.is_initialized():
            self.ray.kill(self._actor)
        self._actor = None

    # ── asking it ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def ask(self, method: str, *args: Any) -> Any:
        """A method of the actor, or of the adapter in it. Raises what that raises; TrainerLost where the actor is gone."""
        remote = getattr(self._actor, method, None)
        call = remote.remote(*args) if remote is not None else self._actor.ask.remote(method, *args)
        answer, standing = await self._answer(call)
        self.policy.heard(standing)
        return answer

    async def sees(self, path: str) -> bool:
        """Whether a file of this disk is on the actor's, too."""
        return await self._answer(self._actor.sees.remote(path))

    async def _answer(self, call: Any) -> Any:
        try:
            return await call
        except Exception as error:
            raise self._meant(error) from None

    def _get(self, method: str) -> tuple[Any, RunState]:
        """For threads that may wait."""
        try:
            answer, standing = self.ray.get(getattr(self._actor, method).remote())
        except Exception as error:
            raise self._meant(error) from None
        self.policy.heard(standing)
        return answer, standing

    def _meant(self, error: Exception) -> Exception:
        """The error of ours that an error of Ray means."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, FinetuneError):
            return cause
        if isinstance(error, self.ray.exceptions.RayActorError):
            return TrainerLost(
                f"the trainer's actor was lost: {redact_text(str(error)).splitlines()[0][:300]} Does it need more memory? Close "
                "the run and open its folder again: a new actor continues from the newest checkpoint."
            )
        if isinstance(error, self.ray.exceptions.RayError):
            told = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
            return BackendError(f"the trainer's actor failed: {redact_text(told)[:600]}")
        return error


def actor_name(folder: Path | None) -> str:
    """The name of a run's actor: the run's, and whose folder it is."""
    if folder is None:
        return f"trainer-{uuid.uuid4().hex}"
    return f"trainer-{folder.name}-{hashlib.blake2b(os.fsencode(folder.absolute()), digest_size=6).hexdigest()}"
