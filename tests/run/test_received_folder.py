"""A run folder from somebody else is read as ever; nothing in it is used before the user says to trust it."""

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml
from small_agents import coin, guess, right

import finetune_nb as ft
from finetune_nb.errors import StoreError
from finetune_nb.store.trust import DATA_DIRECTORY, SIGNATURE
from finetune_nb.testing import FakeAdapter, ScriptedPolicy, sums

WORDS = r"(?s)found .*config\.yml without a signature.*Expected.*trust=True"


ticks = itertools.count()


def luck(item):
    """A reward that differs within every group, so that weights change and are saved."""
    return float(next(ticks))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a user's key, and a run of two epochs that this user made, which needs no object given again."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATA_DIRECTORY, str(place / "data"))
        run = ft.Run(
            guess,
            luck,
            sums(3),
            validation=sums(2, seed=5),
            generations=2,
            output_dir=place / "runs",
            name="theirs",
            sampling={"max_tokens": 3},
            curriculum={"initial_percentile": 1.0},
        )
        for _ in range(2):
            ft.run_sync(run.next_epoch())
        run.close()
    return place


@pytest.fixture
def own(made, tmp_path, monkeypatch):
    """The run, as the user who made it finds it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv(DATA_DIRECTORY, str(tmp_path / "data"))
    return tmp_path / "runs" / "theirs"


@pytest.fixture
def received(own, tmp_path, monkeypatch):
    """The same folder as another user finds it."""
    place = tmp_path / "received" / "theirs"
    shutil.copytree(own, place)
    monkeypatch.setenv(DATA_DIRECTORY, str(tmp_path / "my data"))
    return place


def opened(folder, closing, **options):
    return closing(ft.Run.open(folder, workflow=guess, reward=luck, dataset=sums(3), validation=sums(2), **options))


def rewrite(folder, change):
    path = folder / "config.yml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


@pytest.fixture
def host():
    """An address, and what was asked there."""
    asked = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.path} {dict(self.headers)}")
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def actions(run):
    """Everything that needs more of a run than its record, by name."""
    return {
        "next_epoch": lambda: ft.run_sync(run.next_epoch()),
        "validate": lambda: ft.run_sync(run.validate()),
        "rollout": lambda: ft.run_sync(run.rollout(0)),
        "chat": lambda: ft.run_sync(run.chat("1+1")),
        "start": lambda: run.start(1),
        "save_model": lambda: run.save_model(run.folder.parent / "model"),
        "fork": lambda: run.fork(),
        "build": lambda: ft.run_sync(run.config.builder.get_llm("policy")),
        "build anew": lambda: ft.run_sync(ft.Builder(run.config).get_trainer_adapter("adapter")),
    }


ACTIONS = list(actions(None))


# ── own ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
async def test_a_run_that_was_made_here_continues_with_nothing_extra_wherever_it_lies(own, tmp_path, closing):
    place = tmp_path / "elsewhere"
    shutil.move(own, place)
    run = opened(place, closing)
    assert (await run.next_epoch()).index == 2
    fork = closing(run.fork(epoch=1, name="branch"))
    await asyncio.to_thread(fork.close)
    assert (await opened(fork.folder, closing).next_epoch()).index == 2


@pytest.mark.slow
@pytest.mark.proof
def test_the_next_process_of_the_same_user_continues_the_run(own):
    code = """
import sys
import finetune_nb as ft
from small_agents import guess, right
from finetune_nb.testing import sums
run = ft.Run.open(sys.argv[1], guess, right, dataset=sums(3), validation=sums(2))
print(ft.run_sync(run.next_epoch()).index)
"""
    there = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the shared agents of the tests
    done = subprocess.run([sys.executable, "-c", code, str(own)], capture_output=True, text=True, env=there)
    assert done.stdout.strip() == "2", done.stderr


async def test_an_archived_run_is_still_own(own, closing):
    run = opened(own, closing)
    run.archive()
    again = opened(run.folder, closing)
    assert (await again.next_epoch()).index == 2


# ── received: read ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.proof
def test_a_received_run_is_read_as_ever_and_nothing_in_it_changes(received, tmp_path, closing):
    before = {path: path.read_bytes() for path in received.rglob("*") if path.is_file()}
    run = opened(received, closing)
    assert (len(run), run.state, run.model, run.curriculum.percentile) == (2, "ready", "embedded", 1.0)
    assert len(run.trajectories()) == 12 and len(run.messages()) == 24
    assert run.live["adapter.learning_rate"] > 0
    assert run.show()._repr_html_() and run.signal()._repr_html_() and run.preview(percentile=0.3)
    assert run.plot_rewards().axes and "theirs" in run._repr_html_()
    run.export(tmp_path / "report.html")
    assert len(ft.runs(received.parent)) == 1
    assert "trust=True" in run.status.read_only
    run.close()
    assert {path: path.read_bytes() for path in received.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("action", ACTIONS)
def test_whatever_needs_the_config_says_to_read_it_first(received, closing, action):
    run = opened(received, closing)
    expected = "not trusted" if action.startswith("build") else WORDS
    with pytest.raises(ft.RunError, match=expected):
        actions(run)[action]()
    assert {path.name for path in received.parent.iterdir()} == {"theirs"}


def test_nothing_of_a_received_config_comes_from_the_environment_or_reaches_a_host(
    received, closing, host, monkeypatch
):
    address, asked = host
    monkeypatch.setenv("CLOUD_SECRET", "s3cret-of-the-reader")

    def change(config):
        there = f"{address}/${{CLOUD_SECRET}}/v1"
        config["llms"] = {"policy": {"_type": "openai", "model_name": "${CLOUD_SECRET}", "base_url": there}}
        config["trainer_adapters"]["adapter"]["model"] = "${CLOUD_SECRET}"
        config["finetuning"]["num_epochs"] = "${CLOUD_EPOCHS:-7}"

    rewrite(received, change)
    run = opened(received, closing)
    assert (run.config.llms["policy"].model_name, run.model, run.planned) == ("${CLOUD_SECRET}", "${CLOUD_SECRET}", 7)
    for name, action in actions(run).items():
        with pytest.raises(ft.FinetuneError):
            action()
        assert "s3cret" not in f"{name} {run!r} {run._repr_html_()} {run.config!r} {run.status}"
    assert asked == []


@pytest.mark.parametrize("where", ["model", "executor", "adapter", "dataset"])
def test_no_file_or_module_that_a_received_config_names_is_loaded(received, tmp_path, closing, monkeypatch, where):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'hacked')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(config):
        if where == "model":
            config["trainer_adapters"]["adapter"]["model"] = str(tmp_path)
        elif where == "executor":
            config["run"].update(engine="ray", ray={"runtime_env": {"py_modules": [str(tmp_path)]}})
        elif where == "adapter":
            config["trainer_adapters"]["adapter"] = {"_type": "evil_module:Adapter"}
        else:
            config["finetuning"]["run_configuration"]["dataset"] = "/etc/passwd"

    rewrite(received, change)
    run = opened(received, closing)
    for action in ("next_epoch", "rollout", "fork"):
        with pytest.raises(ft.RunError, match=WORDS):
            actions(run)[action]()
    assert len(run.trajectories()) == 12
    assert "evil_module" not in sys.modules and not (tmp_path / "hacked").exists()


def test_an_own_run_whose_config_was_edited_by_others_is_a_received_one(own, closing):
    rewrite(own, lambda config: config["run"].update(keep_checkpoints=1))
    with pytest.raises(ft.RunError, match=WORDS):
        ft.run_sync(opened(own, closing).next_epoch())
    assert len(list((own / "checkpoints").iterdir())) == 2


def test_the_signature_of_one_folder_signs_no_other(own, tmp_path, closing):
    other = closing(ft.Run(guess, luck, sums(3), generations=2, output_dir=tmp_path / "runs", name="other"))
    ft.run_sync(other.next_epoch())
    other.close()
    shutil.copyfile(own / SIGNATURE, other.folder / SIGNATURE)
    with pytest.raises(ft.RunError, match=WORDS):
        opened(other.folder, closing).start(1)


# ── received: trusted, or configured anew ────────────────────────────────────────────────────────────────────────────


async def test_a_trusted_run_continues_and_is_remembered_until_its_config_is_edited(received, closing, monkeypatch):
    looking = opened(received, closing)
    run = opened(received, closing, trust=True)
    assert run is not looking
    assert (await run.next_epoch()).index == 2
    await asyncio.to_thread(run.close)
    await asyncio.to_thread(looking.close)
    again = opened(received, closing)
    assert (await again.next_epoch()).index == 3
    await asyncio.to_thread(again.close)
    rewrite(received, lambda config: config["run"].update(seed=7))
    with pytest.raises(ft.RunError, match=WORDS):
        await opened(received, closing).next_epoch()


def test_trust_without_functions_replaces_what_was_only_looked_at(received, closing):
    looking = closing(ft.Run.open(received))
    assert ft.Run.open(received) is looking
    run = closing(ft.Run.open(received, trust=True))
    assert run is not looking and run.status.read_only is None


def test_a_placeholder_of_a_trusted_config_is_filled(received, closing, monkeypatch):
    monkeypatch.setenv("STEPS", "3")
    rewrite(received, lambda config: config["finetuning"].update(num_epochs="${STEPS}"))
    assert len(opened(received, closing)) == 2
    assert opened(received, closing, trust=True).planned == 3


async def test_a_fork_of_a_received_run_takes_trust_too(received, closing):
    run = opened(received, closing)
    fork = closing(run.fork(epoch=0, name="mine", trust=True))
    assert (await fork.next_epoch()).index == 1
    await asyncio.to_thread(fork.close)
    assert (await opened(fork.folder, closing).next_epoch()).index == 2  # made here, so signed


async def test_a_configuration_that_the_caller_gives_continues_a_received_folder_without_its_config(
    received, closing, host
):
    address, asked = host
    rewrite(received, lambda config: config["llms"]["policy"].update(_type="openai", base_url=address, model_name="m"))
    options = {"generations": 2, "output_dir": received.parent, "name": "theirs", "sampling": {"max_tokens": 3}}
    run = closing(ft.Run(guess, luck, sums(3), resume="auto", **options))
    assert (await run.next_epoch()).index == 2
    await asyncio.to_thread(run.close)
    assert asked == []
    with pytest.raises(ft.RunError, match=WORDS):  # its config.yml is still theirs
        await opened(received, closing).next_epoch()


def test_a_folder_that_cannot_be_written_is_trusted_for_this_time(received, closing, caplog):
    (received / SIGNATURE).unlink()
    (received / SIGNATURE).mkdir()  # also root cannot put a file there
    assert opened(received, closing, trust=True).status.read_only is None
    assert "is trusted this time" in caplog.text


# ── links in a received folder ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/epoch-000001", "weights", "manifest"])
@pytest.mark.parametrize("trusted", [True, False])
async def test_a_link_among_the_checkpoints_is_followed_neither_to_read_nor_to_delete(
    own, received, tmp_path, closing, place, trusted
):
    newest = received / "checkpoints" / "epoch-000001"
    path = {"weights": newest / "weights.safetensors", "manifest": newest / "manifest.json"}.get(
        place, received / place
    )
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    rewrite(received, lambda config: config["run"].update(keep_checkpoints=1))
    kept = sorted((str(p), p.stat().st_size) for p in [outside, *outside.rglob("*")])
    run = opened(received, closing, trust=trusted)
    assert "theirs" in run._repr_html_()
    with pytest.raises(ft.FinetuneError, match="symbolic link" if trusted else WORDS):
        await run.next_epoch()
    with pytest.raises(ft.FinetuneError):
        run.fork(name="branch")
    assert not (received.parent / "branch").exists()
    await asyncio.to_thread(run.close)
    assert sorted((str(p), p.stat().st_size) for p in [outside, *outside.rglob("*")]) == kept


@pytest.mark.parametrize("place", ["trajectories", "run.db", "config.yml", "log.jsonl", "run.db-wal"])
def test_a_link_in_a_received_folder_is_not_read_through(received, tmp_path, closing, place):
    path = received / place
    if path.exists():
        path.rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").write_bytes(b"")
    path.symlink_to(tmp_path / "outside")

    def read():
        run = opened(received, closing)
        run.trajectories()
        run.messages()
        run.log_lines()

    with pytest.raises(StoreError, match="symbolic link"):
        read()


def test_deleting_a_received_run_takes_its_folder_and_nothing_that_its_links_lead_to(received, tmp_path, closing):
    outside = tmp_path / "outside"
    (received / "checkpoints").rename(outside)
    (received / "checkpoints").symlink_to(outside)
    opened(received, closing).delete()
    assert not os.path.lexists(received)
    assert len(list(outside.iterdir())) == 2


# ── as before ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_with_its_own_adapter_object_is_own_too(tmp_path, monkeypatch, closing):
    monkeypatch.setenv(DATA_DIRECTORY, str(tmp_path / "data"))
    options = {"generations": 2, "output_dir": tmp_path, "name": "a", "resume": "auto"}
    for index in range(2):
        run = closing(ft.Run(guess, right, sums(3), adapter=FakeAdapter(policy=ScriptedPolicy(coin)), **options))
        assert (await run.next_epoch()).index == index
        await asyncio.to_thread(run.close)
    assert "trust" not in str(ft.Run.open(tmp_path / "a").status.read_only)
