"""The Ray cluster: reached once a process, and asked whether it can give what a run wants, before anything waits for it.

Ray's own token authentication is left as it is found: Ray hands its token to the processes that it starts, and the token is
hidden in whatever this process shows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...config.sections import RaySettings
from ...errors import BackendError, ConfigError, MissingExtra
from ...redaction import redact_text, remember_secret

__all__ = [
    "NAMESPACE",
    "connect",
    "greet",
    "ray_package",
    "require",
    "total",
    "trainer_resources",
    "workers_at_least",
]

NAMESPACE = "finetune_nb"
"""In which the trainers of runs have their names."""

ATTEMPTS = 3
"""Starts of a cluster of one's own: on a busy machine Ray gives up after 15 seconds, and is quicker the next time."""
_connecting = threading.Lock()


def ray_package() -> Any:
    """The package `ray`. Raises MissingExtra."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("run.engine 'ray'", "ray") from error
    return ray


def connect(engine: str) -> Any:
    """Ray, connected as `run.engine` says; blocks for seconds where it is not yet. A cluster that this process is connected
    to already is taken. Raises BackendError where there is none to connect to."""
    ray = ray_package()
    address = engine.partition(":")[2]
    with _connecting:
        if ray.is_initialized():
            _remember_token()
            found = ray.get_runtime_context().gcs_address
            if address not in ("", "auto", found):
                raise ConfigError(
                    f"found engine {engine!r}, but this process is connected to the Ray cluster at {found}; it can be to one "
                    "only. Restart the kernel, or call ray.shutdown() first."
                )
            return ray
        options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        for attempt in range(1 if address else ATTEMPTS):
            try:
                _in_lasting_thread(
                    lambda: ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE, **options)
                )
                break
            except Exception as error:  # Ray raises plain Exception, ConnectionError, RuntimeError, ...
                with suppress(Exception):
                    ray.shutdown()
                if attempt + 1 < (1 if address else ATTEMPTS):
                    continue
                _remember_token()
                where = f"no Ray cluster answers at {address!r}" if address else "Ray could not be started here"
                raise BackendError(
                    f"{where}: {redact_text(str(error))[:500]} Expected one for engine {engine!r}. Start one with `ray start "
                    "--head`, take engine 'ray' for one of this machine alone, or 'local' for none."
                ) from None
        _remember_token()
    return ray


def _in_lasting_thread(start: Callable[[], Any]) -> None:
    """Linux ends Ray's processes together with the thread that started them, so this one stays where it was successful."""
    started: Future[None] = Future()

    def work() -> None:
        try:
            start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        threading.Event().wait()

    threading.Thread(target=work, name="finetune_nb ray", daemon=True).start()
    started.result()


def _remember_token() -> None:
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"]
    for place in filter(None, places):
        with suppress(OSError, UnicodeDecodeError):
            remember_secret(Path(place).read_text(encoding="utf-8").strip())
    remember_secret(os.environ.get("RAY_AUTH_TOKEN", ""))


def total(ray: Any, resource: str) -> float:
    """How much of a resource all nodes have together, free or taken."""
    return float(ray.cluster_resources().get(resource, 0.0))


def trainer_resources(ray: Any, settings: RaySettings) -> dict[str, float]:
    """What the trainer takes of the cluster: nothing where training stays in the kernel."""
    if not settings.trainer:
        return {"CPU": 0, "GPU": 0}
    gpus = settings.trainer_gpus
    return {"CPU": settings.trainer_cpus, "GPU": float(total(ray, "GPU") >= 1) if gpus is None else gpus}


def workers_at_least(settings: RaySettings, count: int | None = None) -> tuple[str, int, dict[str, float]]:
    """For `require`: so many workers, those that the settings name, or one."""
    each = {"CPU": settings.worker_cpus, "GPU": settings.worker_gpus}
    return "rollout workers", count or settings.workers or 1, each


async def greet(ray: Any, actor: Any, who: str, settings: RaySettings, asked: str, package: str) -> dict[str, str]:
    """Waits until an actor is there; returns its versions. who, asked, package: what the errors call it, the resources that it
    was to have, and what must be installed for it. Raises BackendError where it does not come."""
    seconds = settings.start_timeout
    try:
        return await asyncio.wait_for(actor.hello.remote(), seconds)
    except TimeoutError:
        free = ray.available_resources()
        raise BackendError(
            f"{who} has not started after {seconds:g} s (run.ray.start_timeout); free in the Ray cluster are "
            f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU, expected {asked}. Others may have taken them: wait, or "
            "ask for less."
        ) from None
    except ray.exceptions.RayError as error:
        raise BackendError(
            f"{who} could not start: {redact_text(str(error))[:600]} Expected {package} to be installed on every node of the "
            "cluster. Install it there, or with run.ray.runtime_env."
        ) from None


def require(ray: Any, wanted: Sequence[tuple[str, int, Mapping[str, float]]]) -> None:
    """Raises BackendError where the cluster, were it idle, could not hold what is wanted: triples of what it is for, how many
    actors, and the resources of each. Ray itself would let them wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = ", ".join(f"{_number(total(ray, name))} {name}" for name in ("CPU", "GPU"))
    for what, _, each in wanted:
        asked = " and ".join(f"{_number(amount)} {name}" for name, amount in each.items() if amount)
        if not any(all(node.get(name, 0) >= amount for name, amount in each.items()) for node in nodes):
            raise BackendError(
                f"found {there} on {len(nodes)} nodes of the Ray cluster; expected one node with {asked}, for {what}. Ask for "
                "less in run.ray, or add a node that has it."
            )
    for name in {name for _, _, each in wanted for name in each}:
        needed = sum(count * each.get(name, 0) for _, count, each in wanted)
        if needed > total(ray, name) + 1e-9:
            parts = " and ".join(
                f"{count} x {_number(each[name])} for {what}" for what, count, each in wanted if each.get(name)
            )
            raise BackendError(
                f"found {there} in the Ray cluster; expected {_number(needed)} {name}: {parts}. Ask for fewer workers or less "
                "for each in run.ray, or add nodes."
            )


def _number(value: float) -> str:
    return f"{value:g}"
