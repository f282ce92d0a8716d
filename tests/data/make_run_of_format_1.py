"""Made run_of_format_1.zip: `python make_run_of_format_1.py run_of_format_1.zip`, with the code of release 0.1.0.

It is kept to show what is in the zip and where it came from. It is not meant to be run again: a newer release writes
newer files, and the zip is there to show that the old ones can still be read. tests/test_old_run.py reads it.

    runs/first         the calculator, trained with LoRA: epochs 0 to 3 with failed rollouts, missing rewards, validations
                       and live changes; its process was killed while epoch 4 was collecting rollouts
    runs/first-fork    forked after epoch 1 of it: epoch 2; its process was killed when epoch 3 had submitted its job
    runs/named         made from YAML, with every component by its `_type`: epoch 0
    train.json         the rows that `named` was trained on, which its config names relative to this folder
    frames/            every frame of every run as a table, `first-tokens.csv`, as that release made it
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import finetune_nb as ft
from finetune_nb.examples.calculator import CONFIG
from finetune_nb.examples.calculator.agent import kind_of, solve

DATA = CONFIG.parent / "data"
FRAMES = ("trajectories", "messages", "tokens", "groups", "epochs", "journal")
LORA = {"rank": 2, "target": ["q_proj", "v_proj"]}
YAML = """
llms:
  my_model: {_type: policy, adapter: my_adapter, max_tokens: 10}
workflow: {_type: calculator_agent, llm: my_model}
eval:
  general:
    dataset: {_type: json, file_path: train.json}
  evaluators:
    reward: {_type: weighted, weights: {correct: 0.75, close: 0.25}}
    correct: {_type: calculator_reward}
    close: {_type: numeric_closeness, scale: 20}
    exact: {_type: exact_match}
    number: {_type: regex, pattern: '^-?\\d+$'}
    contained: {_type: contains}
    used_tool: {_type: calculator_episode, kind: used_tool}
trajectory_builders:
  my_builder: {_type: eval_traj_builder, num_generations: 4}
trainer_adapters:
  my_adapter: {_type: local_grpo, model: embedded, lora: {rank: 2, target: [q_proj, v_proj]}}
trainers:
  my_trainer: {_type: epoch_trainer}
finetuning:
  enabled: true
  trainer: my_trainer
  trajectory_builder: my_builder
  trainer_adapter: my_adapter
  reward_function: {name: reward}
  num_epochs: 3
  output_dir: runs
"""


def rows(name: str, count: int) -> list[dict]:
    """The first rows of one of the example's files."""
    return json.loads((DATA / name).read_text())[:count]


async def solve_strictly(question, llm):
    """The example's agent, which fails where its answer ends with 3."""
    answer = await solve(question, llm)
    if answer.endswith("3"):
        raise ValueError(f"the answer {answer} ends with 3")
    return answer


def correct_or_unsure(item):
    """1 for the right answer, else 0; no reward at all for an answer that ends with 7."""
    if str(item.output_obj).endswith("7"):
        return None
    return float(item.output_obj == item.expected_output_obj)


async def solve_and_die(question, llm):
    """As solve_strictly; the process is killed during the slow rollouts, when the quick ones are in the folder."""
    answer = await solve_strictly(question, llm)
    if question == rows("train.json", 6)[4]["question"]:
        await asyncio.sleep(10)
        os.kill(os.getpid(), signal.SIGKILL)
    return answer


async def solve_slowly(question, llm):
    """As solve_strictly, and so slow that the folder gets the rollouts before they are trained on."""
    answer = await solve_strictly(question, llm)
    await asyncio.sleep(2.2)
    return answer


def functions(workflow=solve_strictly) -> dict:
    """What no file can hold."""
    return {
        "workflow": workflow,
        "reward": correct_or_unsure,
        "dataset": rows("train.json", 6),
        "validation": rows("held_out.json", 4),
        "evaluators": {"used_tool": lambda item: float(kind_of(item) == "used_tool")},
    }


async def first() -> None:
    run = ft.Run(
        **functions(),
        generations=6,
        curriculum={"initial_percentile": 0.5, "expansion_interval": 3},
        training={"lora": LORA, "learning_rate": 0.003, "optimizer_steps": 2, "kl_coef": 0.01},
        sampling={"max_tokens": 10},
        validation_interval=2,
        num_epochs=8,
        seed=7,
        name="first",
        output_dir="runs",
    )
    await run.next_epoch()
    await run.next_epoch()
    run.curriculum = {"percentile": 0.8}
    run.live = {"adapter.learning_rate": 0.002}
    await run.next_epoch()
    run.fork(epoch=1, curriculum={"percentile": 1.0}, training={"learning_rate": 0.001}).close()
    await run.next_epoch()
    run.close()


async def fork() -> None:
    run = ft.Run.open("runs/first-fork", **functions())
    await run.next_epoch()
    run.close()


async def named() -> None:
    run = ft.Run.from_config(YAML, name="named")
    await run.next_epoch()
    run.close()


async def killed_in_rollouts() -> None:
    await ft.Run.open("runs/first", **functions(solve_and_die)).next_epoch()


async def killed_in_training() -> None:
    from finetune_nb.recorder import Recorder

    submitted = Recorder.submitted

    async def die(*args):
        await submitted(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    Recorder.submitted = die
    await ft.Run.open("runs/first-fork", **functions(solve_slowly)).next_epoch()


def write_frames() -> None:
    """As every frame is read, from a copy of the runs."""
    shutil.copytree("runs", "copy")  # SQLite leaves a file beside a database that it reads with its log
    Path("frames").mkdir()
    for name in ("first", "first-fork", "named"):
        run = ft.Run.open(Path("copy") / name)
        assert name == "named" or run.partial.collection.trajectories
        for frame in FRAMES:
            options = {"partial": True} if frame == "trajectories" else {}
            getattr(run, frame)(**options).to_csv(Path("frames") / f"{name}-{frame}.csv", index=False)
    shutil.rmtree("copy")


def in_a_process(work) -> int:
    """Runs it in a process of its own, as a kernel would, and returns how that ended."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        asyncio.run(work())
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        Path("train.json").write_text(json.dumps(rows("train.json", 3), indent=1))
        for work in (first, fork, named):
            assert in_a_process(work) == 0, work
        for work in (killed_in_rollouts, killed_in_training):
            assert in_a_process(work) == -signal.SIGKILL, work
        for lock in Path("runs").glob("*/lock"):
            if lock.stat().st_size:  # of a killed process; the name of the machine belongs in no repository
                lock.write_text(json.dumps({"pid": 4242, "host": "notebook", "started": 0.0}) + "\n")
        for shared in Path("runs").glob("*/run.db-shm"):
            shared.unlink()  # SQLite makes it again from the log
        write_frames()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            for path in sorted(Path(".").rglob("*")):
                file.write(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
