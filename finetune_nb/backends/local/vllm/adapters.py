"""The trained adapter on a vLLM server: one name and one folder for each state of the weights.

Nothing is loaded over what is there: a request that is under way keeps the weights that it began with. A name is unloaded
before its folder is deleted, and not while one of its requests is under way: vLLM reads a folder again whenever its adapter is
needed and is not in memory, and ends with all that it was doing if the folder is gone.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....errors import BackendError, ConfigError
from ....redaction import redacting_logger
from ....store.durable import machine_id
from .client import ServerGone, VLLMClient, message_of, says_dead
from .served import ServedPolicy

__all__ = ["ServedAdapters"]

logger = redacting_logger(__name__)

KEPT = 2
"""Names that stay loaded: the newest, and the one before it."""
SHARED_DISK_SECONDS = 10.0
"""How long a folder that was just written may be unknown to a server on another machine."""


class ServedAdapters(ServedPolicy):
    """See `ServedPolicy`. folder: where adapters are written, which the server reads."""

    what = "the adapter"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, f"adapters-{machine_id()}-{os.getpid()}-{secrets.token_hex(4)}")
        self.prefix = f"finetune_nb-{secrets.token_hex(6)}"
        """With which all names begin: nobody else's on that server do."""
        self._names: dict[Any, str] = {}  # id of the weights -> name, in the order in which they were loaded
        self._retired: list[str] = []  # unloaded, but their folder is still there
        self.pinned: str | None = None
        """The name that stays loaded, however old it is."""
        self._lock = threading.Lock()
        self._count = 0

    def name_of(self, weights_id: Any) -> str | None:
        return self._names.get(weights_id)

    @property
    def names(self) -> set[str]:
        return set(dict(self._names).values())

    def load(
        self,
        client: VLLMClient,
        base: str,
        weights_id: Any,
        save: Callable[[Path], object],
        given_up: Callable[[], bool],
    ) -> str:
        self._count += 1
        if self._count == 1:
            self._remove_leftovers()
        name = f"{self.prefix}-v{weights_id}-{self._count}"
        place = self.folder / name
        self._write(place, save)
        try:
            self._ask_to_load(client, name, place)
        except ServerGone:
            self._retired.append(name)  # it may have been loaded all the same
            raise
        except BackendError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return name

    def take(self, weights_id: Any, name: str) -> None:
        self._names[weights_id] = name

    def load_again(self, client: VLLMClient, weights_id: Any, name: str) -> None:
        """Has the server load an adapter that it has lost, from its folder. Raises as `load`."""
        place = self.folder / name
        if not place.is_dir():
            raise BackendError(
                f"the vLLM server has lost the adapter {name}, and {place} is gone: what was to be sampled with it cannot be. "
                "Run the epoch again, with the newest weights."
            )
        self._ask_to_load(client, name, place)
        with self._lock:
            self._retired = [other for other in self._retired if other != name]
            self._names = {weights_id: name, **self._names}  # before the newest

    def drop(self, client: VLLMClient, name: str) -> None:
        self._unload(client, name)

    def forget(self) -> None:
        with self._lock:
            self._retired += self._names.values()
            self._names = {}

    def forget_name(self, name: str) -> bool:
        with self._lock:
            known = [weights_id for weights_id, other in self._names.items() if other == name]
            for weights_id in known:
                del self._names[weights_id]
                self._retired.append(name)
        return bool(known)

    def clean(self, client: VLLMClient | None, keep: int = KEPT) -> None:
        """Unloads all but the newest, and deletes the folders of those that no request uses."""
        names = dict(self._names)
        for weights_id, name in list(names.items())[: len(names) - keep]:
            if name == self.pinned:
                continue
            with self._lock:
                self._names.pop(weights_id, None)
            if client is not None:
                self._unload(client, name)
            else:
                self._retired.append(name)
        for name in list(self._retired):
            if name not in self.under_way and name != self.pinned:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                self._retired.remove(name)

    def close(self, client: VLLMClient | None) -> None:
        self.pinned = None
        self.clean(client, keep=0)
        super().close(client)

    def _ask_to_load(self, client: VLLMClient, name: str, place: Path) -> None:
        deadline = time.monotonic() + SHARED_DISK_SECONDS
        body = {"lora_name": name, "lora_path": str(place.absolute())}
        while True:
            status, answer = client.ask("POST", "/v1/load_lora_adapter", body, timeout=300.0)
            said = message_of(answer)
            if status == 200:
                return
            if status == 404 and "No adapter found" in said and time.monotonic() < deadline:
                time.sleep(0.25)  # a disk that several machines share shows it a moment later
                continue
            if says_dead(answer):
                raise ServerGone(f"the vLLM server at {client.root} has ended ({status}: {said})")
            raise _refusal(client, status, said, place)

    def _unload(self, client: VLLMClient, name: str) -> None:
        try:
            status, answer = client.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout=60.0)
        except ServerGone:
            status, answer = 0, ""
        if status not in (0, 200, 404):  # 404: it had forgotten it
            logger.warning("the vLLM server does not unload %s (%d: %s)", name, status, message_of(answer))
            return  # its folder stays, as the server may read it again
        self._retired.append(name)

    def _remove_leftovers(self) -> None:
        """Deletes what processes of this machine left that have ended. Nobody asks for their adapters any more."""
        begin = f"adapters-{machine_id()}-"
        for place in self.parent.glob(f"{begin}*"):
            pid = place.name.removeprefix(begin).partition("-")[0]
            if (
                pid.isdigit()
                and not place.is_symlink()
                and not os.path.exists(f"/proc/{pid}")
                and os.path.isdir("/proc")
            ):
                shutil.rmtree(place, ignore_errors=True)


def _refusal(client: VLLMClient, status: int, said: str, place: Path) -> BackendError | ConfigError:
    """The error for an adapter that the server does not load."""
    told = f"the vLLM server at {client.root} refuses the adapter ({status}: {said})."
    if "No adapter found" in said:
        return ConfigError(
            f"{told} Expected that it sees {place}: on another machine, set sampler.folder to one that both have under the same "
            "name."
        )
    if status in (404, 405):
        return ConfigError(
            f"{told} Expected a server that loads adapters while it runs: start it with --enable-lora and the environment "
            "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
        )
    if "max_lora_rank" in said:
        return ConfigError(f"{told} Start the server with a larger --max-lora-rank, or choose a smaller lora.rank.")
    if "enable_lora" in said or "enable-lora" in said or "LoRA is not enabled" in said:
        return ConfigError(f"{told} Start it with --enable-lora.")
    return BackendError(f"{told} Choose other layers as lora.target, or sample without a server (leave sampler out).")
