"""NeMo Microservices on the loopback address, as far as the Toolkit's adapter for NeMo Customizer speaks to them: Entity Store,
Datastore, Customizer and Deployment. A job trains the model that it is given with the rows that were uploaded, by TRL's DPO.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from finetune_nb.backends.trl.adapter import TRLAdapter
from finetune_nb.backends.trl.config import TRLDPOConfig
from finetune_nb.config import FinetuneConfig
from finetune_nb.types import DPOItem, Trajectory, TrajectoryCollection


@dataclass
class LoopbackCustomizer:
    """model: what a job trains. folder: in which it does, and leaves the trained model as `model`."""

    model: Path
    folder: Path
    files: dict[str, str] = field(default_factory=dict)
    """What was uploaded to the Datastore, by its path."""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    deployments: list[dict[str, Any]] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> LoopbackCustomizer:
        customizer = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.respond(b"")

            def do_POST(self) -> None:
                self.respond(self.rfile.read(int(self.headers["Content-Length"] or 0)))

            def respond(self, body: bytes) -> None:
                answer = customizer.answer(self.command, urlsplit(self.path).path, body)
                text = json.dumps({"detail": f"no {self.command} {self.path}"} if answer is None else answer).encode()
                self.send_response(404 if answer is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """The answer to a request as JSON; None: there is no such address."""
        match method, path.strip("/").split("/"):
            case "POST", ["v1", "namespaces"]:
                self.namespaces.append(json.loads(body)["id"])
                return json.loads(body)
            case "POST", ["v1", "datastore", "namespaces"]:
                self.namespaces += parse_qs(body.decode())["namespace"]
                return {}
            case "POST", ["v1", "hf", "api", "repos", "create"]:
                asked = json.loads(body)
                return {"url": f"{self.url}/v1/hf/datasets/{asked.get('organization')}/{asked['name']}"}
            case "POST", ["v1", "hf", "api", "datasets", *_, "preupload", "main"]:
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                return {"files": [{"path": each["path"], **plain} for each in json.loads(body)["files"]]}
            case "POST", ["v1", "hf", "api", "datasets", *repository, "commit", "main"]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"]).decode()
                place = f"{self.url}/v1/hf/datasets/{'/'.join(repository)}/commit/{'0' * 40}"
                return {"commitUrl": place, "commitOid": "0" * 40, "success": True}
            case "POST", ["v1", "datasets"]:
                return json.loads(body)
            case "POST", ["v1", "customization", "jobs"]:
                return self.start(json.loads(body))
            case "GET", ["v1", "customization", "jobs", _, "status"]:
                return self.status
            case "POST", ["v1", "deployment", "configs"]:
                return json.loads(body)
            case "POST", ["v1", "deployment", "model-deployments"]:
                self.deployments.append(json.loads(body))
                return json.loads(body)
            case "GET", ["v1", "deployment", "model-deployments"]:
                ready = {"status_details": {"status": "ready", "description": ""}}
                return {"data": [each | ready for each in self.deployments], "object": "list"}
        return None

    def start(self, job: dict[str, Any]) -> dict[str, Any]:
        self.jobs.append(job)
        self.status = {"status": "running", "percentage_done": 0.0, "epochs_completed": 0}
        threading.Thread(target=self.train, args=(job["hyperparameters"],), daemon=True).start()
        return {**job, "id": "cust-1", "output_model": "default/trained@cust-1", "status": "created"}

    def train(self, asked: dict[str, Any]) -> None:
        rows = [json.loads(line) for line in self.files["training/training_file.jsonl"].splitlines()]
        items = [DPOItem(**row) for row in rows]
        groups = [[Trajectory(episode=[item], reward=1.0, metadata={"id": n})] for n, item in enumerate(items)]
        config = TRLDPOConfig(
            model=str(self.model),
            epochs=asked["epochs"],
            batch_size=asked["batch_size"],
            learning_rate=asked["learning_rate"],
            beta=asked["dpo"]["ref_policy_kl_penalty"],
            sft_loss_weight=asked["dpo"]["sft_loss_weight"],
            device="cpu",
            threads=1,
        )

        async def work() -> Any:
            adapter = TRLAdapter(config)
            await adapter.initialize(FinetuneConfig(output_dir=self.folder))
            ref = await adapter.submit(TrajectoryCollection(trajectories=groups, run_id="cust-1"))
            status = await adapter.wait_until_complete(ref)
            await adapter.save(self.folder / "model")
            await adapter.aclose()
            return status

        status = asyncio.run(work())
        self.status = {
            "status": status.status.value,
            "percentage_done": status.progress,
            "epochs_completed": asked["epochs"],
        }
