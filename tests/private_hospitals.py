"""Small hospitals with private pictures, built as a run builds them, and the plans that a coordinator would send."""

from pathlib import Path

import numpy as np
from PIL import Image
from small_runs import small_run

from medfl_ray.assembly.hospital import build_hospital
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.config.files import parse_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.data.sources import list_hospitals
from medfl_ray.federation.hospital_rules.answer_times import AnswerTimes
from medfl_ray.federation.planning import mechanism_for
from medfl_ray.messages import RoundPlan

EDGE = 16


class Clock:
    """A clock that moves by work that a test counts and by sleeping, so that no test waits."""

    def __init__(self):
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def write_patients(folder: Path, num_patients: int, task: str = "segmentation", seed: int = 0) -> list[str]:
    """Write pictures and their manifest.csv; return its rows, the header first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = ["patient_id,image,label"]
    for number in range(num_patients):
        mask = np.zeros((EDGE, EDGE), np.uint8)
        top, left = rng.integers(0, EDGE // 2, 2)
        mask[top : top + 5, left : left + 5] = 1
        picture = (rng.integers(0, 90, mask.shape) + 120 * mask).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}-mask.png")
        label = f"{number}-mask.png" if task == "segmentation" else str(number % 2)
        rows.append(f"p{number:03d},{number}.png,{label}")
    write_manifest(folder, rows)
    return rows


def write_manifest(folder: Path, rows: list[str]) -> None:
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def private_run(folder: Path, task: str = "segmentation", **sections) -> RunConfig:
    """Return a run over one private folder; sections override the defaults."""
    raw = {
        "name": "private",
        "data": {
            "task": task,
            "spatial_dims": 2,
            "labels": {1: "ill"},
            "channels": ["x"],
            "hospitals": [{"id": "a", "directory": str(folder), "num_patients": 10, "max_epsilon": 8}],
        },
        "model": {"type": "unet2d", "features": [4, 8]},
        "training": {"patch_size_voxels": EDGE, "patient_group_size": 2, "batch_size": 3},
        "federation": {"rounds": 2, "local_steps": 1, "pool": "local"},
        "privacy": {"enable_dp": True, "noise_multiplier": 2.0, "epsilon": 4.0},
    }
    if task == "classification":
        raw["model"] = {"type": "densenet", "spatial_dims": 2}
        raw["training"] |= {"patch_size_voxels": 32, "patient_group_size": 1}
    for section, values in sections.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) and section in raw else values
    return parse_run_config(raw)


def private_hospital(run: RunConfig, state: Path, clock: Clock | None = None, job: str = "job", **policy):
    """Build the run's hospital `a` in a state folder; `policy` changes what it declares."""
    own = list_hospitals(run)[0].model_copy(update=policy)
    spec = HospitalSpec(run, own, 0, (own.hospital,), state, job=job)
    clock = clock or Clock()
    return build_hospital(spec, times=AnswerTimes(clock.now, clock.sleep))


def plan_for(hospital, number: int = 1, attempt: int = 1, job: str = "job", **fields) -> RoundPlan:
    """Return the plan that the hospital's own run and policy lead to."""
    run, policy = hospital._parts.run, hospital._parts.policy
    mechanism = mechanism_for(run, policy) if run.privacy.patient_level else None
    common = {
        "job": job,
        "round": number,
        "attempt": attempt,
        "config_hash": run.config_hash,
        "weights_checksum": "",
        "hospitals": (policy.hospital,),
        "num_steps": {policy.hospital: run.federation.local_steps},
        "learning_rate": 0.01,
        "mechanisms": {policy.hospital: mechanism} if mechanism is not None else {},
    }
    return RoundPlan(**{**common, **fields})


def first_weights(hospital):
    return hospital._parts.trainer.initial_weights(0)


def two_private_hospitals(rounds=1):
    """Return a run of two hospitals of synthetic patients that they declare private, and their policies."""
    run = small_run(
        data={"phantom": {"num_hospitals": 2, "patients_per_hospital": 4, "size_voxels": 16, "seed": 3}},
        privacy={"enable_dp": True, "noise_multiplier": 30.0, "sample_rate": 0.5},
        federation={"rounds": rounds, "local_steps": 1},
    )
    policies = [p.model_copy(update={"declared": "private", "max_epsilon": 8.0}) for p in list_hospitals(run)]
    return run, tuple(policies)
