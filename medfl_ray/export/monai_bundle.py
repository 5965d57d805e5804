"""A run's model as a MONAI bundle: what MONAI's own commands load, check and run.

`models/model.pt` is a state dictionary alone, which torch reads with weights_only; `models/model.ts` is the same
network as TorchScript, for machines without medfl-ray. The configuration of the inference is in MONAI's transforms.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning

from medfl_ray import __version__
from medfl_ray.config.model import ModelConfig
from medfl_ray.errors import ConfigError, ExportError
from medfl_ray.export.description import PackageDescription, read_description
from medfl_ray.export.weights import load_weights
from medfl_ray.models.catalogue import build_network
from medfl_ray.params import layout_of, load_into

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
OLDEST_IGNITE = "0.4.11"  # MONAI asks for this one
LICENCE = (
    "The model is a work of the hospitals that trained it (docs/README.md names them) and of whoever ran the run.\n"
    "This export does not choose a licence for them. Ask them before you use or pass on the model; terms of public\n"
    "data sets among the training data apply as well.\n"
)

HOW_TO_RUN = (
    "\n## Run this bundle\n\n"
    "Put NIfTI files, each with all channels, into a folder. In the bundle's folder:\n\n"
    "```sh\n"
    "python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES --output_dir MASKS\n"
    "```\n\n"
    "This needs monai, pytorch-ignite, fire, nibabel and medfl-ray. Without medfl-ray, take the network from "
    "TorchScript:\n\n"
    "```sh\n"
    "python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES --output_dir MASKS \\\n"
    "  --network \"\\$torch.jit.load('models/model.ts')\"\n"
    "```\n"
)


def bundle_network(
    network: dict[str, Any], spatial_dims: int, in_channels: int, out_channels: int, patch_size: list[int]
) -> nn.Module:
    """Build an untrained network from a bundle's configuration."""
    model = ModelConfig.model_validate(network)
    return build_network(model, spatial_dims, in_channels, out_channels, False, tuple(patch_size))


def write_bundle(run_dir: Path, bundle: Path) -> None:
    """Write a bundle of a run that is exported.

    Args:
      bundle: a folder that does not exist or is empty; its name is the bundle's.

    Raises:
      ConfigError: the folder holds files.
      ExportError: the run is not exported, or its model is a classifier.
    """
    description = read_description(run_dir)
    if description.task != "segmentation":
        raise ExportError(
            "a MONAI bundle is written for segmentation; this model is a classifier, serve its ONNX package instead"
        )
    try:
        if bundle.is_dir() and any(bundle.iterdir()):
            raise ConfigError(f"{bundle.name!r} holds files; choose a new folder for --bundle")
        for folder in ("configs", "models", "docs"):
            (bundle / folder).mkdir(parents=True, exist_ok=True)
        _write_parts(run_dir, bundle, description)
    except OSError as error:
        raise ConfigError(
            f"cannot write the bundle {bundle.name!r} ({error.strerror}); choose another folder"
        ) from None


def _write_parts(run_dir: Path, bundle: Path, description: PackageDescription) -> None:
    arguments = _network_arguments(description)
    network = bundle_network(**arguments).eval()
    load_into(network, load_weights(run_dir / "model.safetensors", layout_of(network)))
    metadata = bundle_metadata(description)
    _write_json(bundle / "configs" / "metadata.json", metadata)
    _write_json(bundle / "configs" / "inference.json", inference_config(description))
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    _save_torchscript(network, description, bundle / "models" / "model.ts", metadata)
    card = run_dir / "card.md"
    page = card.read_text(encoding="utf-8") if card.is_file() else f"# {description.name}\n"
    (bundle / "docs" / "README.md").write_text(page + HOW_TO_RUN, encoding="utf-8")
    (bundle / "LICENSE").write_text(LICENCE, encoding="utf-8")


def _network_arguments(description: PackageDescription) -> dict[str, Any]:
    return {
        "network": description.network.model_dump(mode="json"),
        "spatial_dims": description.spatial_dims,
        "in_channels": description.num_channels,
        "out_channels": description.out_channels,
        "patch_size": list(description.patch_size),
    }


def bundle_metadata(description: PackageDescription) -> dict[str, Any]:
    """Return metadata.json as MONAI's bundle specification wants it."""
    channels = {str(position): name for position, name in enumerate(description.channels)}
    labels = {"0": "background", **{str(value): name for value, name in description.labels.items()}}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported from a federated run"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            "nibabel": version("nibabel"),
            "pytorch-ignite": OLDEST_IGNITE,
            "medfl-ray": __version__,
        },
        "task": f"Segmentation of {', '.join(description.labels.values())}",
        "description": f"Model {description.name!r} of a federated training; docs/README.md is its model card.",
        "authors": "the hospitals that docs/README.md names",
        "copyright": "see LICENSE",
        "intended_use": "Research with a person who reviews the result; not for diagnosis or treatment.",
        "network_data_format": {
            "inputs": {"image": _tensor(description, "magnitude", description.num_channels, channels)},
            "outputs": {"pred": _tensor(description, "segmentation", description.out_channels, labels)},
        },
    }


def _tensor(description: PackageDescription, form: str, channels: int, names: dict[str, str]) -> dict[str, Any]:
    return {
        "type": "image",
        "format": form,
        "modality": "n/a",
        "num_channels": channels,
        "spatial_shape": list(description.patch_size),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": names,
    }


def inference_config(description: PackageDescription) -> dict[str, Any]:
    """Return inference.json: each NIfTI file of `dataset_dir` becomes a mask in `output_dir`."""
    windows = description.sliding_window
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/masks'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii*'))",
        "network_def": {"_target_": "medfl_ray.export.monai_bundle.bundle_network", **_network_arguments(description)},
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preparation(description)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(description.patch_size),
            "sw_batch_size": 1,
            "overlap": windows.overlap,
            "mode": windows.mode,
            "sigma_scale": windows.sigma_scale,
            "padding_mode": windows.padding,
        },
        "postprocessing": {"_target_": "Compose", "transforms": _restoration(description)},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _preparation(description: PackageDescription) -> list[dict[str, Any]]:
    prepared = description.preprocessing
    keys = {"keys": "image"}
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", **keys, "image_only": True, "ensure_channel_first": True},
    ]
    if prepared.orientation is not None:
        labels = [["L", "R"], ["P", "A"], ["I", "S"]]
        steps.append({"_target_": "Orientationd", **keys, "axcodes": prepared.orientation, "labels": labels})
    if prepared.spacing_mm is not None:
        spacing = {"pixdim": list(prepared.spacing_mm), "mode": "bilinear", "padding_mode": "border"}
        steps.append({"_target_": "Spacingd", **keys, **spacing})
    if prepared.intensity == "zscore":
        steps.append({"_target_": "NormalizeIntensityd", **keys, "channel_wise": True})
    elif prepared.intensity == "percentile":
        scale = {"lower": 1, "upper": 99, "b_min": 0.0, "b_max": 1.0, "clip": True, "channel_wise": True}
        steps.append({"_target_": "ScaleIntensityRangePercentilesd", **keys, **scale})
    elif prepared.intensity == "window":
        low, high = prepared.window or (0.0, 1.0)
        steps.append(
            {"_target_": "ScaleIntensityRanged", **keys, "a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0,
             "clip": True}
        )  # fmt: skip
    return [*steps, {"_target_": "EnsureTyped", **keys}]


def _restoration(description: PackageDescription) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": True,
            "to_tensor": True,
        },
        # MONAI's writer refuses images with exchanged axes unless this shape is a tuple.
        {
            "_target_": "Lambdad",
            "keys": "pred",
            "func": "$lambda mask: mask.meta.update(spatial_shape=tuple(mask.shape[1:])) or mask",
        },
    ]
    values = description.preprocessing.label_values
    if values and values != tuple(range(1, len(values) + 1)):
        old, new = list(range(len(values) + 1)), [0, *values]
        steps.append({"_target_": "MapLabelValued", "keys": "pred", "orig_labels": old, "target_labels": new})
    saving = {
        "output_dir": "@output_dir",
        "resample": True,  # to its own grid, on which it lies already: without, MONAI misreads exchanged axes
        "output_ext": ".nii.gz",
        "output_postfix": "mask",
        "separate_folder": False,
    }
    return [*steps, {"_target_": "SaveImaged", "keys": "pred", "output_dtype": "$numpy.uint8", **saving}]


def _save_torchscript(
    network: nn.Module, description: PackageDescription, path: Path, metadata: dict[str, Any]
) -> None:
    from monai.data.torchscript_utils import save_net_with_metadata

    example = torch.zeros(1, description.num_channels, *description.patch_size)
    with warnings.catch_warnings():
        # MONAI's bundles hold TorchScript, whatever torch recommends in its place.
        warnings.filterwarnings("ignore", r"`torch\.jit\..*` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)
        with torch.inference_mode():
            scripted = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        save_net_with_metadata(scripted, str(path), meta_values=metadata)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
