"""A finished run's folder, without the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medfl_ray.config.files import dump_yaml, parse_run_config
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.export.onnx_export import network_of
from medfl_ray.export.package import ModelPackage
from medfl_ray.export.weights import save_weights
from medfl_ray.messages import HospitalInfo
from medfl_ray.params import flatten, layout_of

HOSPITAL = {"id": "university", "directory": "/nowhere", "declared": "private", "num_patients": 20}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write config.yaml, hospitals.json and model.safetensors of a run over 2D slices."""

    def make(**sections: Any) -> Path:
        raw = {
            "name": "finished",
            "data": {"hospitals": [HOSPITAL], "spatial_dims": 2, "channels": ["T1c", "FLAIR"], "labels": {7: "tumour"}},
            "model": {"type": "unet2d", "features": [4, 8], "in_channels": 2, "out_channels": 2},
            "training": {"patch_size_voxels": 32, "device": "cpu"},
            "privacy": {"enable_dp": False},
            **sections,
        }
        run = parse_run_config(raw)
        folder = tmp_path / "run"
        folder.mkdir()
        package = package_for(run.model.model_dump(), run.data.task, run.patch_size)
        network = network_of(package)
        (folder / "config.yaml").write_text(dump_yaml(run))
        save_weights(folder / "model.safetensors", flatten(network), layout_of(network))
        info = HospitalInfo(
            hospital="university",
            declared=run.data.effective_declared,
            data_set="dataset",
            num_patients=3,
            num_channels=2,
            labels={1: "tumour"},
            layout_checksum=layout_of(network).checksum,
            device="cpu",
        )
        (folder / "hospitals.json").write_text(json.dumps({"university": info.model_dump(mode="json")}))
        return folder

    return make


def package_for(model: dict[str, Any], task: Any, patch_size: tuple[int, ...]) -> ModelPackage:
    """Describe an untrained model of two channels and two classes."""
    from medfl_ray.config.model import ModelConfig

    dims = len(patch_size)
    return ModelPackage(
        name="trial",
        task=task,
        model=ModelConfig.model_validate(model),
        spatial_dims=dims,
        patch_size=patch_size,
        channels=("T1c", "FLAIR"),
        out_channels=2,
        labels={1: "tumour"},
        preprocessing=Preprocessing(spatial_dims=2 if dims == 2 else 3, channels=("T1c", "FLAIR"), label_values=(1,)),
        privacy={"differential_privacy": False},
    )


@pytest.fixture(scope="session")
def make_package() -> Callable[[dict[str, Any], Any, tuple[int, ...]], ModelPackage]:
    """Return a builder of packages."""
    return package_for
