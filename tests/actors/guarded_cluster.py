"""A process with a Ray cluster of our own and its dashboard: prints where it listens and ends with its input."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def free_the_agents_port() -> None:
    """Let the agent that starts jobs listen on a port of our own: its fixed one is taken by any other cluster here."""
    from ray._private import parameter

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    usual = parameter.RayParams.__init__

    def start(self: Any, *arguments: Any, **named: Any) -> None:
        usual(self, *arguments, **{**named, "dashboard_agent_listen_port": port})

    parameter.RayParams.__init__ = start


def main() -> None:
    """Start as `medfl-ray run --dashboard` does, say where, and wait."""
    from actors.cluster import connect, disconnect, secure_environment

    secure_environment()
    free_the_agents_port()
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cluster = connect(num_cpus=2, dashboard=True)
    import ray

    where = {
        "dashboard": f"http://{cluster.dashboard_url}",
        "gcs": ray.get_runtime_context().gcs_address,
        "metrics_port": ray.nodes()[0]["MetricsExportPort"],
        "token": os.environ["RAY_AUTH_TOKEN"],
    }
    print(json.dumps(where), flush=True)
    sys.stdin.read()
    disconnect()


if __name__ == "__main__":
    main()
