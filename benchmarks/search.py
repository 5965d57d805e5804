"""A search of 16 trials on phantoms, killed half-way and resumed; and one on private data, its ledger recomputed.

`repeated_trials` counts trials that had ended and were trained again, or have a round published twice. `ledger_error`
is the difference between the epsilon of a hospital's ledger and one composed by dp-accounting from what was drawn.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import yaml
from harness import Goal, Options, benchmark, report

ROOT = Path(__file__).resolve().parent.parent
GOALS = (
    Goal("trials", at_least=16),
    Goal("search_s", at_most=600),
    Goal("repeated_trials", at_most=0),
    Goal("ledger_error", at_most=1e-6),
)
DELTA = 1e-5
NUM_PATIENTS, ROUNDS, STEPS, RATE = 20, 2, 1, 0.5


def measure(options: Options) -> dict[str, float]:
    """Run both searches."""
    num_trials = 4 if options.quick else 16
    config = options.out / "search.yaml"
    raw = yaml.safe_load((ROOT / "configs" / "search_demo.yaml").read_text())
    raw |= {"run": str(ROOT / "configs" / raw["run"]), "trials": num_trials, "directory": str(options.out / "searches")}
    if options.quick:
        raw["overrides"] = [*raw["overrides"], "federation.rounds=2"]
        raw["data"]["phantom"]["patients_per_hospital"] = 20
    config.write_text(yaml.safe_dump(raw))
    started = time.perf_counter()
    folder = killed_half_way(config, options.out / "searches", num_trials // 2)
    before = ended(folder)
    tune(["--resume", str(folder)])
    seconds = time.perf_counter() - started
    figures = {
        "trials": float(len(ended(folder))),
        "search_s": seconds,
        "repeated_trials": float(repeated(folder, before)),
        "ledger_error": ledger_error(options.out / "private", 2 if options.quick else 3),
    }
    print(f"report: {folder / 'report.html'}", file=sys.stderr)
    return figures


def tune(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Run `medfl-ray tune` to its end.

    Raises:
      RuntimeError: it failed; its output has been printed.
    """
    done = subprocess.run(command(arguments), cwd=ROOT, env={**os.environ, **(environment or {})}, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"medfl-ray tune ended with exit code {done.returncode}")


def command(arguments: list[str]) -> list[str]:
    """Return the command line of a search, its figures kept off the standard output."""
    code = "import os, sys; os.dup2(2, 1); from medfl_ray.cli.main import main; sys.argv[0] = 'medfl-ray'; main()"
    return [sys.executable, "-c", code, "tune", *arguments]


def killed_half_way(config: Path, searches: Path, after: int) -> Path:
    """Start a search, end its process group by SIGKILL when so many trials have ended, and return its folder."""
    victim = subprocess.Popen(command([str(config)]), cwd=ROOT, start_new_session=True)
    try:
        while victim.poll() is None:
            folders = list(searches.glob("*/search.yaml"))
            if folders and len(ended(folders[0].parent)) >= after:
                break
            time.sleep(0.2)
    finally:
        if victim.poll() is None:
            os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
    return next(searches.glob("*/search.yaml")).parent


def ended(folder: Path) -> dict[int, str]:
    """Return the state of every trial that has ended, by the journal."""
    path = folder / "trials.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {row["number"]: row["state"] for row in rows if row["state"] != "started"}


def repeated(folder: Path, before: dict[int, str]) -> int:
    """Count the trials that ended twice or trained a round twice."""
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    times = Counter(row["number"] for row in rows if row["state"] != "started")
    started = Counter(row["number"] for row in rows if row["state"] == "started")
    twice = {number for number, count in times.items() if count > 1} | {n for n, count in started.items() if count > 1}
    for place in (folder / "trials").iterdir():
        receipts = [json.loads(line) for line in (place / "receipts.jsonl").read_text().splitlines()]
        rounds = Counter(receipt["round"] for receipt in receipts if receipt["published"])
        again = int(place.name) in before and any(receipt["attempt"] > 1 for receipt in receipts)
        if again or any(count > 1 for count in rounds.values()):
            twice.add(int(place.name))
    return len(twice)


def ledger_error(folder: Path, num_trials: int) -> float:
    """Search over one private hospital and return how far its ledger is from an independent composition."""
    config = private_search(folder, num_trials)
    tune([str(config)], {"MEDFL_STATE_DIR": str(folder / "state")})
    search = next((folder / "searches").iterdir())
    drawn = [json.loads(line) for line in (search / "trials.jsonl").read_text().splitlines()]
    sigmas = [row["parameters"]["noise_multiplier"] for row in drawn if row["state"] == "finished"]
    if len(sigmas) != num_trials:
        return float("nan")
    last = json.loads((search / "trials" / f"{num_trials - 1:03d}" / "ledger.json").read_text())
    return abs(float(last["north"]["spent"]["epsilon"]) - independent_epsilon(sigmas))


def independent_epsilon(sigmas: list[float]) -> float:
    """Compose the trials with dp-accounting alone, from the parameters that were drawn."""
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    for sigma in sorted(sigmas):
        accountant.compose(dp_event.PoissonSampledDpEvent(RATE, dp_event.GaussianDpEvent(sigma)), ROUNDS * STEPS)
    return float(accountant.get_epsilon(DELTA))


def private_search(folder: Path, num_trials: int) -> Path:
    """Write a hospital's images, public ones to judge by, a run and a search over it."""
    for name, patients in (("north", 6), ("public", 3)):
        write_cubes(folder / name, patients)
    north = {"id": "north", "directory": str(folder / "north"), "num_patients": NUM_PATIENTS, "max_epsilon": 60.0}
    run = {
        "name": "private",
        "data": {"hospitals": [north], "labels": {1: "box"}, "channels": ["T1"], "name": "boxes"},
        "model": {"type": "unet3d", "features": [2, 4]},
        "training": {"patch_size_voxels": 16, "learning_rate": 0.05, "patient_gradients": "single"},
        "federation": {"rounds": ROUNDS, "local_steps": STEPS},
        "privacy": {"enable_dp": True, "noise_multiplier": 1.0, "sample_rate": RATE},
    }
    search = {
        "name": "private",
        "run": "run.yaml",
        "space": {"noise_multiplier": {"low": 0.8, "high": 3}, "learning_rate": {"low": 0.01, "high": 0.1}},
        "trials": num_trials,
        "stopping": "none",
        "accounting": "compose",
        "score_data": "public",
        "directory": str(folder / "searches"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "search.yaml").write_text(yaml.safe_dump(search))
    return folder / "search.yaml"


def write_cubes(folder: Path, num_patients: int, edge: int = 16) -> None:
    """Write cubes with a bright box, and the manifest that lists them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient_id", "image", "label"])
        for number in range(num_patients):
            label = np.zeros((edge,) * 3, np.uint8)
            label[4:10, 5:11, 6:12] = 1
            image = (rng.normal(size=label.shape) + 4 * label).astype(np.float32)
            nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{number}.nii.gz")
            nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{number}-mask.nii.gz")
            writer.writerow([f"patient-{number}", f"{number}.nii.gz", f"{number}-mask.nii.gz"])


if __name__ == "__main__":
    with benchmark(__doc__) as options:
        report(options, measure(options), GOALS)
