"""Tic-tac-toe as a workflow of the Toolkit: the model against random moves, a model call a move, each of which shows the board
alone. And its config, in the shape of the one that the Toolkit's own example has.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import yaml
from nat.builder.evaluator import EvaluatorInfo
from nat.builder.framework_enum import LLMFrameworkEnum
from nat.builder.function_info import FunctionInfo
from nat.cli.register_workflow import register_evaluator, register_function
from nat.data_models.component_ref import LLMRef
from nat.data_models.evaluator import EvaluatorBaseConfig
from nat.data_models.function import FunctionBaseConfig
from nat.plugins.eval.data_models.evaluator_io import EvalOutput, EvalOutputItem

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
RULES = "Tic-tac-toe. Reply with a free cell, 1 to 9."


class GameConfig(FunctionBaseConfig, name="test_tic_tac_toe"):
    """One game; the question is the side that the model plays."""

    player_model: LLMRef


@register_function(config_type=GameConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])
async def game(config: GameConfig, builder: Any):
    model = await builder.get_llm(config.player_model, wrapper_type=LLMFrameworkEnum.LANGCHAIN)

    async def play(side: str) -> str:
        """How it ended, and the model's legal moves: a move that is none loses at once."""
        board, moves = ["."] * 9, 0
        for turn in range(9):
            mark = "XO"[turn % 2]
            free = [cell for cell in range(9) if board[cell] == "."]
            cell = random.choice(free)
            if mark == side:
                reply = await model.ainvoke([("system", RULES), ("user", "".join(board))])
                digit = re.search(r"[1-9]", str(reply.content))
                if digit is None or int(digit[0]) - 1 not in free:
                    return f"illegal {moves}"
                cell, moves = int(digit[0]) - 1, moves + 1
            board[cell] = mark
            if any(all(board[i] == mark for i in line) for line in LINES):
                return f"{'won' if mark == side else 'lost'} {moves}"
        return f"drawn {moves}"

    yield FunctionInfo.from_fn(play, description=play.__doc__)


class ResultConfig(EvaluatorBaseConfig, name="test_game_result"):
    """1 for a game that was won, 0.5 for a draw; a tenth for every legal move before a loss."""


@register_evaluator(config_type=ResultConfig)
async def result(config: ResultConfig, builder: Any):
    async def evaluate(eval_input: Any) -> EvalOutput:
        items = []
        for item in eval_input.eval_input_items:
            ended, _, moves = str(item.output_obj).partition(" ")
            score = {"won": 1.0, "drawn": 0.5}.get(ended, 0.1 * int(moves or 0))
            items.append(EvalOutputItem(id=item.id, score=score, reasoning={"ended": ended}))
        return EvalOutput(average_score=0.0, eval_output_items=items)

    yield EvaluatorInfo(config=config, evaluate_fn=evaluate, description="how the game ended")


def write_config(folder: Path, host: str, games: int = 16, generations: int = 4, epochs: int = 2) -> Path:
    """The Toolkit's example names a model of 7 billion parameters and a GPU's arguments; so does this one."""
    rows = [{"id": n, "question": "XO"[n % 2], "answer": "won"} for n in range(games)]
    (folder / "data.json").write_text(json.dumps(rows))
    config = {
        "llms": {
            "openpipe_llm": {
                "_type": "openai",
                "model_name": "Qwen/Qwen2.5-7B-Instruct",
                "base_url": f"http://{host}:8000/v1",
                "api_key": "default",
                "temperature": 1.0,
            }
        },
        "workflow": {"_type": "test_tic_tac_toe", "player_model": "openpipe_llm"},
        "eval": {
            "general": {
                "max_concurrency": 16,
                "output_dir": str(folder / "eval"),
                "dataset": {"_type": "json", "file_path": str(folder / "data.json")},
            },
            "evaluators": {"rl_accuracy": {"_type": "test_game_result"}},
        },
        "trajectory_builders": {"builder": {"_type": "openpipe_art_traj_builder", "num_generations": generations}},
        "trainer_adapters": {
            "adapter": {
                "_type": "openpipe_art_trainer_adapter",
                "backend": {
                    "ip": host,
                    "port": 7623,
                    "name": "tic_tac_toe",
                    "project": "tic_tac_toe_project",
                    "base_model": "Qwen/Qwen2.5-7B-Instruct",
                    "api_key": "default",
                    "init_args": {"max_seq_length": 8192},
                    "engine_args": {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 1},
                },
                "training": {"learning_rate": 1e-5, "beta": 0.1, "num_generations": games},
            }
        },
        "trainers": {"trainer": {"_type": "openpipe_art_trainer"}},
        "finetuning": {
            "enabled": True,
            "trainer": "trainer",
            "trajectory_builder": "builder",
            "trainer_adapter": "adapter",
            "reward_function": {"name": "rl_accuracy"},
            "target_functions": ["<workflow>"],
            "num_epochs": epochs,
            "output_dir": str(folder / "runs"),
        },
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path
