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
from pathlib import Path
from typing import Any

from ....errors import BackendError, ConfigError
from .client import VLLMClient, message_of
from .served import ServedPolicy

__all__ = ["ServedWeights"]

RELOAD_SECONDS = 900.0


class ServedWeights(ServedPolicy):
    """See `ServedPolicy`. folder: where weights are written, which the server reads."""

    what = "the model"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, f"weights-{os.getpid()}-{secrets.token_hex(4)}")
        self._loaded: tuple[Any, str] | None = None  # id of the weights, and the model's name

    def name_of(self, weights_id: Any) -> str | None:
        loaded = self._loaded
        return loaded[1] if loaded is not None and loaded[0] == weights_id else None

    @property
    def names(self) -> set[str]:
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
        """Once no request is under way. After an error that is not a ConfigError, the server has no weights any more."""
        self._loaded = None  # from here on every request waits
        while len(self.under_way) and not given_up():
            time.sleep(0.02)
        place = self.folder / str(weights_id)
        self._write(place, save)
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
        self._loaded = weights_id, name

    def drop(self, client: VLLMClient, name: str) -> None:
        """There is nothing to go back to: the next weights replace them."""

    def forget(self) -> None:
        self._loaded = None

    def forget_name(self, name: str) -> bool:
        known, self._loaded = self._loaded is not None, None
        return known

    def clean(self, client: VLLMClient | None) -> None:
        """There is nothing to keep."""
