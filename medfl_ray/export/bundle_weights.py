"""The weights of a MONAI bundle as first weights of a run: with a manifest that says where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError
from medfl_ray.export.public_weights import WeightsManifest, save_public_weights
from medfl_ray.params import Layout, Vector

MODEL_FILE = "models/model.pt"
NESTED = ("model", "state_dict", "net")
"""Keys under which a checkpoint may hold the state dictionary."""


def take_bundle_weights(
    run: RunConfig, bundle: Path, output: Path, origin: Literal["public", "synthetic"], source: str
) -> WeightsManifest:
    """Write a bundle's weights for the run that has its network.

    Args:
      origin: what the training data were; the caller answers for that.
      source: where the bundle comes from, for the manifest.

    Raises:
      ConfigError: the run's model is no bundle's, or the weights cannot be read or are another network's.
    """
    from medfl_ray.models.catalogue import build_network
    from medfl_ray.params import layout_of

    model = run.model
    if model.network is None or model.in_channels is None or model.out_channels is None:
        raise ConfigError(
            "the run's model is no bundle with known channels; set model.type: bundle and model.bundle, and "
            "model.in_channels and out_channels where the bundle does not name them"
        )
    size = (run.spatial_dims, model.in_channels, model.out_channels)
    layout = layout_of(build_network(model, *size, False, run.patch_size))
    weights = _vector(_state_of(bundle / MODEL_FILE), layout)
    made_with = {"model": model.model_dump(mode="json", exclude_defaults=True)}
    return save_public_weights(output, weights, layout, bundle.resolve().name, source, made_with, origin)


def _state_of(file: Path) -> Mapping[str, Any]:
    """Read a state dictionary; torch reads tensors and plain values alone, so that no code of the file runs."""
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"the bundle has no {MODEL_FILE}") from None
    except Exception as error:  # noqa: BLE001 - torch raises what the damaged file makes of it
        raise ConfigError(
            f"{MODEL_FILE} of the bundle cannot be read as tensors alone ({type(error).__name__}); it is damaged, or "
            "holds objects whose reading would run code"
        ) from None
    for key in NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ConfigError(f"{MODEL_FILE} of the bundle holds no state dictionary")
    return found


def _vector(state: Mapping[str, Any], layout: Layout) -> Vector:
    parts = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in state or tuple(np.shape(state[name])) != shape:
            raise ConfigError(
                f"{MODEL_FILE} of the bundle has no {name!r} of shape {shape}; it belongs to another network"
            )
        parts.append(np.asarray(state[name], dtype=np.float32).ravel())
    return np.concatenate(parts)
