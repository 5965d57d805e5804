"""Running the command line as a user would, and reading what the run's folder says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HIPPOCAMPUS_PLACES = ("data/hippocampus", "../shared/data/hippocampus_msd")


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder and the wall seconds of the whole command, start-up, report and export included."""

    folder: Path
    seconds: float

    def read(self, name: str) -> Any:
        """Return one of the run's JSON files."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def federated(self, metric: str = "dice") -> dict[str, float]:
        """Held-out score of the final federated weights at each hospital."""
        return {hospital: score["metrics"][metric]["value"] for hospital, score in self.read("evaluation.json").items()}

    def patients(self) -> dict[str, list[float]]:
        """Held-out scores of single patients (public and synthetic data only)."""
        return {hospital: score["patient_scores"] or [] for hospital, score in self.read("evaluation.json").items()}

    def local(self, metric: str = "dice") -> dict[str, float]:
        """Held-out score of each hospital's local-only model."""
        return {h: b["metrics"][metric]["value"] for h, b in self.read("baselines.json")["local"].items()}

    def central(self, metric: str = "dice") -> dict[str, float]:
        """Held-out score of the central model at each hospital."""
        return {h: m[metric]["value"] for h, m in self.read("baselines.json")["central"]["metrics"].items()}


def run(config: str, out: Path, overrides: Sequence[str] = (), baseline: str | None = None) -> FinishedRun:
    """Run `medfl-ray run` in a process of its own and time it.

    Raises:
      RuntimeError: the command failed; its output has been printed.
    """
    before = set(out.glob("*/config.yaml"))
    command = [sys.executable, "-m", "medfl_ray.cli.main", "run", f"configs/{config}"]
    for override in (f"output.directory={out.resolve()}", "output.register_model=false", *overrides):
        command += ["--set", override]
    if baseline is not None:
        command += ["--baseline", baseline]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(f"medfl-ray run configs/{config} ended with exit code {done.returncode}")
    return FinishedRun(max(set(out.glob("*/config.yaml")) - before).parent, seconds)


def hippocampus_folder() -> Path | None:
    """Return the folder of the hippocampus images: MEDFL_HIPPOCAMPUS, or one of the usual places."""
    named = os.environ.get("MEDFL_HIPPOCAMPUS")
    for place in [named] if named else HIPPOCAMPUS_PLACES:
        if (ROOT / place / "dataset.json").is_file():
            return (ROOT / place).resolve()
    return None


def mean_of(scores: Mapping[str, float]) -> float:
    """Mean over hospitals, each counting once."""
    return mean(scores.values())
