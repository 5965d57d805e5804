"""Weights as safetensors: read back only into the network that they were written for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from medfl_ray.errors import ExportError
from medfl_ray.params import Layout, Vector, to_tensors


def save_weights(path: Path, weights: Vector, layout: Layout) -> None:
    """Write weights [P] as named float32 tensors."""
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in to_tensors(weights, layout).items()}, path)


def load_weights(path: Path, layout: Layout) -> Vector:
    """Read weights [P].

    Raises:
      ExportError: the file is missing or damaged, or its tensors are not those of the layout.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ExportError(
            f"{path.name} is not in the run's folder; the run has not ended. Continue it with medfl-ray run --resume"
        ) from None
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{path.name} cannot be read ({type(error).__name__}); it is damaged or not safetensors"
        ) from None
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = dict(zip(layout.names, layout.shapes, strict=True))
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ExportError(
            f"{path.name} does not fit the network of config.yaml: {len(differing)} tensors differ, the first is "
            f"{differing[0]!r} with shape {found.get(differing[0])} where {expected.get(differing[0])} is expected"
        )
    return np.concatenate([tensors[name].astype(np.float32).reshape(-1) for name in layout.names])
