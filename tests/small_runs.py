"""A federation of phantoms that trains in about a second."""

from medfl_ray.config import RunConfig
from medfl_ray.config_files import parse_run_config


def small_run(**sections) -> RunConfig:
    """Return a run of three tiny hospitals that trains in about a second; sections override the defaults."""
    raw = {
        "name": "small",
        "data": {"phantom": {"num_hospitals": 3, "patients_per_hospital": 6, "size_voxels": 16, "seed": 3}},
        "model": {"type": "unet3d", "features": [4, 8]},
        "training": {"batch_size": 2, "patch_size_voxels": 16, "learning_rate": 0.01, "optimizer": "adam"},
        "federation": {"rounds": 2, "local_steps": 2, "pool": "local", "seed": 5},
        "privacy": {"enable_dp": False},
    }
    for section, values in sections.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) and section in raw else values
    return parse_run_config(raw)
