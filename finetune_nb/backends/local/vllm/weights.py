"""All trained weights on a vLLM server: it reads them from a folder into the model that it serves.

The server has one set of weights, so requests that are under way end before they are replaced. After a reload that fails it has
none at all, although it still answers that it is healthy, and the next request would end it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....errors import BackendError, ConfigError
from .client import VLLMClient, message_of
from .under_way import UnderWay

__all__ = ["ServedWeights"]

RELOAD_SECONDS = 900.0


class ServedWeights:
    """folder: where weights are written, which the server reads. Methods that talk to the server are called one at a time."""

    def __init__(self, folder: Path) -> None:
        self.parent = folder
        self.folder = folder / f"weights-{os.getpid()}-{secrets.token_hex(4)}"
        self.under_way = UnderWay()
        self._loaded: tuple[Any, str] | None = None  # id of the weights, and the model's name

    def name_of(self, weights_id: Any) -> str | None:
        """What the server calls the model, if it has these weights."""
        loaded = self._loaded
        return loaded[1] if loaded is not None and loaded[0] == weights_id else None

    @property
    def names(self) -> set[str]:
        """What the server should know."""
        loaded = self._loaded
        return set() if loaded is None else {loaded[1]}

    def load(
        self,
        client: VLLMClient,
        base: str,
        weights_id: Any,
        save: Callable[[Path], object],
        given_up: Callable[[], bool],
    ) -> str:
        """Writes the weights with `save`, and has the server read them, once no request is under way. Returns its name of them.

        Raises:
            ConfigError: The server was started without what this needs.
            BackendError: They cannot be written, or the server does not read them, and has none any more.
        """
        self._loaded = None  # from here on every request waits
        while len(self.under_way) and not given_up():
            time.sleep(0.02)
        place = self.folder / str(weights_id)
        try:
            place.mkdir(parents=True)
            save(place)
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise BackendError(
                f"the weights cannot be written to {place}: {error}. Expected a folder with room for the model; nothing was "
                "sampled with older weights. Make room, or name another one as sampler.folder."
            ) from error
        asked = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(place.absolute())},
            "timeout": RELOAD_SECONDS,
        }
        try:
            status, answer = client.ask("POST", "/collective_rpc", asked, timeout=RELOAD_SECONDS)
            if status == 200:
                status, answer = client.ask("POST", "/reset_prefix_cache", timeout=60.0)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        if status in (404, 405):
            raise ConfigError(
                f"the vLLM server at {client.root} reads no weights while it runs ({status}). Start it with the environment "
                "variable VLLM_SERVER_DEV_MODE=1, or train an adapter: training={'lora': {}}."
            )
        if status != 200:
            raise BackendError(
                f"the vLLM server at {client.root} has not read the weights ({status}: {message_of(answer)}), and has none any "
                "more. Start it again; on another machine, set sampler.folder to a folder that both have under the same name."
            )
        return base

    def take(self, weights_id: Any, name: str) -> None:
        """Requests for these weights use that name from now on."""
        self._loaded = weights_id, name

    def drop(self, client: VLLMClient, name: str) -> None:
        """They shall not be used."""

    def forget(self) -> None:
        """The server was started anew, and has the model's own weights."""
        self._loaded = None

    def forget_name(self, name: str) -> bool:
        """The server does not know that name any more. Returns whether that is news."""
        known, self._loaded = self._loaded is not None, None
        return known

    def clean(self, client: VLLMClient | None) -> None:
        """There is nothing to keep."""

    def close(self, client: VLLMClient | None) -> None:
        """Deletes what is left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.parent.rmdir()  # unless there is a log in it
