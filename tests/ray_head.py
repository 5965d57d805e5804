"""A Ray head of the tests' own: on loopback, behind a token, with its dashboard and every port its own."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

BIN = Path(sys.executable).parent
# Another cluster of this machine may have the ports that Ray would choose, that of the agent that starts jobs too.
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")


@dataclass(frozen=True)
class RayHead:
    """Where a head listens, and who may come in."""

    process: int
    home: Path
    token: str
    ports: dict[str, int]

    @property
    def dashboard(self) -> str:
        """The address of dashboard and jobs."""
        return f"http://127.0.0.1:{self.ports['dashboard-port']}"

    @property
    def client(self) -> str:
        """The address for `ray.init`."""
        return f"ray://127.0.0.1:{self.ports['ray-client-server-port']}"


def without_ray(**more: str) -> dict[str, str]:
    """Return the environment without what it says of Ray and of the machine's other clusters; `more` is added.

    Workers do not yield to other processes, as in conftest.py.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_worker_niceness": "0"}
    return {**kept, **own, **more}


@contextmanager
def ray_head(home: Path) -> Iterator[RayHead]:
    """Start what `ray start --head` starts, in a home of its own; it ends with the block."""
    token = secrets.token_hex(32)
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    environment = without_ray(
        HOME=str(home),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=token,
        RAY_USAGE_STATS_ENABLED="0",
        GRPC_ENABLE_FORK_SUPPORT="0",  # as nodes have it from actors.cluster_secrets: clients else fail now and then
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # else Ray rewrites the node's address and listens everywhere
        # On a busy machine the dashboard takes its time.
        RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT="180",
        RAY_DASHBOARD_STARTUP_TIMEOUT_S="240",
    )
    with ExitStack() as stack:
        # Names of sockets are short, and a test's folder has a long one.
        folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
        command += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        log = stack.enter_context((home / "head.log").open("w"))
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        stack.callback(lambda: process.wait(timeout=90))
        stack.callback(process.terminate)
        head = RayHead(process.pid, home, token, ports)
        wait_until(lambda: process.poll() is not None or is_ready(head), within_s=300)
        assert process.poll() is None, (home / "head.log").read_text()[-3000:]
        yield head


def is_ready(head: RayHead) -> bool:
    """Return whether the dashboard answers and everything that a user may reach listens."""
    try:
        answer = httpx.get(f"{head.dashboard}/api/version", headers={"Authorization": f"Bearer {head.token}"})
    except httpx.TransportError:
        return False
    listening = {port for _, port in listeners(head.process)}
    return answer.status_code == 200 and set(head.ports.values()) <= listening


def listeners(process: int) -> set[tuple[str, int]]:
    """Return address and port of all TCP sockets on which the children of a process listen."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for child in psutil.Process(process).children(recursive=True)
        for connection in connections_of(child)
        if connection.status == psutil.CONN_LISTEN
    }


def connections_of(process: psutil.Process) -> list:
    """Return a process's TCP connections, none once it has ended."""
    try:
        return process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return []


def free_ports(number: int) -> list[int]:
    """Return ports of loopback on which nobody listens."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_until(is_so, within_s: float = 240, every_s: float = 0.5) -> None:
    """Wait until a function returns what is true."""
    ends = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < ends, f"not so within {within_s} s"
        time.sleep(every_s)
