"""The Ray cluster: reached once a process, and asked whether it can give what a run wants, before anything waits for it.

Ray's own token authentication is left as it is found: Ray hands its token to the processes that it starts, and the token is
hidden in whatever this process shows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...config.sections import RaySettings
from ...errors import BackendError, ConfigError, MissingExtra
from ...redaction import redact_text, redacting_logger, remember_secret
from .nodes import check_versions, clock_warning, store_warning

__all__ = [
    "NAMESPACE",
    "actor_options",
    "connect",
    "greet",
    "ray_package",
    "require",
    "total",
    "trainer_resources",
    "workers_at_least",
]

logger = redacting_logger(__name__)

NAMESPACE = "finetune_nb"
"""In which the trainers of runs have their names."""

ATTEMPTS = 3
"""Starts of a cluster of one's own: on a busy machine Ray gives up after 15 seconds, and is quicker the next time."""
_connecting = threading.Lock()
_uploaded: dict[str, Any] = {}
"""What Ray took of this machine's folders when this process connected."""
_looked_at: set[str] = set()
"""Nodes, by their ids, of which was said what is wrong with them."""


def ray_package() -> Any:
    """The package `ray`. Raises MissingExtra."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("run.engine 'ray'", "ray") from error
    return ray


def connect(engine: str, runtime_env: Mapping[str, Any]) -> Any:
    """Ray, connected as `run.engine` says; blocks for seconds where it is not yet. A cluster that this process is connected
    to already is taken. Folders of this machine in the runtime_env are uploaded. Raises BackendError where there is no cluster
    to connect to, ConfigError where it is too late for the folders."""
    global _uploaded
    ray = ray_package()
    address = engine.partition(":")[2]
    folders = _folders(runtime_env)
    with _connecting:
        if ray.is_initialized():
            _remember_token()
            found = ray.get_runtime_context().gcs_address
            if address not in ("", "auto", found):
                raise ConfigError(
                    f"found engine {engine!r}, but this process is connected to the Ray cluster at {found}; it can be to one "
                    "only. Restart the kernel, or call ray.shutdown() first."
                )
            if folders and folders != _uploaded:
                raise ConfigError(
                    f"found {' and '.join(folders)} of this machine in run.ray.runtime_env, but this process is connected to Ray "
                    "already, which takes them only when it connects. Restart the kernel, or call ray.shutdown() first."
                )
            return ray
        options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        if folders:
            options["runtime_env"] = folders
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
                raise _no_cluster(engine, address, error) from None
        _uploaded = folders
        _remember_token()
    return ray


def _folders(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a runtime_env that lie on this machine. Ray uploads them for a whole process, and not for an actor."""
    parts = {name: runtime_env[name] for name in ("working_dir", "py_modules") if runtime_env.get(name)}
    return {name: part for name, part in parts.items() if "://" not in str(part)}


def actor_options(settings: RaySettings) -> dict[str, Any]:
    """What an actor is started with, beside its resources."""
    folders = _folders(settings.runtime_env)
    rest = {name: part for name, part in settings.runtime_env.items() if name not in folders}
    return {"runtime_env": rest} if rest else {}


def _no_cluster(engine: str, address: str, error: Exception) -> BackendError:
    reason = redact_text(" ".join(str(error).split()))[:500]
    if "Version mismatch" in reason:
        return BackendError(
            f"the Ray cluster at {address!r} has other versions than this process. {reason} Expected the same versions of Ray "
            "and Python. Install those of the cluster here, and restart the kernel."
        )
    if "InvalidAuthToken" in f"{error} {error.__cause__}":
        return BackendError(
            f"the Ray cluster at {address!r} wants its token, and did not get it from this process. Expected RAY_AUTH_MODE=token "
            "in the environment of this process when it starts, and the cluster's token in RAY_AUTH_TOKEN or in "
            "~/.ray/auth_token. Set them, and restart the kernel."
        )
    where = f"no Ray cluster answers at {address!r}" if address else "Ray could not be started here"
    return BackendError(
        f"{where}: {reason} Expected one for engine {engine!r}. Start one with `ray start --head`, take engine 'ray' for one of "
        "this machine alone, or 'local' for none."
    )


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


async def greet(
    ray: Any, actor: Any, who: str, settings: RaySettings, asked: str, package: str, remedy: str = ""
) -> None:
    """Waits until an actor is there, and says what is wrong with its node, once for each node.

    Args:
        ray: The package.
        actor: It has `hello` and `clock`.
        who: What the errors call it.
        settings: Say how long to wait.
        asked: The resources that it was to have.
        package: What must be installed for it.
        remedy: What else helps if its versions are others.

    Raises:
        BackendError: It does not come, or its node has other versions.
    """
    seconds = settings.start_timeout
    try:
        seen = await asyncio.wait_for(actor.hello.remote(), seconds)
        check_versions(who, seen, remedy)
        before = time.time()
        clock = await asyncio.wait_for(actor.clock.remote(), seconds)
        after = time.time()
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
    if seen["node"] not in _looked_at:
        _looked_at.add(seen["node"])
        stores = {node["NodeID"]: node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes()}
        warnings = store_warning(seen, stores.get(seen["node"], 0.0)), clock_warning(seen, clock, before, after)
        for warning in filter(None, warnings):
            logger.warning("%s", warning)


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
