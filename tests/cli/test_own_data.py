"""Own data from folder to model: each layout trains, evaluates and exports by one command each, unconverted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from cli_runs import run_folders

from medfl_ray.data.phantoms.write_layout import phantom_set, write_phantoms

CONFIGS = Path(__file__).parents[2] / "configs"
EDGE = 16
SMALL = [
    "--set", "model.features=[4, 8]", "--set", f"training.patch_size_voxels={EDGE}", "--set", "training.device=cpu",
    "--set", "federation.rounds=2", "--set", "federation.local_epochs=null", "--set", "federation.local_steps=1",
    "--pool", "local",
]  # fmt: skip


def make(folder: Path, seed: int, layout: str = "manifest", file_format: str = "nifti", patients: int = 4) -> Path:
    phantoms = phantom_set(
        "brain_tumour_t1c_flair", num_hospitals=1, num_patients=patients, size_voxels=EDGE, seed=seed,
        layout=layout, file_format=file_format,
    )  # fmt: skip
    assert len(list(write_phantoms(folder, phantoms))) == patients
    (folder / "phantoms.yaml").unlink()
    return folder


def run_small(medfl, config: str, *more: str) -> Path:
    answer = medfl("run", CONFIGS / config, *SMALL, *more)
    assert answer.code == 0, answer.err
    assert answer.err == ""
    (run,) = run_folders()
    assert f"report    {run / 'report.html'}" in answer.out
    return run


def check_model(medfl, run: Path, test_folder: Path, figure: str = "dice") -> None:
    """Evaluate and export by one command each, and run the exported network."""
    import numpy as np
    import onnxruntime

    answer = medfl("evaluate", run, "--data", test_folder, "--json", "figures.json")
    assert answer.code == 0, answer.err
    report = json.loads(Path("figures.json").read_text())
    assert 0 <= report["figures"][figure] <= 1
    low, high = report["intervals_95"][figure]
    assert low <= report["figures"][figure] <= high
    (run / "model.onnx").unlink()
    answer = medfl("export", run)
    assert answer.code == 0, answer.err
    assert "parity" in answer.out
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    package = json.loads((run / "model.json").read_text())
    assert package["channels"] == ["T1c", "FLAIR"]
    wanted = session.get_inputs()[0]
    edges = [size if isinstance(size, int) else EDGE for size in wanted.shape[2:]]
    (answer,) = session.run(None, {wanted.name: np.zeros((1, 2, *edges), np.float32)})
    assert np.isfinite(answer).all()


def check_private(run: Path, *hospitals: str) -> None:
    """The central report suppresses what private data would show; the hospital's own has it."""
    page = (run / "report.html").read_text()
    assert "suppressed" in page
    assert not list(run.glob("pictures/*"))
    assert "data:image/png" not in page
    for name in ("metrics.jsonl", "evaluation.json", "receipts.jsonl", "report.html"):
        assert not re.search(r"PHANTOM-|image\w*\.nii|patient_id", (run / name).read_text()), name
    evaluation = json.loads((run / "evaluation.json").read_text())
    ledger = json.loads((run / "ledger.json").read_text())
    for hospital in hospitals:
        assert evaluation[hospital]["metrics"]["dice"]["value"] is None
        assert ledger[hospital]["events"]
        own = list(Path("state").rglob(f"{hospital}/reports/*.html"))
        assert any("data:image/png" in path.read_text() for path in own)
        assert all(path.stat().st_mode & 0o077 == 0 for path in own)


@pytest.mark.ci
def test_dicom_folders_with_segmentations(medfl, tmp_path):
    for seed, name in enumerate(("north", "south", "test")):
        folder = make(tmp_path / "data" / name, seed, file_format="dicom")
        (folder / "manifest.csv").unlink()
        assert list(folder.rglob("*.dcm"))
    run = run_small(medfl, "own_dicom.yaml")
    check_private(run, "north", "south")
    check_model(medfl, run, tmp_path / "data/test")


@pytest.mark.ci
def test_nnunet_folder_dealt_to_hospitals(medfl, tmp_path):
    make(tmp_path / "data/nnunet", 1, layout="nnunet", patients=6)
    run = run_small(medfl, "own_nnunet.yaml")
    page = (run / "report.html").read_text()
    assert "data:image/png" in page  # public data may be shown
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert sorted(evaluation) == ["hospital-1", "hospital-2", "hospital-3"]
    assert all(0 <= site["metrics"]["dice"]["value"] <= 1 for site in evaluation.values())
    check_model(medfl, run, tmp_path / "data/nnunet")


SITE = """
hospital: {id: north, name: North General}
data: {directory: ., data_set: own-gliomas, labels: {1: core, 2: oedema}}
privacy: {enable_dp: true, epsilon: EPSILON, num_patients: 40}
"""


@pytest.mark.ci
def test_manifests_with_a_policy_that_wins(medfl, tmp_path):
    for seed, name in enumerate(("north", "south", "test")):
        make(tmp_path / "data" / name, seed)
    site = tmp_path / "data/north/hospital_config.yaml"
    site.write_text(SITE.replace("EPSILON", "9"))
    run = run_small(medfl, "own_manifest.yaml")
    check_private(run, "north", "south")
    account = json.loads((run / "hospitals.json").read_text())["north"]
    assert (account["data_set"], account["num_patients"]) == ("own-gliomas", 40)
    assert json.loads((run / "receipts.jsonl").read_text().splitlines()[-1])["spent"]["north"]["budget"] == 9
    check_model(medfl, run, tmp_path / "data/test")

    answer = medfl("run", CONFIGS / "own_manifest.yaml", *SMALL, "--set", "privacy.enable_dp=false")
    assert answer.code == 2
    assert "hospital 'north' trains only with differential privacy" in answer.err
    shutil.rmtree("state")
    site.write_text(SITE.replace("EPSILON", "0.01"))
    answer = medfl("run", CONFIGS / "own_manifest.yaml", *SMALL, "--set", "federation.max_failed_rounds=0")
    assert answer.code == 1
    assert "north" in answer.err
    assert "budget" in answer.err
    assert "0.01" in answer.err


@pytest.mark.ci
def test_slices_are_classified(medfl, tmp_path):
    answer = medfl("data", "make", "data/test", "--preset", "tumour_slices", "--hospitals", 1, "--patients", 8,
                   "--size", 32, "--format", "nifti")  # fmt: skip
    assert answer.code == 0, answer.err
    small = ["data.phantom.patients_per_hospital=12", "data.phantom.size_voxels=32", "training.patch_size_voxels=32"]
    run = run_small(medfl, "tumour_slices.yaml", *[part for change in small for part in ("--set", change)])
    evaluation = json.loads((run / "evaluation.json").read_text())
    found = [site["metrics"]["auc"]["value"] for site in evaluation.values() if "auc" in site["metrics"]]
    assert found
    assert all(0 <= value <= 1 for value in found)
    assert "AUC" in (run / "report.html").read_text()
    check_model(medfl, run, tmp_path / "data/test", "auc")
