"""Small searches: on phantoms, and on a hospital whose data are private."""

from pathlib import Path

import yaml
from cli_runs import write_patients

from tune.space import SearchConfig, base_run, load_search
from tune.trainable import TrialPlan

RUN = {
    "name": "small",
    "data": {
        "phantom": {"preset": "balls", "num_hospitals": 2, "patients_per_hospital": 8, "size_voxels": 16, "seed": 3},
        "spatial_dims": 2,
        "holdout_fraction": 0.25,
    },
    "model": {"type": "unet2d", "features": [2, 4]},
    "training": {"batch_size": 3, "patch_size_voxels": 16, "learning_rate": 0.05, "patient_gradients": "single"},
    "federation": {"rounds": 3, "local_steps": 2, "seed": 5},
    "privacy": {"enable_dp": True, "epsilon": 8, "max_grad_norm": 0.5, "sample_rate": 0.5},
}
SPACE = {"noise_multiplier": {"low": 2, "high": 6}, "learning_rate": {"low": 0.01, "high": 0.1}}
EPSILONS = {"epsilon": {"low": 2, "high": 20}, "learning_rate": {"low": 0.01, "high": 0.1}}


def write_search(folder: Path, run=None, **changes) -> Path:
    """Write a run and a search over it; changes go into the search."""
    (folder / "run.yaml").write_text(yaml.safe_dump(run or RUN))
    raw = {"name": "tiny", "run": "run.yaml", "space": SPACE, "trials": 3, "stopping": "none", **changes}
    (folder / "search.yaml").write_text(yaml.safe_dump({"directory": str(folder / "out"), **raw}))
    return folder / "search.yaml"


def search_of(folder: Path, run=None, **changes) -> SearchConfig:
    """Return such a search."""
    return load_search(write_search(folder, run, **changes))


def plan_of(folder: Path, run=None, **changes) -> TrialPlan:
    """Return what the trials of such a search share, with a folder for them."""
    search = search_of(folder, run, **changes)
    place = folder / "out" / "here"
    place.mkdir(parents=True, exist_ok=True)
    return TrialPlan(search, base_run(search), place)


def private_run(folder: Path, **hospital) -> dict:
    """Return a run over one private hospital with a ledger in `state`, whose images are written."""
    write_patients(folder / "north", tuple(f"patient-{number}" for number in range(6)))
    own = {"id": "north", "directory": str(folder / "north"), "num_patients": 20, "max_epsilon": 40.0, **hospital}
    return {
        **RUN,
        "data": {"hospitals": [own], "labels": {1: "box"}, "channels": ["T1"], "name": "boxes"},
        "model": {"type": "unet3d", "features": [2, 4]},
        "training": {**RUN["training"], "patch_size_voxels": 16},
        "federation": {"rounds": 2, "local_steps": 1, "seed": 5},
        "output": {"state_directory": str(folder / "state")},
    }


def public_images(folder: Path) -> str:
    """Write labelled images that may be shown and return their folder's name."""
    write_patients(folder / "public", ("volunteer-1", "volunteer-2"))
    return "public"
