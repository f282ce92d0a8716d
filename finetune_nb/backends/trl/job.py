"""One training job: its folder, its process, its status.

The process reports its progress by lines in progress.jsonl, and how it ended by its exit code and what it wrote to
worker.log. The folder's models are deleted when the job has ended; data, progress and log stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ...errors import BackendError
from ...redaction import error_text, redact_text, redacting_logger
from ...types import TrainingJobRef, TrainingJobStatus, TrainingStatusEnum

__all__ = [
    "TRLJob",
    "load_weights",
]


def load_weights(policy: Any, directory: Path, version: int) -> None:
    """Puts the weights of `directory` in the place of the policy's, between two batches, and sets its version.

    Only safetensors are read. Raises BackendError, and changes nothing, where they are not this model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        trained = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=policy.model.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        found, own = trained.state_dict(), policy.model.state_dict()
    except (OSError, ValueError, RuntimeError) as error:
        raise BackendError(
            f"the model in {directory.name} cannot be read: {error}. Load another checkpoint."
        ) from error
    wrong = [name for name in own if name not in found or found[name].shape != own[name].shape]
    if wrong or len(found) != len(own):
        raise BackendError(
            f"the model in {directory.name} is another one: {(wrong or sorted(set(found) - set(own)))[:3]} differ. Expected "
            "weights of the model that the trainer adapter names: name that one, or load another checkpoint."
        )
    with policy.exclusive.hold(), torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
        policy.version = version


logger = redacting_logger(__name__)

GRACE_SECONDS = 5.0
"""What a process has to end after it was asked to, before it is killed."""
LAST_LINES = 12
"""Of the worker's log, in the message of a job that failed."""


class TRLJob:
    """A training job that is a process. folder: in which it gets one of its own. policy: a local one; a job that completes
    gives it new weights, and raises its version. rows: how many it trains on."""

    def __init__(self, run_id: str, backend: str, folder: Path, policy: Any, rows: int) -> None:
        self.id = uuid.uuid4().hex
        self.ref = TrainingJobRef(run_id=run_id, backend=backend, metadata={"job_id": self.id})
        self.folder = folder / self.id
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # so that a waiter who is canceled does not cancel the job's end
        self.canceled = threading.Event()
        self._policy, self._rows = policy, rows
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._last: TrainingJobStatus | None = None

    def write(self, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write what the process reads: settings, data, and the policy's weights.

        Raises:
            BackendError: They cannot be written, because the disk is full for example. Nothing of the job is left.
        """
        try:
            self.folder.mkdir(parents=True)
            (self.folder / "job.json").write_text(json.dumps(settings), encoding="utf-8")
            with (self.folder / "data.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            # In a narrower dtype the steps of earlier jobs would be lost.
            self._policy.save(self.folder / "model", dtype=self._policy.dtype)
        except (OSError, BackendError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise BackendError(
                f"the training job could not be written to {self.folder}: {error_text(error)}. Expected a folder with room for "
                "the data and the model twice. Nothing was trained. Make room, then run the epoch again."
            ) from error

    def start(self, processes: int, cpu: bool) -> None:
        """Starts the process, and a thread that waits for it."""
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += [*(["--cpu"] if cpu else []), *(["--multi_gpu"] if processes > 1 and not cpu else [])]
        command += ["--main_process_port", "0", "--module", f"{__package__}.worker"]
        ours = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        with (self.folder / "worker.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(self.folder)],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which is ended as a whole
            )
        threading.Thread(target=self._watch, name="finetune_nb trl job", daemon=True).start()

    def cancel(self) -> None:
        """Asks the processes to end, and makes them a little later."""
        if self.ended.done() or self.canceled.is_set():
            return
        self.canceled.set()
        self._signal(signal.SIGTERM)
        killer = threading.Timer(GRACE_SECONDS, self._signal, [signal.SIGKILL])
        killer.daemon = True
        killer.start()
        self.ended.add_done_callback(lambda _: killer.cancel())

    def _signal(self, number: int) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)

    def _watch(self) -> None:
        process = self._process
        assert process is not None
        try:
            code = process.wait()
            self._signal(signal.SIGKILL)  # processes that the launcher may not have ended
            self._last = self._outcome(code)
        except BaseException as error:  # the thread's last word: whoever waits must hear of it
            logger.exception("training job %s failed", self.id)
            self._last = self._make(TrainingStatusEnum.FAILED, error_text(error))
        finally:
            for models in ("model", "trained", "checkpoints"):
                shutil.rmtree(self.folder / models, ignore_errors=True)
            self.ended.set_result(None)

    def _outcome(self, code: int) -> TrainingJobStatus:
        if self.canceled.is_set():
            return self._make(TrainingStatusEnum.CANCELED, "canceled; the policy is as it was before the job")
        if code:
            return self._make(TrainingStatusEnum.FAILED, f"the process ended with code {code}:\n{self._last_words()}")
        pass

        load_weights(self._policy, self.folder / "trained", self._policy.version + 1)
        return self._make(TrainingStatusEnum.COMPLETED, f"trained on {self._rows} rows")

    def _last_words(self) -> str:
        text = (self.folder / "worker.log").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        # Behind the worker's own traceback the launcher writes one that says only that the worker failed.
        launcher = [i for i, line in enumerate(lines) if "accelerate/commands/" in line]
        end = max((i - 1 for i in launcher[:1]), default=len(lines))
        return redact_text("\n".join(lines[:end][-LAST_LINES:])) or "it said nothing"

    def status(self) -> TrainingJobStatus:
        """Its status as the process last reported it; reading changes nothing."""
        return (self._last or self._make(TrainingStatusEnum.RUNNING, None)).model_copy(deep=True)

    def _make(self, status: TrainingStatusEnum, message: str | None) -> TrainingJobStatus:
        lines = self._progress()
        step, steps = (lines[-1]["step"], lines[-1]["steps"]) if lines else (0, 0)
        metrics: dict[str, Any] = {}
        for line in lines:  # the last lines sum up, and do not repeat what each step said
            metrics |= line["metrics"]
        metrics |= {"optimizer_steps": step, "rows": self._rows, "seconds": time.perf_counter() - self._started}
        progress = 100.0 if status == TrainingStatusEnum.COMPLETED else 100.0 * step / steps if steps else 0.0
        return TrainingJobStatus(
            run_id=self.ref.run_id,
            backend=self.ref.backend,
            status=status,
            progress=progress,
            message=message or (f"step {step} of {steps}" if steps else "the process is starting"),
            metadata={"job_id": self.id, "policy_version": self._policy.version, "metrics": metrics},
        )

    def _progress(self) -> list[dict[str, Any]]:
        try:
            text = (self.folder / "progress.jsonl").read_text(encoding="utf-8")
        except OSError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
