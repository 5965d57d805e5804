"""medfl-ray pretrain makes weights from synthetic images, and a run starts from them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from cli_runs import DP, configuration, hospital_data, run_folders, write_config, write_patients
from safetensors.numpy import load_file
from typer.testing import CliRunner

from medfl_ray.cli.main import app
from medfl_ray.config.files import load_run_config
from medfl_ray.errors import ConfigError, LayoutError

PRETRAINING = {
    "name": "made-up",
    "crops": {"labelmaps": "maps", "margin_voxels": [2, 3], "front_fraction": None},
    "model": {"type": "unet3d", "features": [4, 8]},
    "training": {"steps": 2, "batch_size": 2, "patch_size_voxels": 16, "learning_rate": 0.01},
    "output": "weights/first.safetensors",
}


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights from two label maps, each an ellipsoid of label 17 in white matter."""
    monkeypatch.chdir(tmp_path)
    maps = tmp_path / "maps"
    maps.mkdir()
    place = np.indices((48, 48, 48)) - 24
    for number, radii in enumerate(((6, 10, 6), (7, 11, 5))):
        inside = sum((axis / radius) ** 2 for axis, radius in zip(place, radii, strict=True)) < 1
        labels = np.where(inside, 2, 1).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), maps / f"{number}.nii.gz")  # type: ignore[no-untyped-call]
    (maps / "labels.json").write_text(json.dumps({"index_to_freesurfer": {"1": 2, "2": 17}}))
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(PRETRAINING))
    assert "sha256" in invoke("pretrain", "pretrain.yaml")
    return tmp_path / "weights" / "first.safetensors"


def run_config(**changes: object) -> Path:
    data = hospital_data(write_patients(Path("patients")), declared="synthetic")
    training = {"initial_weights": "weights/first.safetensors", **changes}
    raw = configuration(data=data, privacy=DP, training=training)
    return write_config(Path("run.yaml"), raw)


def test_the_same_seed_makes_the_same_weights(pretrained: Path) -> None:
    first = load_file(pretrained)
    invoke("pretrain", "pretrain.yaml", "--set", "output=weights/again.safetensors")
    again = load_file(pretrained.with_name("again.safetensors"))
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_run_starts_from_the_weights_and_remembers_which(pretrained: Path) -> None:
    config = run_config(learning_rate=1e-9)  # what it learns is far less than what it started from
    invoke("run", config)
    (folder,) = run_folders()
    manifest = json.loads(pretrained.with_suffix(".manifest.json").read_text())
    saved = load_run_config(folder / "config.yaml")
    assert saved.training.initial_weights_sha256 == manifest["sha256"]
    start, end = load_file(pretrained), load_file(folder / "model.safetensors")
    for name, values in start.items():
        np.testing.assert_allclose(end[name], values, atol=1e-4)


def test_weights_of_unknown_origin_are_refused(pretrained: Path) -> None:
    pretrained.with_suffix(".manifest.json").unlink()
    with pytest.raises(ConfigError, match="nothing says its training data were public"):
        invoke("run", run_config())
    assert run_folders() == []


def test_weights_that_changed_are_refused(pretrained: Path) -> None:
    content = bytearray(pretrained.read_bytes())
    content[-1] ^= 1
    pretrained.write_bytes(content)
    with pytest.raises(ConfigError, match="is not the file of its manifest"):
        invoke("run", run_config())


def test_weights_of_another_network_are_refused(pretrained: Path) -> None:
    raw = yaml.safe_load(run_config().read_text())
    raw["model"]["features"] = [4, 16]
    with pytest.raises(ConfigError, match="belongs to another network"):
        invoke("run", write_config(Path("run.yaml"), raw))


def test_label_maps_without_the_structure_are_refused(pretrained: Path) -> None:
    with pytest.raises(LayoutError, match="no label map"):
        invoke("pretrain", "pretrain.yaml", "--set", "crops.structures=[53]")
