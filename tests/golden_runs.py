"""Tiny runs whose final weights are known to the last bit: tests/golden/weights.json, written by this file.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 .venv/bin/python tests/golden_runs.py

Moving code must leave them as they are. A change that is meant to alter numbers writes the file again and says so.
Floats depend on the processor and on PyTorch: a probe tells whether they are those of the machine that wrote the file,
and where they are not, norm and first values are compared instead of the checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from actors.flower.rule import with_flower
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.config.aggregation import RobustConfig, StrategyName
from medfl_ray.config.files import parse_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder

GOLDEN = Path(__file__).parent / "golden" / "weights.json"
WRITTEN = ("local", "flower", "simulation")
"""Pools with entries of their own; actors on Ray give those of one process."""
RTOL = 1e-3
ROBUST_RULES = get_args(RobustConfig.model_fields["rule"].annotation)

FLOWER = {"strategy": "FedAvgM", "options": {"server_momentum": 0.9, "server_learning_rate": 0.7}}
STRATEGIES = {
    **{f"strategy/{name}": {"aggregation": {"strategy": name}} for name in get_args(StrategyName)},
    "strategy/flower": {"aggregation": {"strategy": "flower", "flower": FLOWER}},
    "strategy/silobn": {
        "aggregation": {"strategy": "silobn"},
        "model": {"type": "custom", "factory": "golden_runs:with_running_statistics"},
    },
    "strategy/custom": {"aggregation": {"strategy": "custom", "factory": "golden_runs:half_step"}},
}
FIVE = {"phantom": {"preset": "balls", "num_hospitals": 5, "patients_per_hospital": 4, "size_voxels": 16, "seed": 3}}
ROBUST = {
    f"robust/{rule}": {"aggregation": {"mode": "robust", "robust": {"rule": rule}}, "data": FIVE}
    for rule in ROBUST_RULES
}
DP = {"enable_dp": True, "noise_multiplier": 1.0, "sample_rate": 0.5, "delta": 1e-5}
PRIVATE = {
    "dp/patient_single": {"privacy": DP, "training": {"patient_gradients": "single"}},
    "dp/patient_grouped": {"privacy": DP, "training": {"patient_gradients": "grouped", "patient_group_size": 2}},
    "dp/patient_scaffold": {
        "privacy": DP,
        "training": {"patient_gradients": "single"},
        "aggregation": {"strategy": "scaffold"},
    },
    "dp/hospital": {"privacy": {"enable_dp": True, "unit": "hospital", "noise_multiplier": 1.0, "delta": 1e-3}},
}
PHANTOM_3D = {"num_hospitals": 2, "patients_per_hospital": 4, "size_voxels": 16, "seed": 3}
OTHERS = {
    "other/unet3d": {
        "data": {"phantom": PHANTOM_3D, "name": "heads", "spatial_dims": 3},
        "model": {"type": "unet3d", "features": [4, 8]},
    },
    "other/moving_average": {"aggregation": {"ema_decay": 0.5, "max_update_norm": 0.05}},
    "other/three_steps_decaying": {"federation": {"local_steps": 3, "local_steps_schedule": "decay"}},
}
CASES: dict[str, dict[str, Any]] = {**STRATEGIES, **ROBUST, **PRIVATE, **OTHERS}


def half_step(config: Any) -> Any:
    """Return a strategy of the user's own: half of the mean update."""
    from medfl_ray.aggregation.strategies import Strategy

    return Strategy(lambda size: {}, lambda state, weights, update: (state, weights + update / 2))


def with_running_statistics(spatial_dims: int, in_channels: int, out_channels: int) -> torch.nn.Module:
    """Return a network whose normalisation keeps running statistics, which silobn leaves in the hospital."""
    norm = torch.nn.BatchNorm2d(4)
    norm.num_batches_tracked = None  # whole numbers cannot be averaged
    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, 4, 3, padding=1),
        norm,
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, out_channels, 1),
    )


BY_KIND = (
    *("strategy/fedavg", "strategy/fedadam", "strategy/scaffold", "strategy/fedbn", "strategy/ditto"),
    *("robust/krum", "dp/hospital", "other/unet3d"),
)
"""One case of each kind, for pools of which a case takes long."""


def cases_of(pool: str) -> list[str]:
    """Return what a pool can run with known randomness: privacy's is known in this process alone."""
    with_noise = {"local": ("dp/",), "flower": ("dp/",), "simulation": ("dp/hospital",), "ray": ("dp/hospital",)}
    return [name for name in CASES if not name.startswith("dp/") or name.startswith(with_noise[pool])]


def golden_run(case: str, folder: Path, pool: str = "local") -> RunConfig:
    """Return the run of a case: two hospitals, two rounds of two steps, on images of 16 pixels."""
    raw: dict[str, Any] = {
        "name": "golden",
        "data": {
            "phantom": {
                "preset": "balls",
                "num_hospitals": 2,
                "patients_per_hospital": 4,
                "size_voxels": 16,
                "seed": 3,
            },
            "name": "balls",
            "spatial_dims": 2,
            "holdout_fraction": 0.25,
        },
        "model": {"type": "unet2d", "features": [4, 8]},
        "training": {
            "batch_size": 3,
            "patch_size_voxels": 16,
            "learning_rate": 0.05,
            "hospitals_per_group": 2,
            "device": "cpu",
        },
        "federation": {
            "rounds": 2,
            "local_steps": 2,
            "seed": 5,
            "num_actors": 1,
            "pool": {"simulation": "virtual", "ray": "ray"}.get(pool, "local"),
        },
        "privacy": {"enable_dp": False},
        "output": {"directory": str(folder / "runs"), "report": False, "export": False},
    }
    for section, values in CASES[case].items():
        raw[section] = {**raw.get(section, {}), **values}
    return parse_run_config(raw)


def run_case(case: str, pool: str, folder: Path) -> dict[str, Any]:
    """Run a case on a pool and return what is known of its end; pools on Ray need a connected cluster."""
    run = golden_run(case, folder, pool)
    with known_entropy():
        outcome, path = _RUNNERS[pool](run, folder)
    assert outcome.completed, outcome.reason
    found = summary_of_file(path / "model.safetensors")
    kept = sorted(path.glob("hospitals/*/memory/*/round-00002.safetensors"))
    return {**found, "memories": sha256(*(_content(file) for file in kept)) if kept else None}


def _on_local(run: RunConfig, folder: Path) -> Any:
    return _through(run, lambda specs, job: local_pool(specs))


def _on_ray(run: RunConfig, folder: Path) -> Any:
    from actors.ray_pool import RayPool

    return _through(run, lambda specs, job: RayPool(specs, job, 1))


def _through(run: RunConfig, pool_of: Any) -> Any:
    policies, folder = tuple(list_hospitals(run)), RunFolder.create(run)
    pool = pool_of(hospital_specs(run, policies, folder.path), folder.job)
    extras = with_flower(run, lambda event: None)
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event(), extras)
    return outcome, folder.path


def _on_simulation(run: RunConfig, folder: Path) -> Any:
    from actors.simulation.run import simulate

    store = RunFolder.create(run)
    return simulate(run, tuple(list_hospitals(run)), store.path, lambda event: None), store.path


def _on_flower(run: RunConfig, folder: Path) -> Any:
    from loop_grid import LoopGrid

    from actors.flower import hospital as flower_hospital
    from actors.flower.aggregation import identify
    from actors.flower.app import GridLink
    from actors.flower.run import run_over_flower

    identify()
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_defaults=True)))
    app, num_hospitals = {"run": str(file)}, len(list_hospitals(run))
    grid = LoopGrid({10 + number: {"partition-id": number} for number in range(num_hospitals)}, app)
    flower_hospital.hospital_of.cache_clear()
    with mock.patch.dict(os.environ, {"MEDFL_STATE_DIR": str(folder / "state")}):
        outcome = run_over_flower(GridLink(grid), app)
    flower_hospital.hospital_of.cache_clear()
    (path,) = Path(run.output.directory).iterdir()
    return outcome, path


_RUNNERS = {"local": _on_local, "ray": _on_ray, "simulation": _on_simulation, "flower": _on_flower}


@contextmanager
def known_entropy() -> Iterator[None]:
    """Let noise and sampling, which take no seed, draw known bytes; libraries that draw names get the system's."""
    counts: dict[int, int] = {}
    system, seeded, number = os.urandom, np.random.default_rng, 0

    def urandom(size: int) -> bytes:
        if not _is_ours(sys._getframe(1)):
            return system(size)
        counts[size] = counts.get(size, 0) + 1
        return hashlib.shake_256(f"{size} {counts[size]}".encode()).digest(size)

    def default_rng(seed: Any = None) -> np.random.Generator:
        nonlocal number
        if seed is not None or not _is_ours(sys._getframe(1)):
            return seeded(seed)
        number += 1
        return seeded(number)

    with (
        mock.patch("os.urandom", urandom),
        mock.patch("secrets.randbelow", lambda below: 7 % below),
        mock.patch("numpy.random.default_rng", default_rng),
    ):
        yield


def _is_ours(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(("medfl_ray.", "actors."))


def summary_of_file(path: Path) -> dict[str, Any]:
    """Return checksum, Euclidean norm and first five values of the tensors in a file, in the order of their names."""
    tensors = load_file(path)
    vector = np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype("<f4")
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    return {"sha256": sha256(_content(path)), "norm": norm, "first": [float(value) for value in vector[:5]]}


def _content(path: Path) -> bytes:
    tensors = load_file(path)
    return b"".join(name.encode() + tensors[name].astype("<f4").tobytes() for name in sorted(tensors))


def sha256(*contents: bytes) -> str:
    """Return the SHA-256 of bytes one behind the other, in hex."""
    return hashlib.sha256(b"".join(contents)).hexdigest()


def probe() -> dict[str, str]:
    """Return what floats depend on: PyTorch, the processor, and a convolution forward and backward to the last bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = torch.nn.Sequential(
            torch.nn.Conv3d(2, 8, 3, padding=1),
            torch.nn.GroupNorm(4, 8),
            torch.nn.LeakyReLU(),
            torch.nn.Conv3d(8, 2, 3, stride=2),
        )
        image = torch.linspace(-1, 1, 2 * 2 * 12**3).sin().reshape(2, 2, 12, 12, 12)
    loss = network(image).softmax(1).square().mean()
    loss.backward()
    parts = [loss, *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)]
    digest = sha256(*(part.detach().numpy().tobytes() for part in parts))
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "sha256": digest}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], written_by: Mapping[str, str]) -> None:
    """Compare weights with known ones: to the last bit where this machine's floats are those of the file's."""
    assert found["norm"] == pytest.approx(expected["norm"], rel=RTOL)
    assert found["first"] == pytest.approx(expected["first"], rel=RTOL, abs=RTOL)
    if probe() == dict(written_by):
        assert found["sha256"] == expected["sha256"]
        assert found.get("memories") == expected.get("memories")


def main(pools: tuple[str, ...]) -> None:
    """Run every case on the pools and write what came of it; other pools' entries stay."""
    from actors.cluster import connect, disconnect

    torch.set_num_threads(1)
    document = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"probe": probe(), "weights": {}}
    assert document["probe"] == probe(), "the file is of another machine; remove it and write all pools anew"
    with TemporaryDirectory() as name:
        os.environ["XDG_STATE_HOME"] = name
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        connect(num_cpus=2)
        for pool in pools:
            entries: dict[str, Any] = {}
            for number, case in enumerate(cases_of(pool)):
                folder = Path(name, f"{pool}-{number}")
                folder.mkdir()
                entries[case] = run_case(case, pool, folder)
            document["weights"][pool] = entries
        disconnect()
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or WRITTEN)
