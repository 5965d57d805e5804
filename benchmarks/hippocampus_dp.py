"""Dice on the hippocampus under patient-level DP at epsilon 2, 8 and 32, beside the same network without DP.

Prints a Markdown table with each hospital's public size and the 95 % bootstrap interval over held-out
patients. A patient here is a case: left and right of one person may be two cases. Needs the images: see demo.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from harness import Options, benchmark, report
from runs import FinishedRun, hippocampus_folder, mean_of, run

SETTINGS: dict[str, tuple[str, ...]] = {
    "eps2": ("privacy.epsilon=2",),
    "eps8": ("privacy.epsilon=8",),
    "eps32": ("privacy.epsilon=32",),
    "nodp": (
        "privacy.enable_dp=false",
        "training.batch_size=4",
        "training.optimizer=adam",
        "training.learning_rate=0.005",
        "federation.local_steps=null",
        "federation.local_epochs=2",
    ),
}


def interval(scores: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over patients."""
    rng = np.random.default_rng(0)
    values = np.asarray(scores)
    means = rng.choice(values, size=(draws, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def row(name: str, finished: FinishedRun) -> str:
    """One line of the table: mean over hospitals, then each hospital with its interval."""
    patients = finished.patients()
    cells = []
    for hospital, score in sorted(finished.federated().items()):
        low, high = interval(patients[hospital])
        cells.append(f"{score:.3f} [{low:.3f}, {high:.3f}]")
    return f"| {name} | {mean_of(finished.federated()):.3f} | " + " | ".join(cells) + " |"


def measure(options: Options) -> dict[str, float]:
    """Run every setting and print the table."""
    images = hippocampus_folder()
    if images is None:
        sys.exit("no hippocampus images: fetch them with 'medfl-ray data fetch hippocampus' or set MEDFL_HIPPOCAMPUS")
    short = ["federation.rounds=1"] if options.quick else []
    runs = {}
    for name, overrides in SETTINGS.items():
        account = f"output.state_directory={options.out.resolve() / 'accounts' / name}"  # a fresh one per setting
        runs[name] = run("hippocampus_dp.yaml", options.out, [f"data.directory={images}", account, *overrides, *short])
    infos = next(iter(runs.values())).read("hospitals.json")
    heads = [f"{name} ({infos[name]['num_patients']} training cases)" for name in sorted(infos)]
    print("| epsilon (patient, delta=1e-5, add/remove) | mean Dice | " + " | ".join(heads) + " |")
    print("|" + "---|" * (len(heads) + 2))
    for name, finished in runs.items():
        print(row("no DP" if name == "nodp" else name.removeprefix("eps"), finished))
    return {f"dice_{name}": mean_of(finished.federated()) for name, finished in runs.items()}


if __name__ == "__main__":
    with benchmark(__doc__) as options:
        report(options, measure(options))
