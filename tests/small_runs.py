"""Federations of phantoms that train in about a second, and a pool that interferes with their updates."""

from medfl_ray.config.files import parse_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.messages import ClientUpdate


def small_run(**sections) -> RunConfig:
    """Return a run of three tiny hospitals that trains in about a second; sections override the defaults.

    How many patients go through the network at once is given; tests/federation/test_group_sizes.py has it measured.
    """
    raw = {
        "name": "small",
        "data": {"phantom": {"num_hospitals": 3, "patients_per_hospital": 6, "size_voxels": 16, "seed": 3}},
        "model": {"type": "unet3d", "features": [4, 8]},
        "training": {
            "batch_size": 2,
            "patch_size_voxels": 16,
            "learning_rate": 0.01,
            "optimizer": "adam",
            "patient_group_size": 2,
        },
        "federation": {"rounds": 2, "local_steps": 2, "pool": "local", "seed": 5},
        "privacy": {"enable_dp": False},
    }
    for section, values in sections.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) and section in raw else values
    return parse_run_config(raw)


def balls(**changes):
    """Return a simulation of six hospitals with unequal steps and a small network; changes go into its sections."""
    raw = {
        "name": "virtual",
        "data": {
            "phantom": {
                "preset": "balls",
                "num_hospitals": 6,
                "patients_per_hospital": 8,
                "size_voxels": 16,
                "seed": 3,
            },
            "name": "balls",
            "spatial_dims": 2,
            "holdout_fraction": 0.25,
        },
        "model": {"type": "unet2d", "features": [4, 8]},
        "training": {"batch_size": 3, "patch_size_voxels": 16, "learning_rate": 0.05, "hospitals_per_group": 2},
        "federation": {"rounds": 2, "local_epochs": 1, "pool": "virtual", "seed": 5},
        "privacy": {"enable_dp": False},
        "output": {"report": False, "export": False},
    }
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return RunConfig.model_validate(raw)


class Interfering:
    """A real pool whose answers are changed on their way by `change(hospital, round, update)`."""

    def __init__(self, pool, change):
        self._pool, self._change = pool, change

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def train(self, plan, hospitals, weights):
        for answer in self._pool.train(plan, hospitals, weights):
            if isinstance(answer, ClientUpdate):
                yield from self._change(answer)
            else:
                yield answer
