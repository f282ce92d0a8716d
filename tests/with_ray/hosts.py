"""Hosts made of Linux namespaces, cabled to one switch. Each has its own network, processes, host name, /dev/shm and /tmp/ray.

They need root. Nothing of a host is left when the process that made it ends, in whichever way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import finetune_nb

NAMESPACES = ["--net", "--mount", "--pid", "--uts", "--ipc"]
ENTER = ["-m", "-u", "-i", "-n", "-p"]
FOLDER = Path(__file__).parent
PATHS = os.pathsep.join(map(str, [Path(finetune_nb.__file__).parents[1], FOLDER.parent / "support"]))
ENGINE = "ray:10.77.0.1:6379"
"""Of the cluster whose head is the first host."""
RAY = "from ray.scripts.scripts import main; main()"
# A node that does not answer counts as dead after some 12 seconds, and not after 30. On a busy machine one starts slowly.
QUICK = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}
QUICK |= {"RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "3000"}
QUICK |= {"RAY_raylet_start_wait_time_s": "120"}
# Said, since Ray decides it by what lies in the home folder: a head takes a token that it finds there, and a node that
# joins it does not. A cluster of several machines is one with a token, as Ray advises.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
QUICK |= {"PYTHONPATH": PATHS, **TOKEN}
NEEDED = ("ip", "unshare", "nsenter", "mount")


def why_not() -> str | None:
    """Why no host can be made here; None: they can."""
    missing = [command for command in NEEDED if shutil.which(command) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces without root ({tried.stderr.strip()})"


class Machine:
    """A set of namespaces, kept by a process that sleeps in it. setup: shell commands that are run in it first."""

    def __init__(self, setup: Sequence[str] = ()) -> None:
        script = "\n".join(["set -e", "ip link set lo up", *setup, "echo ready", "while sleep 3600; do :; done"])
        # The shell is its process 1: it reaps what ends there, and all of its processes end with it.
        command = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child", "sh", "-c", script]
        # The outer process ends with pytest's, and takes the machine with it.
        self._keeper = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == "ready\n", "the namespaces could not be made"
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children")
        self.init = int(children.read_text().split()[0])

    def command(self, *args: str | os.PathLike[str]) -> list[str]:
        """What runs these in the machine."""
        return ["nsenter", "-t", str(self.init), *ENTER, "--", *map(os.fspath, args)]

    def run(self, *args: str | os.PathLike[str], **options) -> str:
        """What a command says that ends well there. Raises AssertionError for one that does not."""
        ended = subprocess.run(self.command(*args), capture_output=True, text=True, **options)
        assert ended.returncode == 0, (
            f"{args} ended with {ended.returncode}: {ended.stdout[-2000:]} {ended.stderr[-3000:]}"
        )
        return ended.stdout

    def ip(self, *args: str) -> None:
        """The command `ip` in its network, with this process's view of everything else."""
        subprocess.run(["nsenter", "-t", str(self.init), "-n", "ip", *args], check=True)

    def kill(self) -> None:
        """Power off: every process of it at once."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self._keeper.wait()


def make_switch() -> Machine:
    """What hosts are cabled to."""
    return Machine(["ip link add switch type bridge", "ip link set switch up"])


class Host(Machine):
    """A machine with the address 10.77.0.NUMBER. folder: it has `shared`, and `own`, which is another one on each host. shm: the
    size of /dev/shm."""

    def __init__(self, switch: Machine, number: int, folder: Path, shm: str) -> None:
        self.name, self.address, self._switch = f"host{number}", f"10.77.0.{number}", switch
        self.own, self.shared = folder / "own", folder / "shared"
        Path("/tmp/ray").mkdir(exist_ok=True)
        super().__init__(
            [
                f"hostname {self.name}",
                f"mount -t tmpfs -o size={shm} tmpfs /dev/shm",
                "mount -t tmpfs tmpfs /tmp/ray",
                f"mount -t tmpfs tmpfs '{self.own}'",
            ]
        )
        switch.ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", str(self.init))
        switch.ip("link", "set", self.name, "master", "switch", "up")
        self.ip("address", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")
        self.ip("route", "add", "default", "dev", "eth0")  # Ray takes its address from there

    def cut_off(self) -> None:
        """Pulls its cable."""
        self._switch.ip("link", "set", self.name, "down")

    def connect(self) -> None:
        self._switch.ip("link", "set", self.name, "up")

    def start_ray(
        self, head: Host | None = None, cpus: float = 2, store: int = 100, path: str | Path = "", **env: str
    ) -> None:
        """Starts a node, of the cluster of `head` or of a new one. store: MB of its object store. path: a
        folder in which its processes find modules first. Raises AssertionError with what Ray says."""
        where = [f"--address={head.address}:6379"] if head else ["--head", "--port=6379", "--include-dashboard=false"]
        command = ["start", *where, f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--num-gpus=0"]
        command += [f"--object-store-memory={store * 10**6}", "--disable-usage-stats"]
        self.python("-c", RAY, *command, env={"PYTHONPATH": f"{path}{os.pathsep}{PATHS}", **env})

    def stop_ray(self) -> None:
        """Ends what is left of a node."""
        self.python("-c", RAY, "stop", "--force")

    def kernel(self, what: str, path: str | Path = "", env: Mapping[str, str] = {}, **options: Any) -> Kernel:
        """Starts host_kernel.py. path: a folder in which it finds modules first."""
        return Kernel(self, what, {"PYTHONPATH": f"{path}{os.pathsep}{PATHS}", **env}, options)

    def python(self, *args: str | os.PathLike[str], env: Mapping[str, str] = {}) -> str:
        return self.run(sys.executable, *args, env={**os.environ, **QUICK, **env}, timeout=300)


class Kernel:
    """host_kernel.py at work on a host."""

    def __init__(self, host: Host, what: str, env: Mapping[str, str], options: Mapping[str, Any]) -> None:
        command = host.command(sys.executable, FOLDER / "host_kernel.py", what, json.dumps(options, default=os.fspath))
        self._told, self._said = (
            host.own.parent / f"{host.name}-{what}-{uuid.uuid4().hex}.{end}" for end in ("out", "err")
        )
        with self._told.open("wb") as out, self._said.open("wb") as err:
            self._process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **QUICK, **env})

    def told(self) -> list[dict[str, Any]]:
        """What it found until now. Ray prints there, too."""
        lines = self._told.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def said(self) -> str:
        """What it wrote to stderr."""
        return self._said.read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        """Waits until something is so. Raises AssertionError where it is not in time, or where the kernel has ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, f"the kernel has ended: {self.told()} {self.said()[-5000:]}"
            assert time.monotonic() < deadline, f"not so after {seconds:g} s: {self.told()} {self.said()[-5000:]}"
            time.sleep(0.1)

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code."""
        return self._process.wait(seconds)

    def found(self, seconds: float = 300.0) -> list[dict[str, Any]]:
        """What it has found when it ends well. Raises AssertionError where it does not."""
        assert self.wait(seconds) == 0, self.said()[-5000:]
        return self.told()


def ended_after(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether something is so within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
