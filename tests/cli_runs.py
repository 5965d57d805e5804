"""The command line from outside: call it, take what it says, and judge an error as a user would."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import yaml

EDGE = 16
PATIENTS = ("Mrs-Ada", "Mrs-Bea", "Mrs-Cleo", "Mrs-Joy")


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


def command_line(monkeypatch: Any, capsys: Any) -> Command:
    """Return a function that runs `medfl-ray` with arguments in this process."""

    def call(*arguments: str | Path) -> Answer:
        from medfl_ray.cli.main import main

        monkeypatch.setattr(sys, "argv", ["medfl-ray", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call


def assert_one_clear_error(answer: Answer, code: int, *words: str, secrets: tuple[str, ...] = ()) -> None:
    """One sentence on stderr that holds the words; no traceback, no identifier, no absolute path."""
    lines = [line for line in answer.err.splitlines() if line.strip()]
    assert answer.code == code, answer
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: "), answer.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    for secret in ("Traceback", "Mrs-", "/tmp/", *secrets):
        assert secret not in answer.err + answer.out.replace(str(Path.cwd()), ""), f"{secret!r} is in {answer}"


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write an array as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def write_patients(folder: Path, patients: tuple[str, ...] = PATIENTS) -> Path:
    """Write a manifest of cubes with a bright box as label; files are called after their number."""
    rng = np.random.default_rng(0)
    rows = []
    for number, patient in enumerate(patients):
        label = np.zeros((EDGE,) * 3, np.uint8)
        label[4:10, 5:11, 6:12] = 1
        write_nifti(folder / f"{number}.nii.gz", (rng.normal(size=label.shape) + 4 * label).astype(np.float32))
        write_nifti(folder / f"{number}-mask.nii.gz", label)
        rows.append({"patient_id": patient, "image": f"{number}.nii.gz", "label": f"{number}-mask.nii.gz"})
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    """Write manifest.csv."""
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Read manifest.csv."""
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


PHANTOMS: dict[str, Any] = {
    "name": "tiny",
    "data": {"phantom": {"num_hospitals": 2, "patients_per_hospital": 3, "size_voxels": EDGE, "seed": 3}},
    "model": {"type": "unet3d", "features": [4, 8]},
    "training": {"batch_size": 2, "patch_size_voxels": EDGE, "learning_rate": 0.01, "device": "cpu"},
    "federation": {"rounds": 1, "local_steps": 1, "pool": "local"},
    "privacy": {"enable_dp": False},
    "output": {"directory": "runs", "report": False, "export": False},
}
DP = {"enable_dp": True, "epsilon": 8, "max_grad_norm": 1.0, "sample_rate": 0.5}


def configuration(**sections: Any) -> dict[str, Any]:
    """Return a small run; a mapping is merged into its section, anything else replaces it."""
    raw = deepcopy(PHANTOMS)
    for name, value in sections.items():
        merged = isinstance(value, dict) and isinstance(raw.get(name), dict) and name != "data"
        raw[name] = {**raw[name], **value} if merged else value
    return raw


def hospital_data(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the data section of one hospital with a folder of its own."""
    hospital = {"id": "north", "directory": str(folder), "num_patients": 20, **changes}
    return {"hospitals": [hospital], "labels": {1: "box"}, "channels": ["T1"]}


def write_config(path: Path, raw: dict[str, Any]) -> Path:
    """Write a configuration as YAML."""
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def run_folders(directory: Path = Path("runs")) -> list[Path]:
    """The runs in a folder, oldest first."""
    return sorted(directory.iterdir()) if directory.is_dir() else []
