"""The parts of a Tinker service's HTTP interface that not every version of the SDK reaches: saved states and archives are
listed, fetched and deleted, and models are unloaded.

Calls block, for threads that may wait.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from ...errors import BackendError
from ...redaction import redact_text
from .errors import Lost, Refused, Unavailable

__all__ = ["HOSTED", "ServiceRest", "is_hosted", "parts_of_path"]

HOSTED = "https://tinker.thinkingmachines.dev/services/tinker-prod"
"""Thinking Machines' service, which the SDK takes where no other is named."""
REACH_SECONDS = 10.0
"""In which a service must answer that it is there. The SDK itself would keep knocking for five minutes."""
DOWNLOAD_SECONDS = 300.0
"""Between two pieces of an archive: a service may have to pack it first."""
PATH = re.compile(r"tinker://([\w.:-]+)/(weights|sampler_weights)/([\w.:-]+)")


def is_hosted(url: str | None) -> bool:
    """Whether that address is Thinking Machines' service; None: none was named."""
    host = urlsplit(url or HOSTED).hostname or ""
    return host.endswith((".thinkingmachines.dev", ".thinkingmachines.ai"))


def parts_of_path(path: str) -> tuple[str, str, str]:
    """Model, kind ("weights" or "sampler_weights") and name of what a service saved. Raises BackendError."""
    found = PATH.fullmatch(path)
    if found is None:
        raise BackendError(f"{path!r} is no saved state of a Tinker service; expected tinker://MODEL/weights/NAME")
    model, kind, name = found.groups()
    return model, kind, name


class ServiceRest:
    """url: of the service; None: Thinking Machines' own. key: sent to that address alone. seconds: for each answer."""

    def __init__(self, url: str | None, key: str, seconds: float = REACH_SECONDS) -> None:
        self.url, self._key, self._seconds = (url or HOSTED).rstrip("/"), key, seconds

    def reach(self) -> None:
        """Raises Unavailable where nothing answers at the address."""
        import httpx  # comes with the SDK

        try:
            httpx.get(f"{self.url}/api/v1/healthz", headers={"X-API-Key": self._key}, timeout=REACH_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(
                f"no Tinker service answers at {self.url}: {type(error).__name__}: {error}. Start it, or correct base_url."
            ) from error

    def unload(self, model: str) -> None:
        """Gives the model's adapter slot back at once; otherwise it is held until its session times out. Raises BackendError."""
        self._ask("POST", "unload_model", f"unloading model {model}", {"model_id": model, "type": "unload_model"})

    def archives(self, model: str) -> list[str]:
        """The names of the model's saved sampler weights. Raises BackendError."""
        answer = self._ask("GET", f"training_runs/{model}/checkpoints", f"listing what is saved of model {model}")
        found = answer.get("checkpoints") if isinstance(answer, dict) else None
        names = []
        for checkpoint in found if isinstance(found, list) else []:
            if isinstance(checkpoint, dict) and checkpoint.get("checkpoint_type") == "sampler":
                name = str(checkpoint.get("checkpoint_id")).removeprefix("sampler_weights/")
                if re.fullmatch(r"[\w.:-]+", name):
                    names.append(name)
        return names

    def delete(self, path: str) -> None:
        """Deletes a saved state or archive; one that is not there is fine. Raises BackendError."""
        model, kind, name = parts_of_path(path)
        try:
            self._ask("DELETE", f"training_runs/{model}/checkpoints/{kind}/{name}", f"deleting {path}")
        except Lost:
            pass

    def download(self, path: str, place: Path, longest: int) -> None:
        """Writes the archive of saved sampler weights to `place`. Raises BackendError, also for one of more than `longest`
        bytes."""
        import httpx

        model, _, name = parts_of_path(path)
        what = f"fetching the archive of {path}"
        try:
            with httpx.Client(timeout=httpx.Timeout(REACH_SECONDS, read=DOWNLOAD_SECONDS)) as client:
                # Thinking Machines' service wants the kind as well, and SkyRL's refuses it.
                of_kind = f"sampler_weights/{name}" if is_hosted(self.url) else name
                ask = f"{self.url}/api/v1/training_runs/{model}/checkpoints/{of_kind}/archive"
                answer = client.get(ask, headers={"X-API-Key": self._key})
                target = answer.headers.get("Location", "")
                if answer.status_code not in (301, 302, 303, 307, 308) or not target:
                    raise _refusal(answer.status_code, answer.text, what)
                # A signed address, which may lie elsewhere: the key stays here.
                target = urljoin(ask, target)
                if urlsplit(target).scheme not in ("http", "https"):
                    raise Refused(f"{what}: the service names {target[:200]!r}; expected an http address")
                with client.stream("GET", target) as content, place.open("wb") as file:
                    if content.status_code != 200:
                        content.read()
                        raise _refusal(content.status_code, content.text, what)
                    written = 0
                    for piece in content.iter_bytes():
                        written += len(piece)
                        if written > longest:
                            raise Refused(
                                f"{what}: it has more than {longest:,} bytes, which no adapter of this rank has"
                            )
                        file.write(piece)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(redact_text(f"{what}: {type(error).__name__}: {error}")) from error

    def _ask(self, method: str, path: str, what: str, body: dict[str, Any] | None = None) -> Any:
        import httpx

        headers = {"X-API-Key": self._key}
        try:
            answer = httpx.request(
                method, f"{self.url}/api/v1/{path}", headers=headers, json=body, timeout=self._seconds
            )
            if answer.status_code >= 300:
                raise _refusal(answer.status_code, answer.text, what)
            return answer.json() if answer.content else None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Unavailable(redact_text(f"{what}: {type(error).__name__}: {error}")) from error


def _refusal(status: int, text: str, what: str) -> BackendError:
    said = redact_text(f"{what}: status {status}: {text[:300]}")
    if status == 404:
        return Lost(said)
    return Unavailable(said) if status in (408, 425, 429) or status >= 500 else Refused(said)
