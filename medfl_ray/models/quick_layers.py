"""Layers without parameters, done more quickly on a CPU, with the same values and gradients as the originals.

`quicken` puts them into a network that trains; names and order of the parameters stay. What it does not
know it leaves alone. Shapes: N samples, C channels, S voxels per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfl_ray.models.networks import replace_submodule

MAX_POOLS = {nn.MaxPool2d: 2, nn.MaxPool3d: 3}
LINEAR_MODES = ("linear", "bilinear", "trilinear")


def quicken(network: nn.Module) -> nn.Module:
    """Replace what is known to be slow, in place, and return the network."""
    for name, module in list(network.named_modules()):
        kind = type(module)
        if name and kind in MAX_POOLS and _halves(module):
            replace_submodule(network, name, HalvingMaxPool(MAX_POOLS[kind]))
        elif name and kind is nn.Upsample and module.mode in LINEAR_MODES and module.size is None:
            replace_submodule(network, name, LinearUpsample(module))
        elif kind.__name__ == "UpCat" and kind.__module__.startswith("monai."):
            _skip_empty_padding(module)
    return network


class HalvingMaxPool(nn.Module):
    """Maximum over blocks of two voxels per axis; the gradient goes to the first largest one, as in PyTorch."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self._spatial_dims = spatial_dims

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, *S] to [N, C, *S // 2]; an odd last voxel is left out."""
        if x.is_cuda or not x.is_contiguous():
            pool = functional.max_pool2d if self._spatial_dims == 2 else functional.max_pool3d
            return pool(x, 2)
        out: Tensor = _HalvingMax.apply(x, self._spatial_dims)  # type: ignore[no-untyped-call]
        return out


class _HalvingMax(torch.autograd.Function):
    """The maximum of strided views, without an index per voxel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spatial_dims: int) -> Tensor:
        views = _corners(x, spatial_dims)
        out = torch.maximum(views[0], views[1])
        for view in views[2:]:
            torch.maximum(out, view, out=out)
        ctx.save_for_backward(x, out)
        ctx.spatial_dims = spatial_dims
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, out = ctx.saved_tensors
        result = torch.zeros_like(x)
        left = gradients[0].clone()
        for source, target in zip(_corners(x, ctx.spatial_dims), _corners(result, ctx.spatial_dims), strict=True):
            here = source == out
            target.copy_(left * here)
            left.masked_fill_(here, 0.0)  # a voxel that is equally large comes too late
        return result, None


class LinearUpsample(nn.Module):
    """Linear, bilinear or trilinear interpolation as one small matrix product per axis."""

    def __init__(self, original: nn.Upsample) -> None:
        super().__init__()
        # Inside a tuple: the layer that is replaced is not a part of the network any more.
        self._original: tuple[Any] = (original,)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, *S] to [N, C, *(scale * S)]."""
        original = self._original[0]
        if x.is_cuda or not x.is_contiguous() or x.dtype not in (torch.float32, torch.float64):
            out: Tensor = original(x)
            return out
        factors = original.scale_factor
        scales = factors if isinstance(factors, Sequence) else (factors,) * (x.ndim - 2)
        for axis, scale in enumerate(scales, start=2):
            matrix = _interpolation(x.shape[axis], float(scale), bool(original.align_corners), x.dtype)
            x = torch.matmul(x, matrix.T) if axis == x.ndim - 1 else _along(x, matrix, axis)
        return x


def _along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Apply a matrix [S', S] along one axis that is not the last."""
    rows = x.reshape(-1, x.shape[axis], x[0, 0].numel() // _size(x.shape[2 : axis + 1]))
    out = torch.matmul(matrix, rows)
    return out.view(*x.shape[:axis], matrix.shape[0], *x.shape[axis + 1 :])


@lru_cache(maxsize=256)
def _interpolation(size: int, scale: float, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """Return the matrix [S', S] of PyTorch's own interpolation along one axis of a given size."""
    with torch.no_grad(), torch.inference_mode(mode=False):
        identity = torch.eye(size, dtype=torch.float64)[None]
        columns = functional.interpolate(
            identity, scale_factor=scale, mode="linear", align_corners=align_corners or None
        )
        return columns[0].T.to(dtype).contiguous()


def _corners(x: Tensor, spatial_dims: int) -> list[Tensor]:
    """Return the 2**D views of every second voxel, in the order in which a window is read."""
    ends = [2 * (size // 2) for size in x.shape[2:]]
    offsets = product((0, 1), repeat=spatial_dims)
    views = []
    for some in offsets:
        index: tuple[Any, ...] = tuple(slice(offset, end, 2) for offset, end in zip(some, ends, strict=True))
        views.append(x[(..., *index)])
    return views


def _halves(pool: Any) -> bool:
    def is_all(value: Any, number: int) -> bool:
        return set(value if isinstance(value, tuple) else (value,)) == {number}

    plain = is_all(pool.padding, 0) and is_all(pool.dilation, 1) and not pool.ceil_mode and not pool.return_indices
    return plain and is_all(pool.kernel_size, 2) and is_all(pool.stride, 2)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for edge in shape:
        size *= edge
    return size


def _skip_empty_padding(block: Any) -> None:
    """Let MONAI's UpCat pad only where an odd edge asks for it; padding by nothing copies the whole tensor."""
    pads = bool(block.is_pad)

    def choose(module: Any, arguments: tuple[Tensor, Tensor | None]) -> None:
        low, skip = arguments
        module.is_pad = (
            pads
            and skip is not None
            and any(full != 2 * half for full, half in zip(skip.shape[2:], low.shape[2:], strict=True))
        )

    block.register_forward_pre_hook(choose)
