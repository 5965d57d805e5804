"""medfl-ray evaluate and export, on a run and images made here."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medfl_ray.cli.main import app
from medfl_ray.config.files import dump_yaml, parse_run_config
from medfl_ray.errors import DataError
from medfl_ray.export.weights import save_weights
from medfl_ray.messages import HospitalInfo
from medfl_ray.training.trainer import LocalJob, Trainer

SIZE = 32


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Eight patients, each a PNG of a bright disc and its mask, in a manifest; the last has no label."""
    folder = tmp_path / "discs"
    folder.mkdir()
    rng = np.random.default_rng(1)
    rows = []
    for index in range(8):
        y, x = np.mgrid[:SIZE, :SIZE]
        centre = rng.uniform(10, 22, 2)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 40
        grey = np.clip(60 + 120 * inside + rng.normal(0, 8, inside.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{index}.png")
        Image.fromarray(inside.astype(np.uint8)).save(folder / f"{index}-mask.png")
        rows.append(
            {"patient_id": f"P{index}", "image": f"{index}.png", "label": "" if index == 7 else f"{index}-mask.png"}
        )
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["patient_id", "image", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path, discs: Path) -> Path:
    """A finished run whose model has learnt discs."""
    from medfl_ray.data.layouts.labelled_folder import open_labelled_folder
    from medfl_ray.data.prepare.preprocess import Preprocessing

    hospital = {"id": "a", "directory": "/nowhere", "declared": "private", "num_patients": 8}
    run = parse_run_config(
        {
            "name": "discs",
            "data": {"hospitals": [hospital], "spatial_dims": 2, "labels": {1: "disc"}, "channels": ["grey"]},
            "model": {"type": "unet2d", "features": [4, 8]},
            "training": {"patch_size_voxels": SIZE, "device": "cpu"},
            "privacy": {"enable_dp": False},
        }
    )
    trainer = Trainer(run.model, run.training, "segmentation", 2, 1, 2, (SIZE, SIZE), for_dp=False)
    preprocessing = Preprocessing(spatial_dims=2, orientation=None, channels=("grey",), label_values=(1,))
    cases = list(open_labelled_folder(discs, "auto", "segmentation", preprocessing, {1: "disc"}).holdout)

    class Data:
        num_train_patients, labels, holdout = len(cases), {1: "disc"}, cases

        def train_patches(self, index, num_patches, rng):
            import torch

            return torch.tensor(cases[index].image[None]), torch.tensor(cases[index].label[None].astype(np.int64))

    weights = trainer.initial_weights(0)
    weights = weights + trainer.train(weights, Data(), LocalJob(60, 0.05, None, (0,))).delta
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(run))
    save_weights(folder / "model.safetensors", weights, trainer.layout)
    info = HospitalInfo(
        hospital="a", declared="private", data_set="dataset", num_patients=8, num_channels=1, labels={1: "disc"},
        layout_checksum=trainer.layout.checksum, device="cpu",
    )  # fmt: skip
    (folder / "hospitals.json").write_text(json.dumps({"a": info.model_dump(mode="json")}))
    return folder


def test_evaluate_then_export(run_folder: Path, discs: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["evaluate", str(run_folder), "--data", str(discs), "--json", str(figures)])
    assert result.exit_code == 0, result.output
    assert "dice/disc" in result.output
    assert "7 patients, 7 cases" in result.output
    assert "1 cases without a label" in result.output
    report = json.loads(figures.read_text())
    assert len(report["images"]) == 64
    low, high = report["intervals_95"]["dice"]
    assert low <= report["figures"]["dice"] <= high
    assert report["figures"]["dice"] > 0.8
    result = CliRunner().invoke(app, ["export", str(run_folder)])
    assert result.exit_code == 0, result.output
    assert "labels equal 100.000%" in result.output
    assert (run_folder / "model.onnx").is_file()


def test_a_folder_without_labels_is_refused(run_folder: Path, discs: Path) -> None:
    manifest = discs / "manifest.csv"
    manifest.write_text("patient_id,image,label\nP0,0.png,\nP1,1.png,\n")
    with pytest.raises(DataError, match="label"):
        CliRunner().invoke(app, ["evaluate", str(run_folder), "--data", str(discs)], catch_exceptions=False)
