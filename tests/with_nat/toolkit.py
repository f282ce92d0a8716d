"""What the tests give the Toolkit: a LangChain agent, an evaluator, a server that speaks the protocol of `art run`, and configs.

Importing this registers agent and evaluator, as an installed plugin would.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import yaml
from nat.builder.evaluator import EvaluatorInfo
from nat.builder.framework_enum import LLMFrameworkEnum
from nat.builder.function_info import FunctionInfo
from nat.cli.register_workflow import (
    register_evaluator,
    register_function,
    register_trainer_adapter,
    register_trajectory_builder,
)
from nat.data_models import finetuning as nat
from nat.data_models.component_ref import LLMRef
from nat.data_models.evaluator import EvaluatorBaseConfig
from nat.data_models.function import FunctionBaseConfig
from nat.finetuning.interfaces.trainer_adapter import TrainerAdapter
from nat.finetuning.interfaces.trajectory_builder import TrajectoryBuilder
from nat.plugins.eval.data_models.evaluator_io import EvalOutput, EvalOutputItem

RAISES_FOR: str | None = None


class AgentConfig(FunctionBaseConfig, name="test_agent"):
    """A LangChain agent: one question, one reply."""

    llm: LLMRef


@register_function(config_type=AgentConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])
async def agent(config: AgentConfig, builder: Any):
    llm = await builder.get_llm(config.llm, wrapper_type=LLMFrameworkEnum.LANGCHAIN)

    async def answer(question: str) -> str:
        if question == RAISES_FOR:
            raise RuntimeError("this agent has no answer")
        reply = await llm.ainvoke([("system", "Answer."), ("user", question)])
        return reply.content

    yield FunctionInfo.from_fn(answer, description="answers")


class TableConfig(EvaluatorBaseConfig, name="test_table"):
    """Rewards from a table: the n-th verdict on an example is its n-th number, over and over."""

    rewards: dict[str, list[Any]]


_seen: Counter[str] = Counter()


def start_anew() -> None:
    _seen.clear()


@register_evaluator(config_type=TableConfig)
async def table(config: TableConfig, builder: Any):
    async def evaluate(eval_input: Any) -> EvalOutput:
        items = []
        for item in eval_input.eval_input_items:
            rewards = config.rewards[str(item.id)]
            items.append(
                EvalOutputItem(id=item.id, score=rewards[_seen[str(item.id)] % len(rewards)], reasoning={"by": "table"})
            )
            _seen[str(item.id)] += 1
        return EvalOutput(average_score=0.0, eval_output_items=items)

    yield EvaluatorInfo(config=config, evaluate_fn=evaluate, description="rewards from a table")


def note_submitted(path: Path) -> None:
    """From now on the example ids of whatever is submitted to our adapter are added to a file, a line a job."""
    from finetune_nb.backends.local.adapter import LocalGRPOAdapter

    submit = LocalGRPOAdapter.submit

    async def noting(self: Any, trajectories: Any) -> Any:
        ids = [[trajectory.metadata["id"] for trajectory in group] for group in trajectories.trajectories]
        with path.open("a") as file:
            file.write(json.dumps(ids) + "\n")
        return await submit(self, trajectories)

    LocalGRPOAdapter.submit = noting  # type: ignore[method-assign]


@dataclass
class ArtServer:
    """`art run`, as far as the Toolkit's plugin speaks to it, on an address of its own: its health check asks port 8000
    whatever the config says."""

    host: str = "127.0.0.88"
    fails: bool = False
    broken: bool = False
    """Its model's server answers with an error."""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    step: int = 0

    def __enter__(self) -> ArtServer:
        server = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if server.broken:
                    self.send_error(500)
                else:
                    self.answer({"data": []})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
                server.requests.append((self.path, body))
                if self.path == "/_train_model" and server.fails:
                    self.send_error(500)
                elif self.path == "/_train_model":
                    server.step += 1
                    self.answer({"num_gradient_steps": 1, "data/step_num_gradient_steps": 1, "loss/train": 0.25})
                elif self.path == "/_prepare_backend_for_training":
                    self.answer([f"http://{server.host}:8000/v1", "default"])
                else:
                    self.answer(server.step if self.path == "/_get_step" else None)

            def answer(self, content: Any) -> None:
                text = json.dumps(content).encode() + b"\n"
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._servers = [ThreadingHTTPServer((self.host, port), Answer) for port in (8000, 7999)]
        for each in self._servers:
            threading.Thread(target=each.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for each in self._servers:
            each.shutdown()
            each.server_close()

    def trained(self) -> list[list[str]]:
        """Of each training request, the questions of its groups, in order."""
        return [
            [group["trajectories"][0]["messages_and_choices"][-2]["content"] for group in body["trajectory_groups"]]
            for path, body in self.requests
            if path == "/_train_model"
        ]


REWARDS = {f"q{n}": [n / 10, n / 10 + 0.15 * (n != 3)] for n in range(6)}
"""Six examples with two rewards each: the higher the number the easier, and q3 without spread."""


def write_config(
    folder: Path, base_url: str, rewards: dict[str, list[float | None]] = REWARDS, **sections: Any
) -> Path:
    """A config of the Toolkit: a LangChain workflow over an OpenAI-compatible server, scored by the table, trained by the
    ART plugin unless `sections` say otherwise."""
    rows = [{"id": key, "question": f"what is {key}?", "answer": key} for key in rewards]
    (folder / "rows.json").write_text(json.dumps(rows))
    config: dict[str, Any] = {
        "llms": {
            "model": {
                "_type": "openai",
                "model_name": "tiny",
                "base_url": base_url,
                "api_key": "sk-not-to-be-seen",
                "logprobs": True,
                "max_retries": 1,
            }
        },
        "workflow": {"_type": "test_agent", "llm": "model"},
        "eval": {
            "general": {
                "max_concurrency": 4,
                "output_dir": str(folder / "eval"),
                "dataset": {"_type": "json", "file_path": str(folder / "rows.json")},
            },
            "evaluators": {"table": {"_type": "test_table", "rewards": rewards}},
        },
        "trajectory_builders": {"builder": {"_type": "openpipe_art_traj_builder", "num_generations": 2}},
        "trainer_adapters": {
            "adapter": {
                "_type": "openpipe_art_trainer_adapter",
                "backend": {"ip": "127.0.0.88", "port": 7999, "base_model": "tiny"},
                "training": {"learning_rate": 1e-4},
            }
        },
        "trainers": {"trainer": {"_type": "openpipe_art_trainer"}},
        "finetuning": {
            "enabled": True,
            "trainer": "trainer",
            "trajectory_builder": "builder",
            "trainer_adapter": "adapter",
            "reward_function": {"name": "table"},
            "target_functions": ["<workflow>"],
            "num_epochs": 3,
            "output_dir": str(folder / "runs"),
            "curriculum_learning": {
                "enabled": True,
                "initial_percentile": 0.4,
                "increment_percentile": 0.4,
                "expansion_interval": 2,
            },
        },
    }
    import finetune_nb.backends.nat.as_nat  # noqa: F401  # the entry point, also where the package is not installed

    for section, values in sections.items():
        config[section] = {**config[section], **values} if section == "finetuning" else values
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


# ── preferences ──────────────────────────────────────────────────────────────────────────────────────────────────────


class PairsConfig(nat.TrajectoryBuilderConfig, name="test_pairs"):
    """Preferences, one a trajectory."""


class PairsBuilder(TrajectoryBuilder):
    async def start_run(self, run_id: str, meta: dict | None = None) -> None:
        pass

    async def finalize(self, run_id: str, meta: dict | None = None) -> nat.TrajectoryCollection:
        number = (meta or {})["run_number"]
        pairs = [
            nat.DPOItem(prompt=f"{number}+{n}", chosen_response=str(number + n), rejected_response="?")
            for n in range(3)
        ]
        groups = [[nat.Trajectory(episode=[pair], reward=1.0, metadata={"id": n})] for n, pair in enumerate(pairs)]
        return nat.TrajectoryCollection(trajectories=groups, run_id=run_id)

    def log_progress(self, run_id: str, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        pass


@register_trajectory_builder(config_type=PairsConfig)
async def pairs(config: PairsConfig, builder: Any):
    yield PairsBuilder(config)


class PairsAdapterConfig(nat.TrainerAdapterConfig, name="test_pairs_adapter"):
    """Takes preferences, and trains nothing."""

    outcome: str = "completed"


class PairsAdapter(TrainerAdapter):
    submitted: ClassVar[list[nat.TrajectoryCollection]] = []

    async def is_healthy(self) -> bool:
        return True

    async def submit(self, trajectories: nat.TrajectoryCollection) -> nat.TrainingJobRef:
        self.submitted.append(trajectories)
        return nat.TrainingJobRef(run_id=trajectories.run_id, backend="pairs", metadata={"job_id": "cust-1"})

    async def status(self, ref: nat.TrainingJobRef) -> nat.TrainingJobStatus:
        assert ref.metadata == {"job_id": "cust-1"}
        return nat.TrainingJobStatus(run_id=ref.run_id, backend="pairs", status=self.adapter_config.outcome)

    async def wait_until_complete(self, ref: nat.TrainingJobRef, poll_interval: float = 10.0) -> nat.TrainingJobStatus:
        return await self.status(ref)

    def log_progress(self, ref: nat.TrainingJobRef, metrics: dict[str, Any], output_dir: str | None = None) -> None:
        pass


@register_trainer_adapter(config_type=PairsAdapterConfig)
async def pairs_adapter(config: PairsAdapterConfig, builder: Any):
    yield PairsAdapter(config)
