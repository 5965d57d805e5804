"""The model and the volumes of inference.py: a short run on phantoms, and phantoms that it has not seen."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from harness import Options
from runs import ROOT, run

from medfl_ray.data.formats.readers import read_volume
from medfl_ray.data.phantoms.render import render_phantom
from medfl_ray.export.description import read_description
from medfl_ray.export.predictor import label_values

PRESET, SEED = "brain_glioma_demo", 7
# Full-resolution convolutions at every level, as volumes are segmented in practice; 64^3 windows of two channels.
SHORT_RUN = (
    "name=inference",
    "model.type=segresnet",
    "model.features=[8,16,32,64]",
    "data.phantom.num_hospitals=2",
    "data.phantom.patients_per_hospital=16",
    "data.phantom.size_voxels=128",
    "training.patch_size_voxels=64",
    "training.batch_size=2",
    "training.foreground_fraction=0.7",
    "training.learning_rate=0.003",
    "federation.rounds=8",
    "federation.local_steps=20",
    "federation.eval_every=4",
    "federation.baselines=[]",
    "privacy.enable_dp=false",
)
QUICK_RUN = (
    "model.features=[4,8]", "training.patch_size_voxels=32", "data.phantom.size_voxels=64", "federation.rounds=2"
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A volume as a file to send and as a prepared array, and its true labels."""

    upload: Path
    prepared: Path
    truth: Path
    package: Path
    labels: dict[int, str]

    def restore(self, classes: Any) -> Any:
        """Return classes of the prepared image as label values on the file's grid."""
        preparation = read_description(self.package).preprocessing
        volume = read_volume(self.upload)
        return preparation.restore(classes, preparation.prepare(volume).affine, volume)


def trained_package(options: Options) -> Path:
    """Return the folder that --run names, or that of a short run without differential privacy; with its variant."""
    if options.own.run is not None:
        return Path(options.own.run).resolve()
    settings = (*SHORT_RUN, *QUICK_RUN) if options.quick else SHORT_RUN
    folder = run("demo.yaml", options.out, settings).folder
    command = [sys.executable, "-m", "medfl_ray.cli.main", "export", str(folder)]
    subprocess.run([*command, "--variants", options.own.reduced or "int8"], cwd=ROOT, check=True)
    return folder


def make_cases(package: Path, folder: Path, count: int, edge: int) -> list[Case]:
    """Render volumes of edge^3 voxels that no run above has seen, as scanners store them: int16, gzip."""
    description = read_description(package)
    cases = []
    for index in range(count):
        phantom = render_phantom(PRESET, index % 2, 1000 + index, size_voxels=edge, seed=SEED)
        paths = [folder / f"volume-{index}{ending}" for ending in (".nii.gz", ".npy", "-truth.npy")]
        voxels = np.moveaxis(np.rint(phantom.image), 0, -1).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, phantom.affine), paths[0])
        np.save(paths[1], description.preprocessing.prepare(read_volume(paths[0])).image)
        np.save(paths[2], phantom.truth)
        cases.append(Case(paths[0], paths[1], paths[2], package, label_values(description)))
    return cases
