"""The Toolkit's real ART plugin and openpipe-art's real client, trained by `finetune-nb art-server` on the CPU."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tic_tac_toe

import finetune_nb as ft

pytestmark = pytest.mark.slow

HOST = "127.0.0.87"
"""An address of its own: the plugin's health check asks port 8000 whatever the config says."""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(tic_tac_toe.__file__).parent), *sys.path]),
    "PYTHONUNBUFFERED": "1",
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The folder in which a server leaves the model of every step, while it is there."""
    monkeypatch.chdir(tmp_path)  # openpipe-art keeps a folder where it runs
    folder = tmp_path / "models"
    options = ["--host", HOST, "--port", "7623", "--learning-rate", "1e-3", "--max-tokens", "8", "--out", str(folder)]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "finetune_nb", "art-server", *options],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert "'embedded' is trained at http://127.0.0.87:7623" in server.stdout.readline()
            yield folder
        finally:
            server.terminate()
            server.wait(30)
            server.stdout.close()


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


async def test_nat_finetune_trains_a_game_over_several_turns_without_a_gpu(models, tmp_path):
    path = tic_tac_toe.write_config(tmp_path, HOST)
    # At its own level, info, the Toolkit writes the config into its log, finds the config within it, and comes to no end.
    quiet = ["--log-level", "warning"]
    code = "import tic_tac_toe; from nat.cli.main import run_cli; run_cli()"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", code, *quiet, "finetune", "--config_file", str(path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert sorted(folder.name for folder in models.iterdir()) == ["0001", "0002"]
    first, second = weights(models / "0001"), weights(models / "0002")
    assert any(not first[name].equal(second[name]) for name in first)
    log = (tmp_path / "server.log").read_text()
    assert "this server trains 'embedded' in its place" in log
    assert "not read here" in log
    assert "training.num_generations" in log


async def test_the_notebook_trains_on_it_and_the_games_get_better(models, tmp_path, closing):
    path = tic_tac_toe.write_config(tmp_path, HOST, games=32, generations=8)
    run = closing(ft.Run.from_nat(path, name="game"))
    epochs = [await run.next_epoch() for _ in range(5)]
    for epoch in epochs:
        print(f"reward {epoch.metrics.mean_reward:.3f}, seconds {epoch.seconds}")
    assert {epoch.job.status for epoch in epochs} == {"completed"}
    assert epochs[-1].metrics.mean_reward > epochs[0].metrics.mean_reward
    assert max(len(t.episode) for group in epochs[-1].collection.trajectories for t in group) > 3  # several turns
    assert len(list(models.iterdir())) == 5
