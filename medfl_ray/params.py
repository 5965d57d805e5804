"""Flat float32 parameter vectors: the one form in which weights cross a boundary.

A vector has shape [P]; its `Layout` says which slice belongs to which named tensor. Parameters and
floating-point buffers are both part of it, in the order of the network's state dict.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from medfl_ray.errors import ModelError, UpdateRejected

if TYPE_CHECKING:
    import torch

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors in a flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def size(self) -> int:
        """Number of elements P of the vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over names and shapes, in hex."""
        text = ";".join(f"{name}:{shape}" for name, shape in zip(self.names, self.shapes, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()


def layout_of(network: torch.nn.Module) -> Layout:
    """Return the layout of a network's parameters and buffers.

    Raises:
      ModelError: a buffer is not floating point, so that it cannot be averaged (batch norm's counter is one).
    """
    state = network.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ModelError(
                f"the network's buffer {name!r} has type {tensor.dtype}, which cannot be averaged over hospitals. "
                "Use group or instance norm instead of batch norm."
            )
    return Layout(tuple(state), tuple(tuple(t.shape) for t in state.values()))


def tensors_of(network: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Return a network's own parameters and buffers, in the order of its layout."""
    return tuple(network.state_dict(keep_vars=True).values())


def flatten(network: torch.nn.Module | Sequence[torch.Tensor]) -> Vector:
    """Copy the state of a network, or its `tensors_of`, into a new float32 vector of shape [P]."""
    import torch

    tensors = tensors_of(network) if isinstance(network, torch.nn.Module) else network
    with torch.no_grad():
        return torch.cat([t.detach().to("cpu", torch.float32).reshape(-1) for t in tensors]).numpy().copy()


def load_into(network: torch.nn.Module | Sequence[torch.Tensor], vector: Vector) -> None:
    """Copy a vector of shape [P] into a network, or into its `tensors_of`, in place.

    Raises:
      UpdateRejected: the vector's length is not the network's.
    """
    import torch

    tensors = tensors_of(network) if isinstance(network, torch.nn.Module) else network
    sizes = [tensor.numel() for tensor in tensors]
    check_shape(vector, sum(sizes))
    parts = torch.from_numpy(np.array(vector, dtype=np.float32)).split_with_sizes(sizes)
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


class FlatWeights:
    """A network's tensors with one buffer of their size, for callers of `load_into` and `flatten` in every step."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take a network's `tensors_of`, whose memory has to stay where it is."""
        import torch

        self._tensors = [tensor.detach() for tensor in tensors]
        sizes = [tensor.numel() for tensor in tensors]
        buffer = torch.zeros(sum(sizes))
        self._vector: Vector = buffer.numpy()
        parts = buffer.split_with_sizes(sizes)
        self._parts = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def load(self, vector: Vector) -> None:
        """Copy a vector of shape [P] into the network, in place.

        Raises:
          UpdateRejected: the vector's length is not the network's.
        """
        import torch

        check_shape(vector, self._vector.size)
        self._vector[:] = vector
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._parts)

    def change_from(self, vector: Vector) -> Vector:
        """Return the network's weights minus a vector [P], as a new vector [P]."""
        import torch

        with torch.no_grad():
            torch._foreach_copy_(self._parts, self._tensors)
        return self._vector - np.asarray(vector, dtype=np.float32)


def check_shape(vector: Vector, size: int) -> None:
    """Refuse a vector that is not of shape [P].

    Raises:
      UpdateRejected: with both shapes.
    """
    if vector.shape != (size,):
        raise UpdateRejected(f"the weights have shape {vector.shape}; this network needs ({size},)")


def checksum(vector: Vector) -> str:
    """SHA-256 of the vector's little-endian float32 bytes, in hex."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()


def norm(vector: Vector) -> float:
    """Euclidean norm, accumulated in float64 (a float32 sum over millions of elements is off by 1e-4)."""
    wide = vector.astype(np.float64)
    return float(np.sqrt(wide @ wide))


def is_finite(vector: Vector) -> bool:
    """Whether no element is infinite or NaN; the sum of squares tells at once for all but the largest numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.dot(vector, vector)
    return bool(np.isfinite(square) or np.isfinite(vector).all())


def to_tensors(vector: Vector, layout: Layout) -> dict[str, Vector]:
    """Split a vector into named arrays (views), for saving as safetensors."""
    tensors: dict[str, Vector] = {}
    position = 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        length = math.prod(shape)
        tensors[name] = vector[position : position + length].reshape(shape)
        position += length
    return tensors
