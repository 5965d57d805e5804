"""ONNX files that say what torch says, carry what serving needs, and do not exist where parity fails."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from medfl_ray.errors import ConfigError, ExportError
from medfl_ray.export.description import read_description
from medfl_ray.export.onnx_export import export_onnx, export_run, network_of
from medfl_ray.export.package import ModelPackage
from medfl_ray.export.parity import measure_parity
from medfl_ray.export.weights import load_weights
from medfl_ray.params import flatten

MakePackage = Callable[[dict[str, Any], Any, tuple[int, ...]], ModelPackage]
SMALL = {"features": [4, 8]}
NETWORKS = [
    pytest.param("unet2d", SMALL, (16, 16), True),
    pytest.param("unet3d", SMALL, (16, 16, 16), True),
    pytest.param("basic_unet", SMALL, (32, 32), True, marks=pytest.mark.ci),
    pytest.param("segresnet", SMALL, (16, 16), True, marks=pytest.mark.ci),
    pytest.param("dynunet", SMALL, (16, 16), True, marks=pytest.mark.ci),
    pytest.param("attention_unet", SMALL, (16, 16), True, marks=pytest.mark.ci),
    pytest.param("unetr", {"features": [4, 8]}, (16, 16), False, marks=pytest.mark.ci),
    pytest.param("swin_unetr", {"features": [12]}, (32, 32), False, marks=pytest.mark.ci),
]


@pytest.mark.parametrize(("name", "fields", "patch", "dynamic"), NETWORKS)
def test_parity_and_dynamic_sizes(
    make_package: MakePackage, tmp_path: Path, name: str, fields: dict[str, Any], patch: tuple[int, ...], dynamic: bool
) -> None:
    package = make_package({"type": name, **fields}, "segmentation", patch)
    network = network_of(package)
    parity = export_onnx(package, flatten(network), tmp_path)
    assert parity.max_abs_difference < 1e-3
    assert parity.agreement > 0.999
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    larger = tuple(edge + 16 for edge in patch) if dynamic else patch
    image = np.random.default_rng(0).normal(size=(3, 2, *larger)).astype(np.float32)
    (logits,) = session.run(["logits"], {"image": image})
    with torch.inference_mode():
        expected = network(torch.from_numpy(image)).numpy()
    assert np.abs(expected - logits).max() < 1e-3
    assert read_description(tmp_path).dynamic_space is dynamic


def test_package_of_a_classifier(make_run: Callable[..., Path]) -> None:
    phantom = {"preset": "tumour_slices", "num_hospitals": 1, "patients_per_hospital": 4, "size_voxels": 32}
    folder = make_run(
        data={"phantom": phantom, "task": "classification", "spatial_dims": 2},
        model={"type": "densenet", "features": [4], "in_channels": 2, "out_channels": 2},
    )
    parity = export_run(folder)
    assert parity.images == "1 held-out synthetic images"
    description = read_description(folder)
    assert description.channels == ("T1c", "FLAIR")
    assert description.labels == {1: "tumour"}
    assert description.parity["max_abs_difference"] == parity.max_abs_difference
    assert description.privacy["differential_privacy"] is False


def test_private_data_are_not_opened_for_parity(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    assert export_run(folder).images == "2 phantoms"
    description = read_description(folder)
    assert description.patch_size == (32, 32)
    assert (description.preprocessing.spatial_dims, description.preprocessing.label_values) == (2, (7,))
    windows = description.sliding_window
    assert (windows.overlap, windows.mode, windows.sigma_scale) == (0.25, "gaussian", 0.125)
    content = (folder / "model.onnx").read_bytes()
    assert description.variants["float32"].sha256 == hashlib.sha256(content).hexdigest()
    assert description.variants["float32"].size_bytes == len(content)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "hospitals.json", "model.json", "model.onnx", "model.safetensors",
    ]  # fmt: skip


def test_no_model_is_left_where_parity_fails(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run()
    (folder / "model.onnx").write_bytes(b"an earlier export")
    original = onnxruntime.InferenceSession.run

    def off_by_one(self: Any, *arguments: Any) -> Any:
        return [output + np.arange(2, dtype=np.float32)[:, None, None] for output in original(self, *arguments)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", off_by_one)
    with pytest.raises(ExportError, match="parity failed"):
        export_run(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "hospitals.json", "model.safetensors"]


def test_not_a_number_is_no_parity(make_package: MakePackage) -> None:
    network = network_of(make_package({"type": "unet2d", **SMALL}, "segmentation", (16, 16)))
    with pytest.raises(ExportError, match="parity failed"):
        measure_parity(network, lambda batch: batch * np.nan, [torch.zeros(1, 2, 16, 16)], "zeros")


def test_unfinished_and_foreign_folders(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        export_run(tmp_path)
    folder = make_run()
    (folder / "hospitals.json").unlink()
    with pytest.raises(ExportError, match="has not ended"):
        export_run(folder)


def test_weights_must_fit(make_run: Callable[..., Path], make_package: MakePackage) -> None:
    from medfl_ray.params import layout_of

    path = make_run() / "model.safetensors"
    other = layout_of(network_of(make_package({"type": "densenet", "features": [8, 16]}, "classification", (32, 32))))
    with pytest.raises(ExportError, match="does not fit the network"):
        load_weights(path, other)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ExportError, match="damaged"):
        load_weights(path, other)
    path.unlink()
    with pytest.raises(ExportError, match="run --resume"):
        load_weights(path, other)
