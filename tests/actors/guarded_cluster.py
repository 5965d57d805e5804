"""A process with a Ray cluster of our own and its dashboard: prints where it listens and ends with its input."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Start as `medfl-ray run --dashboard` does, say where, and wait."""
    from actors.cluster import connect, disconnect

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
