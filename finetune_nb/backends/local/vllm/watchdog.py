"""Runs a server and outlives nobody: a script of its own, `python watchdog.py LOG COMMAND...`, standard library only.

Its standard input is a pipe whose other end the process holds that started it. Once that process has closed the pipe, or has
ended in whatever way, the server and all of its processes are ended. Death is not inherited: engine processes stay alive, with
their memory, when the process that started them is killed.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

LARGEST_LOG = 20_000_000
"""Bytes: a server that has failed writes a traceback for every request. Then what is there goes to LOG.1."""
TURN_SECONDS = 0.25
GRACE_SECONDS, ORPHANS_SECONDS = 10.0, 0.5
"""What the server has to end after it was asked to, and what its other processes have once it has ended."""


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def end(server: subprocess.Popen[bytes]) -> None:
    """Ends all processes of the server's group: asks them to, and kills those that are left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while is_alive(server.pid) and time.monotonic() < deadline:
        if server.poll() is not None:
            deadline = min(deadline, time.monotonic() + ORPHANS_SECONDS)
        time.sleep(0.05)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def main(log: str, *command: str) -> int:
    owner = os.getppid()
    with open(log, "ab") as output:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    os.write(1, b"%d\n" % server.pid)
    try:
        while server.poll() is None and os.getppid() == owner:
            if select.select([0], [], [], TURN_SECONDS)[0]:  # its end: nothing is ever written
                break
            with suppress(OSError):
                if os.path.getsize(log) > LARGEST_LOG:
                    shutil.copyfile(log, f"{log}.1")
                    os.truncate(log, 0)
    finally:
        end(server)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main(*sys.argv[1:]))
