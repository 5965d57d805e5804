"""Ours on one case of the peers' workload: `simulation_contender.py CASE fast|exact|bf16`.

A simulation as a user would run it, checkpoints and receipts included, with one actor per core. `workload` is
imported from the peers' folder, which has to be on PYTHONPATH, and takes the times. The warm-up is thrown away.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import simulation_hospitals as hospitals
import workload

from actors.cluster import connect, disconnect
from actors.simulation.run import Simulation
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.federation.events import Event, PhaseStarted, RoundClosed
from medfl_ray.store.run.folder import RunFolder

MODES = ("fast", "exact", "bf16")
WARM_UP_CLIENTS = 100


def configure(case: dict[str, Any], mode: str, directory: Path) -> RunConfig:
    """Return the run that is this case: listed order, one pass, plain SGD, no evaluation on the way."""
    size = 32 if case["dim"] == 2 else 64
    return RunConfig.model_validate(
        {
            "name": f"{case['name']}-{mode}",
            "data": {"phantom": {"num_hospitals": case["N"]}, "spatial_dims": case["dim"]},
            "model": {"type": "custom", "factory": "simulation_hospitals:network", "spatial_dims": case["dim"]},
            "training": {
                "batch_size": case["batch"],
                "patient_order": "listed",
                "learning_rate": workload.LR,
                "optimizer": "sgd",
                "momentum": 0.0,
                "loss": "cross_entropy",
                "patch_size_voxels": [size] * case["dim"],
                "patches_per_patient": 1,
                "foreground_fraction": 0.0,
                "augment": False,
                "mixed_precision": mode == "bf16",
                "device": "cpu",
            },
            "federation": {
                "pool": "virtual",
                "rounds": case["rounds"],
                "local_epochs": 1,
                "eval_every": case["rounds"],
                "eval_hospitals": 1,
                "exact": mode == "exact",
            },
            "privacy": {"enable_dp": False},
            "output": {"directory": str(directory), "report": False, "export": False},
        }
    )


def policies_of(case: dict[str, Any]) -> tuple[SitePolicy, ...]:
    """Return what every hospital declares."""
    return tuple(
        SitePolicy(
            hospital=hospitals.name_of(number),
            data_set="workload",
            declared="synthetic",
            num_patients=workload.n_samples(case, number),
        )
        for number in range(case["N"])
    )


def cohort(case: dict[str, Any], number: int) -> list[str]:
    """Names of those who train in round `number`, the first being 0."""
    return [hospitals.name_of(client) for client in workload.cohort(case, number)]


def final_weights(folder: Path, case: dict[str, Any]) -> Any:
    """Return the run's last weights [P], in the order of the network's parameters."""
    from medfl_ray.export.weights import load_weights
    from medfl_ray.params import layout_of

    return load_weights(folder / "model.safetensors", layout_of(workload.make_model(case)))


def main(case: dict[str, Any], mode: str, directory: Path) -> None:
    """Simulate the case and report as every contender does."""
    log = workload.Log()
    run = configure(case, mode, directory)
    folder = RunFolder.create(run).path

    def follow(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == "federated":
            log.mark("rounds_start")
        elif isinstance(event, RoundClosed):
            failures = event.result.receipt.failures
            assert not failures, failures[0]
            log.round(warm=False)

    connect()
    try:
        with Simulation(run, policies_of(case), folder, follow, open_data=hospitals.open_data) as simulation:
            log.start()
            simulation.warm_up(cohort(case, 0)[:WARM_UP_CLIENTS])
            log.round(warm=True)
            outcome = simulation.run(select=lambda number: cohort(case, number - 1))
    finally:
        disconnect()
    assert outcome.completed, outcome.reason
    log.done(case, final_weights(folder, case), contender=f"ours_{mode}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in workload.CASES or sys.argv[2] not in MODES:
        sys.exit(f"usage: simulation_contender.py {'|'.join(workload.CASES)} {'|'.join(MODES)}")
    with tempfile.TemporaryDirectory(prefix="medfl-simulation-") as scratch:
        main(workload.case(sys.argv[1]), sys.argv[2], Path(scratch))
