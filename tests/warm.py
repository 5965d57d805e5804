"""Processes that start in milliseconds: forks of one parent that has imported their libraries.

A fork shares nothing with the tests' own process; it has the arguments, environment, folder and streams that it is
given, and any signal ends it as it ends every process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TESTS = Path(__file__).parent


class WarmProcess:
    """A fork of a warm parent, with what the tests use of `subprocess.Popen`; its output is text."""

    def __init__(self, connection: socket.socket, stdout: IO[str], stderr: IO[str]) -> None:
        self._connection, self._said = connection, connection.makefile("r")
        self.stdout, self.stderr = stdout, stderr
        self.pid = int(self._said.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Return how the process ended: its status, or minus the signal's number.

        Raises:
          TimeoutError: it did not within so many seconds.
        """
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = int(self._said.readline())
            self._said.close()
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what the process wrote, once it has ended; one that takes longer is killed.

        Raises:
          TimeoutError: it took longer than so many seconds.
        """
        try:
            self.wait(timeout)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        with self.stdout as out, self.stderr as err:
            out.seek(0)
            err.seek(0)
            return out.read(), err.read()


class WarmParent:
    """Forks for every program that is started here."""

    def __init__(self, address: str) -> None:
        self._address = address

    def start(self, *argv: str | Path, env: Mapping[str, str], cwd: Path | None = None) -> WarmProcess:
        """Start a program, its absolute path or a module's name first, with its output in files of the system's."""
        wanted = {"argv": [str(word) for word in argv], "env": dict(env), "cwd": str(cwd or Path.cwd())}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 - open until the output is read
        with Path(os.devnull).open() as nothing:
            files = [stream.fileno() for stream in (nothing, out, err)]
            socket.send_fds(connection, [json.dumps(wanted).encode()], files)
        return WarmProcess(connection, out, err)


@contextmanager
def warm_parent(modules: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[WarmParent]:
    """Start a parent that has imported modules; it ends with the block.

    Raises:
      RuntimeError: it did not start.
    """
    with tempfile.TemporaryDirectory(prefix="medfl-warm-", dir="/tmp") as folder:  # a socket's name is short
        address = f"{folder}/socket"
        with subprocess.Popen(
            [sys.executable, str(TESTS / "warm_parent.py"), address, *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(env or os.environ),
        ) as parent:  # fmt: skip
            if parent.stdout.readline() != "ready\n":
                raise RuntimeError(f"the parent of {', '.join(modules)} did not start")
            yield WarmParent(address)
            parent.stdin.close()
