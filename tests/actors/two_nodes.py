"""A process with a Ray cluster of two nodes: runs a federation of hospitals a and b and prints where they were."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from actors.cluster import secure_environment  # noqa: E402

secure_environment()
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)

import ray  # noqa: E402
from cli_runs import DP, configuration, write_patients  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from actors.train import drive  # noqa: E402
from medfl_ray.config.files import parse_run_config  # noqa: E402
from medfl_ray.data.sources import list_hospitals  # noqa: E402
from medfl_ray.store.run.folder import RunFolder  # noqa: E402


def private_run(folder: Path) -> Any:
    """Return a private run, whose ledgers outlive it, of hospitals a and b."""
    hospitals = [
        {"id": name, "directory": str(write_patients(folder / name)), "num_patients": 20, "max_epsilon": 50}
        for name in "ab"
    ]
    return parse_run_config(
        configuration(
            data={"hospitals": hospitals, "labels": {1: "box"}, "channels": ["T1"]},
            privacy={**DP, "epsilon": 40},
            federation={"rounds": 3, "pool": "ray", "min_clients": 1},
            output={"directory": str(folder / "runs"), "state_directory": str(folder / "state")},
        )
    )


def actors_now() -> dict[str, tuple[str, int]]:
    """Return node and process of every named actor that is alive."""
    from ray._private.state import actors

    found = {}
    for actor in actors().values():
        if actor["State"] == "ALIVE":
            found[actor["Name"]] = (actor["Address"]["NodeID"], actor["Pid"])
    return found


def main(folder: Path) -> None:
    """Run, end a's process once in the second round, and print what was where."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"hospital:b": 1}, "node_ip_address": "127.0.0.1"},
    )
    cluster.add_node(num_cpus=2, resources={"hospital:a": 1}, node_ip_address="127.0.0.1")
    run = private_run(folder)
    policies, run_folder = tuple(list_hospitals(run)), RunFolder.create(run)
    seen: dict[str, Any] = {"hospitals": {"a": [], "b": []}, "processes": {"a": [], "b": []}, "failed": []}

    def watch(event: Any) -> None:
        for name, (node, process) in actors_now().items():
            kind, hospital = (*name.split(":")[2:], "")[:2]  # as actors.names writes them
            if kind == "coordinator":
                seen["coordinator"] = node
            elif kind == "hospital":
                seen["hospitals"][hospital].append(node)
                seen["processes"][hospital].append(process)
                training = event.type == "hospital" and event.hospital == "a" and event.state == "training"
                if training and hospital == "a" and "killed" not in seen:
                    seen["killed"] = process
                    os.kill(process, signal.SIGKILL)
        if not seen.get("nodes"):
            nodes = {name: node["NodeID"] for node in ray.nodes() for name in node["Resources"]}
            seen["nodes"] = {
                "a": nodes["hospital:a"],
                "b": nodes["hospital:b"],
                "head": nodes["node:__internal_head__"],
            }

    try:
        outcome = drive(run, policies, run_folder.path, watch, cluster.address)
    finally:
        cluster.shutdown()
    receipts = RunFolder.open(run_folder.path).receipts()
    seen["failed"] = sorted({failure.hospital for receipt in receipts for failure in receipt.failures})
    seen["completed"] = outcome.completed
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
