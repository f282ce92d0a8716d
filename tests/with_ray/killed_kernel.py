"""A kernel whose trainer is in an actor: `python killed_kernel.py FOLDER ADDRESS UNTIL`. It is killed with SIGKILL while a job
trains ("job"), when a job was handed over and not yet recorded ("unrecorded"), behind an epoch whose weights lie on no disk
("epoch"), or it ends without closing its run ("exit").
"""

import asyncio
import os
import signal
import sys
import time

import finetune_nb as ft
from finetune_nb.engine.run_writer import RunWriter
from finetune_nb.examples import calculator


def make(folder, address, until):
    overrides = {"run__checkpoint_every": 0 if until == "epoch" else 1}
    overrides |= {"run__deterministic": False, "run__engine": f"ray:{address}"}
    overrides |= {"run__ray": {"workers": 1, "worker_cpus": 0.25, "trainer": True, "trainer_cpus": 0.25}}
    overrides |= {"finetuning__run_configuration__validation_dataset": None, "finetuning__output_dir": folder}
    overrides |= {"trajectory_builders__my_builder__examples_per_epoch": 16}
    overrides |= {"trainer_adapters__my_adapter__inner_epochs": 6}
    return ft.Run.from_config(calculator.CONFIG, name="run", resume="auto", **overrides)


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder, address, until):
    run = make(folder, address, until)
    if until == "exit":
        asyncio.run(run.chat("what is 3 + 4 ?"))
        assert "torch" not in sys.modules  # the model is the actor's business
        return
    if until == "unrecorded":
        RunWriter.on_submitted = die
    run.start(epochs=2)
    while not (run._driver.progress.trained if until == "job" else len(run)):
        time.sleep(0.05)
    die()


if __name__ == "__main__":
    main(*sys.argv[1:])
