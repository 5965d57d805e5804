"""Small model packages for tests: an untrained network of the catalogue, exported as a run's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from medfl_ray.config.model import ModelConfig
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.export.onnx_export import export_onnx, network_of
from medfl_ray.export.package import ModelPackage
from medfl_ray.params import flatten


def model_package(
    patch_size: tuple[int, ...] = (16, 16, 16),
    task: Any = "segmentation",
    model: dict[str, Any] | None = None,
    channels: tuple[str, ...] = ("T1",),
    labels: dict[int, str] | None = None,
    **preparation: Any,
) -> ModelPackage:
    """Describe a network; label values are ten times the class."""
    labels = labels or {1: "anterior", 2: "posterior"}
    dims = len(patch_size)
    default = {"type": f"unet{dims}d" if task == "segmentation" else "densenet", "features": [4, 8]}
    preparation.setdefault("label_values", tuple(10 * value for value in labels) if task == "segmentation" else ())
    preparation.setdefault("orientation", "RAS" if dims == 3 else None)
    return ModelPackage(
        name="trial",
        task=task,
        model=ModelConfig.model_validate(model or default),
        spatial_dims=dims,
        patch_size=patch_size,
        channels=channels,
        out_channels=len(labels) + 1,
        labels=labels,
        preprocessing=Preprocessing(spatial_dims=2 if dims == 2 else 3, channels=channels, **preparation),
        privacy={"differential_privacy": False},
    )


def write_package(directory: Path, package: ModelPackage, seed: int = 0) -> nn.Module:
    """Write a package with random weights into a folder and return the network that it holds."""
    torch.manual_seed(seed)
    network = network_of(package)
    directory.mkdir(parents=True, exist_ok=True)
    export_onnx(package, flatten(network), directory)
    return network
