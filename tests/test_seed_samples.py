"""The code samples of the finetuning harness's guide, "Extending the Finetuning Harness", as they stand there: only their
imports are ours. Whoever wrote components by that guide finds that they work.
"""

from __future__ import annotations

import asyncio
import json
import logging
from unittest.mock import AsyncMock  # the guide's own "Testing" sample uses it

import pytest
from loopback import LoopbackServer
from pydantic import BaseModel, Field, ValidationError

import finetune_nb as ft
from finetune_nb import (
    EvalInput,
    EvalInputItem,
    EvalOutput,
    EvalOutputItem,
    EvaluationRunOutput,
    IntermediateStep,
    TrainingJobRef,
    TrajectoryCollection,
)
from finetune_nb.components.builder import Builder
from finetune_nb.components.registry import (
    register_evaluator,
    register_function,
    register_trainer,
    register_trainer_adapter,
    register_trajectory_builder,
)
from finetune_nb.config.base import (
    EvaluatorBaseConfig,
    FunctionBaseConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
)
from finetune_nb.rollouts.trajectory_builder import EvalTrajectoryBuilder
from finetune_nb.testing import FakeAdapter, ScriptedBuilder, sums
from finetune_nb.training.trainer import EpochTrainer

logger = logging.getLogger(__name__)


# ── the samples: configs ─────────────────────────────────────────────────────────────────────────────────────────────


class MyTrajectoryBuilderConfig(TrajectoryBuilderConfig, name="my_traj_builder"):
    """Configuration for my custom trajectory builder."""

    num_generations: int = Field(
        default=2,
        ge=1,
        description="Number of trajectory generations per example"
    )  # fmt: skip
    include_tool_calls: bool = Field(
        default=True,
        description="Whether to include tool call messages in trajectories"
    )  # fmt: skip
    min_episode_length: int = Field(
        default=2,
        description="Minimum number of messages required for a valid trajectory"
    )  # fmt: skip


class MyBackendConfig(BaseModel):
    """Configuration for the training backend."""

    endpoint: str = Field(description="Training API endpoint URL")
    api_key: str = Field(description="API key for authentication")
    timeout: int = Field(default=3600, description="Request timeout in seconds")
    # Training hyperparameters
    learning_rate: float = Field(default=1e-5, description="Learning rate")
    batch_size: int = Field(default=4, description="Training batch size")
    gradient_accumulation_steps: int = Field(default=4, description="Gradient accumulation")


class MyTrainerAdapterConfig(TrainerAdapterConfig, name="my_trainer_adapter"):
    """Configuration for my trainer adapter."""

    backend: MyBackendConfig = Field(description="Backend configuration")
    validate_trajectories: bool = Field(
        default=True,
        description="Whether to validate trajectories before submission"
    )  # fmt: skip


# ── what the guide leaves to the reader: the components themselves ───────────────────────────────────────────────────


class MyTrajectoryBuilder(EvalTrajectoryBuilder):
    """Adds nothing."""


class MyTrainerAdapter(FakeAdapter):
    """Trains nothing; the jobs complete."""


class MyTrainerConfig(TrainerConfig, name="my_trainer"):
    pass


class Client:
    """A connection that must be closed."""

    closed = False

    async def aclose(self) -> None:
        self.closed = True


class MyTrainer(EpochTrainer):
    """EpochTrainer with the guide's "Error handling", "Logging" and "Resource cleanup"."""

    def __init__(self, trainer_config, **kwargs):
        super().__init__(trainer_config, **kwargs)
        self.pending_tasks = {}
        self.client = Client()

    async def run_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        try:
            # ... epoch logic
            self.log_start(epoch)
            return await super().run_epoch(epoch, run_id)
        except Exception as e:
            self.log_failure(e)
            logger.exception("Error in epoch %d", epoch)
            # Return None or raise depending on severity
            raise

    def log_start(self, epoch):
        num_examples = len(self.pending_tasks)
        logger.info("Starting epoch %d with %d examples", epoch, num_examples)

    def log_failure(self, error):
        logger.error("Training failed: %s", error, exc_info=True)

    def apply_curriculum_learning(self, trajectory_collection, epoch):
        for trajectory in (t for group in trajectory_collection.trajectories for t in group):
            logger.debug("Trajectory details: %s", trajectory.metadata)
        return super().apply_curriculum_learning(trajectory_collection, epoch)

    async def cleanup(self) -> None:
        # Cancel pending tasks
        for task in self.pending_tasks.values():
            if not task.done():
                task.cancel()
        # Close connections
        await self.client.aclose()
        # Clear state
        self.pending_tasks.clear()


class MyAgentConfig(FunctionBaseConfig, name="my_agent_workflow"):
    llm: str


class MyEvaluatorConfig(EvaluatorBaseConfig, name="my_custom_evaluator"):
    pass


# ── the samples: registrations ───────────────────────────────────────────────────────────────────────────────────────


@register_trajectory_builder(config_type=MyTrajectoryBuilderConfig)
async def my_trajectory_builder(config: MyTrajectoryBuilderConfig, builder: Builder):
    """
    Register the custom trajectory builder.
    Args:
        config: The trajectory builder configuration
        builder: The workflow builder (for accessing other components)
    Yields:
        A configured trajectory builder instance
    """
    yield MyTrajectoryBuilder(trajectory_builder_config=config)


@register_trainer_adapter(config_type=MyTrainerAdapterConfig)
async def my_trainer_adapter(config: MyTrainerAdapterConfig, builder: Builder):
    """Register the custom trainer adapter."""
    yield MyTrainerAdapter(adapter_config=config)


@register_trainer(config_type=MyTrainerConfig)
async def my_trainer(config: MyTrainerConfig, builder: Builder):
    """Register the custom trainer."""
    yield MyTrainer(trainer_config=config)


closed: list[str] = []


@register_function(config_type=MyAgentConfig)
async def my_agent_workflow(config: MyAgentConfig, builder: Builder):
    async def solve(question, llm):
        return (await llm.chat([{"role": "user", "content": question}])).content

    yield solve
    closed.append("my_agent_workflow")


@register_evaluator(config_type=MyEvaluatorConfig)
async def my_custom_evaluator(config: MyEvaluatorConfig, builder: Builder):
    yield lambda item: float(item.output_obj == item.expected_output_obj)
    closed.append("my_custom_evaluator")


@pytest.fixture(autouse=True)
def registered_by_this_file():
    """Again before every test: another test file may have taken one of these names meanwhile."""
    register_trajectory_builder(config_type=MyTrajectoryBuilderConfig)(my_trajectory_builder)
    register_trainer_adapter(config_type=MyTrainerAdapterConfig)(my_trainer_adapter)
    register_trainer(config_type=MyTrainerConfig)(my_trainer)
    register_function(config_type=MyAgentConfig)(my_agent_workflow)
    register_evaluator(config_type=MyEvaluatorConfig)(my_custom_evaluator)
    closed.clear()


# ── the sample: complete YAML configuration ──────────────────────────────────────────────────────────────────────────

COMPLETE_YAML = """
llms:
  my_model:
    _type: openai
    model_name: gpt-4
    base_url: http://localhost:8000/v1
workflow:
  _type: my_agent_workflow
  llm: my_model
eval:
  general:
    max_concurrency: 8
    output_dir: .tmp/finetuning/eval
    dataset:
      _type: json
      file_path: data/train.json
  evaluators:
    my_reward:
      _type: my_custom_evaluator
trajectory_builders:
  my_builder:
    _type: my_traj_builder
    num_generations: 4
    include_tool_calls: true
    min_episode_length: 3
trainer_adapters:
  my_adapter:
    _type: my_trainer_adapter
    backend:
      endpoint: http://training-server:8080
      api_key: ${TRAINING_API_KEY}
      learning_rate: 1e-5
      batch_size: 8
    validate_trajectories: true
trainers:
  my_trainer:
    _type: my_trainer
finetuning:
  enabled: true
  trainer: my_trainer
  trajectory_builder: my_builder
  trainer_adapter: my_adapter
  reward_function:
    name: my_reward
  num_epochs: 20
  output_dir: .tmp/finetuning/output
  curriculum_learning:
    enabled: true
    initial_percentile: 0.3
    increment_percentile: 0.2
    expansion_interval: 5
"""


@pytest.fixture
def complete_yaml(tmp_path, monkeypatch):
    """The file, in a folder of its own, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINING_API_KEY", "training-key-77")
    (tmp_path / "config.yml").write_text(COMPLETE_YAML)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(sums(6)))
    return tmp_path / "config.yml"


def test_the_complete_yaml_is_read_into_the_samples_own_configs(complete_yaml):
    config = ft.load_config(complete_yaml)
    assert config.trajectory_builders == {
        "my_builder": MyTrajectoryBuilderConfig(num_generations=4, include_tool_calls=True, min_episode_length=3)
    }
    adapter = config.trainer_adapters["my_adapter"]
    assert type(adapter) is MyTrainerAdapterConfig
    assert adapter.backend == MyBackendConfig(
        endpoint="http://training-server:8080", api_key="training-key-77", learning_rate=1e-5, batch_size=8
    )
    assert (type(adapter.backend.learning_rate), adapter.validate_trajectories) == (float, True)
    assert type(config.trainers["my_trainer"]) is MyTrainerConfig
    assert config.workflow == MyAgentConfig(llm="my_model")
    assert config.eval.general.max_concurrency == 8
    assert str(config.eval.general.dataset.file_path) == "data/train.json"
    tuning = config.finetuning
    assert (tuning.trainer, tuning.trajectory_builder, tuning.trainer_adapter) == (
        "my_trainer",
        "my_builder",
        "my_adapter",
    )
    assert (tuning.reward_function.name, tuning.num_epochs) == ("my_reward", 20)
    assert tuning.curriculum_learning == ft.CurriculumLearningConfig(
        enabled=True, initial_percentile=0.3, increment_percentile=0.2, expansion_interval=5
    )
    assert "training-key-77" not in repr(config)
    assert config.stored()["trainer_adapters"]["my_adapter"]["backend"]["api_key"] == "${TRAINING_API_KEY}"


def test_the_samples_field_rules_hold():
    with pytest.raises(ValidationError):
        MyTrajectoryBuilderConfig(num_generations=0)
    with pytest.raises(ValidationError):
        MyTrainerAdapterConfig()
    with pytest.raises(ft.ConfigError, match="num_generations"):
        ft.load_config({"trajectory_builders": {"my_builder": {"_type": "my_traj_builder", "num_generations": 0}}})


async def test_every_component_of_the_complete_yaml_is_built_by_name_and_resumed_when_the_builder_closes(complete_yaml):
    pytest.importorskip("openai")
    config = ft.load_config(complete_yaml)
    async with Builder(config) as builder:
        trajectory_builder = await builder.get_trajectory_builder("my_builder")
        adapter = await builder.get_trainer_adapter("my_adapter")
        trainer = await builder.get_trainer("my_trainer")
        assert type(trajectory_builder) is MyTrajectoryBuilder
        assert trajectory_builder.trajectory_builder_config is config.trajectory_builders["my_builder"]
        assert type(adapter) is MyTrainerAdapter
        assert adapter.adapter_config is config.trainer_adapters["my_adapter"]
        assert type(trainer) is MyTrainer
        assert trainer.trainer_config is config.trainers["my_trainer"]
        assert (await builder.get_llm("my_model")).name == "gpt-4"
        workflow, reward = await builder.get_workflow(), await builder.get_evaluator("my_reward")
        assert callable(workflow)
        assert callable(reward)
        assert closed == []
    assert closed == ["my_custom_evaluator", "my_agent_workflow"]


async def test_a_run_from_the_complete_yaml_trains_an_epoch(complete_yaml):
    pytest.importorskip("openai")

    def coin(request):
        """Right or wrong, by the request's seed."""
        a, b = request.body["messages"][-1]["content"].split("+")
        return str(int(a) + int(b) + request.body["seed"] % 2)

    with LoopbackServer(coin) as server:
        run = ft.Run.from_config(
            complete_yaml,
            name="sample",
            llms__my_model__base_url=server.base_url,
            trajectory_builders__my_builder__min_episode_length=2,  # a question and its answer
        )
        epoch = await run.next_epoch()
        trainer, adapter = run._driver.trainer, run._driver.adapter
        await asyncio.to_thread(run.close)
    assert type(trainer) is MyTrainer
    assert {request.body["model"] for request in server.requests} == {"gpt-4"}
    assert (epoch.metrics.groups, epoch.metrics.trajectories, epoch.metrics.failures) == (6, 24, 0)
    assert epoch.job.status == "completed"
    assert not epoch.selection.inferred
    with_spread = epoch.metrics.groups_with_spread
    assert 0 < with_spread <= 6
    assert len(epoch.selection.kept) == -(-3 * with_spread // 10)  # 0.3 of those, rounded up
    assert len(adapter.submitted[0].trajectories) == len(epoch.selection.kept)
    assert trainer.client.closed
    assert closed == ["my_custom_evaluator", "my_agent_workflow"]
    folder = complete_yaml.parent / ".tmp" / "finetuning" / "output" / "sample"
    assert (folder / "training_metrics.jsonl").exists()
    assert not any(b"training-key-77" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_min_episode_length_of_the_sample_leaves_shorter_episodes_out(complete_yaml):
    pytest.importorskip("openai")
    with LoopbackServer() as server:
        run = ft.Run.from_config(complete_yaml, llms__my_model__base_url=server.base_url)
        epoch = await run.next_epoch()
        await asyncio.to_thread(run.close)
    assert epoch.metrics.failures == 24
    assert "the episode has 2 messages; min_episode_length is 3" in epoch.reason


# ── the samples: error handling, logging, resource cleanup ───────────────────────────────────────────────────────────


def sample_run(tmp_path, **adapter):
    trainer = MyTrainer(trainer_config=MyTrainerConfig())
    adapter = MyTrainerAdapter(
        adapter_config=MyTrainerAdapterConfig(backend=MyBackendConfig(endpoint="http://x", api_key="k")), **adapter
    )
    builder = ScriptedBuilder(lambda epoch: {"a": [0, 1], "b": [1, 0]})
    return ft.Run(builder=builder, adapter=adapter, trainer=trainer, output_dir=tmp_path), trainer


async def test_the_error_sample_logs_and_raises_what_went_wrong_in_the_epoch(tmp_path, caplog):
    run, _ = sample_run(tmp_path, outcome="failed", message="out of memory")
    with pytest.raises(ft.JobFailed, match="out of memory") as caught:
        await run.next_epoch()
    await asyncio.to_thread(run.close)
    assert caught.value.epoch is run[0]
    (error,) = [record for record in caplog.records if record.getMessage() == "Error in epoch 0"]
    assert error.exc_info[0] is ft.JobFailed
    assert "Training failed: epoch 0: the training job failed: out of memory" in caplog.text


async def test_the_logging_sample_tells_of_the_epoch_and_its_trajectories(tmp_path, caplog):
    run, _ = sample_run(tmp_path)
    with caplog.at_level(logging.DEBUG, logger=__name__):
        await run.next_epoch()
    await asyncio.to_thread(run.close)
    messages = [record.getMessage() for record in caplog.records if record.name == __name__]
    assert messages[0] == "Starting epoch 0 with 0 examples"
    details = [message for message in messages if message.startswith("Trajectory details: ")]
    assert len(details) == 4
    assert "'id': 'a', 'generation': 0" in details[0]


async def test_the_cleanup_sample_cancels_what_is_pending_and_closes_the_connection(tmp_path):
    run, trainer = sample_run(tmp_path)
    await run.next_epoch()

    async def begin():
        trainer.pending_tasks["late"] = asyncio.create_task(asyncio.sleep(60))
        trainer.pending_tasks["done"] = asyncio.create_task(asyncio.sleep(0))
        await asyncio.sleep(0.01)
        return dict(trainer.pending_tasks)

    tasks = await run._session.engine.run(begin())
    await asyncio.to_thread(run.close)
    assert tasks["late"].cancelled()
    assert not tasks["done"].cancelled()
    assert trainer.client.closed
    assert trainer.pending_tasks == {}


# ── the sample: testing ──────────────────────────────────────────────────────────────────────────────────────────────


def step_of(question: str, answer: str) -> IntermediateStep:
    """A model call as another harness records it: logprobs as OpenAI gives them."""
    return IntermediateStep.model_validate(
        {
            "parent_id": "root",
            "function_ancestry": {"function_id": "f", "function_name": "<workflow>"},
            "payload": {
                "event_type": "LLM_END",
                "name": "my_model",
                "data": {
                    "input": [{"role": "user", "content": question}],
                    "output": answer,
                    "payload": {"logprobs": {"content": [{"token": c, "logprob": -0.25} for c in answer]}},
                },
            },
        }
    )


mock_eval_output = EvaluationRunOutput(
    workflow_output_file=None,
    evaluator_output_files=[],
    workflow_interrupted=False,
    eval_input=EvalInput(
        eval_input_items=[
            EvalInputItem(
                id=row["id"],
                input_obj=row["question"],
                expected_output_obj=row["answer"],
                output_obj=row["answer"],
                trajectory=[step_of(row["question"], row["answer"])],
                full_dataset_entry=row,
            )
            for row in sums(3)
        ]
    ),
    evaluation_results=[
        (
            "my_reward",
            EvalOutput(
                average_score=0.5,
                eval_output_items=[
                    EvalOutputItem(id=f"sum-{n}", score=n / 2, reasoning={"why": n}) for n in range(3)
                ],
            ),
        )
    ],
)  # fmt: skip


@pytest.mark.asyncio
async def test_trajectory_builder():
    config = MyTrajectoryBuilderConfig(num_generations=2)
    builder = MyTrajectoryBuilder(trajectory_builder_config=config)
    # Mock the run_eval method
    builder.run_eval = AsyncMock(return_value=mock_eval_output)
    # Test start_run
    await builder.start_run("test-run")
    assert "test-run" in builder.evaluation_runs
    # Test finalize
    result = await builder.finalize("test-run")
    assert isinstance(result, TrajectoryCollection)
    # Beyond the guide: what came out of it.
    assert builder.run_eval.await_count == 2  # once a generation
    assert "test-run" not in builder.evaluation_runs
    assert result.run_id == "test-run"
    assert result.failures == []
    assert [[t.reward for t in group] for group in result.trajectories] == [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
    for place, group in enumerate(result.trajectories):
        assert [t.metadata["generation"] for t in group] == [0, 1]
        assert {t.metadata["id"] for t in group} == {f"sum-{place}"}
        assert {t.metadata["reasoning"]["why"] for t in group} == {place}
        question, answer = group[0].episode
        assert (question.role, answer.role) == ("user", "assistant")
        assert answer.logprobs == [-0.25] * len(answer.content)
