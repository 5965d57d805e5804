"""Layers without parameters, done more quickly on a CPU, with the same values and gradients as the originals.

`quicken` puts them into a network that trains; names and order of the parameters stay. What it does not
know it leaves alone. Shapes: N samples, C channels, S voxels per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfl_ray.models.networks import replace_submodule

MAX_POOLS = {nn.MaxPool2d: 2, nn.MaxPool3d: 3}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
LIBRARIES = ("monai.", "torch.nn.", "medfl_ray.")
LINEAR_MODES = ("linear", "bilinear", "trilinear")
FEW_VOXELS = 64  # So small an image is interpolated by one matrix instead of one per axis.


def quicken(network: nn.Module) -> nn.Module:
    """Replace what is known to be slow, in place, and return the network."""
    for name, module in list(network.named_modules()):
        kind = type(module)
        if name and kind in MAX_POOLS and _halves(module):
            replace_submodule(network, name, HalvingMaxPool(MAX_POOLS[kind]))
        elif name and kind is nn.Upsample and module.mode in LINEAR_MODES and module.size is None:
            replace_submodule(network, name, LinearUpsample(module))
    return leave_out_idle(network)


def leave_out_idle(network: nn.Module, padding: bool = True) -> nn.Module:
    """Leave out what changes no bit, in place, and return the network.

    Dropout of probability 0, and padding by nothing unless the copies that it makes are wanted. A network that has a
    class of its user's keeps its dropout, whose probability that class may read or change.
    """
    if all(type(module).__module__.startswith(LIBRARIES) for module in network.modules()):
        for module in list(network.modules()):
            _leave_out_dropout(module)
    for module in network.modules():
        if padding and _is_monais(module, "UpCat"):
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
    """The maximum over pairs, axis by axis, without an index per voxel.

    Pairs of the last axis meet first and the first of two equal ones wins, so that the winner of a block is the
    first largest voxel in the order in which a window is read.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spatial_dims: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.spatial_dims = spatial_dims
        out = _even(x, spatial_dims)
        for axis in range(-spatial_dims, 0):  # the largest steps first: whole rows are compared
            out = torch.maximum(*_pair(out, axis))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dims = ctx.spatial_dims
        levels = [_even(x, dims)]
        for axis in range(-1, -dims, -1):
            levels.append(torch.maximum(*_pair(levels[-1], axis)))
        gradient = gradients[0]
        for axis, level in zip(range(-dims, 0), reversed(levels), strict=True):
            last = axis == -1
            result = torch.zeros_like(x) if last and level is not x else torch.empty_like(level)
            first, second = _pair(_even(result, dims) if last else result, axis)
            torch.mul(gradient, torch.ge(*_pair(level, axis)), out=first)
            torch.sub(gradient, first, out=second)
            gradient = result
        return gradient, None


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
        if _size(x.shape[2:]) <= FEW_VOXELS:
            whole = _interpolation_of_all(tuple(x.shape[2:]), tuple(scales), bool(original.align_corners), x.dtype)
            shape = [int(size * scale) for size, scale in zip(x.shape[2:], scales, strict=True)]
            return torch.matmul(x.flatten(2), whole.T).view(*x.shape[:2], *shape)
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


def _even(x: Tensor, spatial_dims: int) -> Tensor:
    """Leave out the last voxel of odd axes; the tensor itself where there are none."""
    if not any(size % 2 for size in x.shape[-spatial_dims:]):
        return x
    index: tuple[Any, ...] = tuple(slice(2 * (size // 2)) for size in x.shape[-spatial_dims:])
    return x[(..., *index)]


def _pair(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return views of every first and every second voxel along an even axis, counted from the end."""
    after: tuple[Any, ...] = (slice(None),) * (-1 - axis)
    return x[(..., slice(0, None, 2), *after)], x[(..., slice(1, None, 2), *after)]


@lru_cache(maxsize=64)
def _interpolation_of_all(
    sizes: tuple[int, ...], scales: tuple[float, ...], align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """Return the matrix of the interpolation along all axes, for flattened images."""
    matrices = [
        _interpolation(size, float(scale), align_corners, torch.float64)
        for size, scale in zip(sizes, scales, strict=True)
    ]
    with torch.no_grad(), torch.inference_mode(mode=False):
        return reduce(torch.kron, matrices).to(dtype).contiguous()


def _halves(pool: Any) -> bool:
    def is_all(value: Any, number: int) -> bool:
        return set(value if isinstance(value, tuple) else (value,)) == {number}

    plain = is_all(pool.padding, 0) and is_all(pool.dilation, 1) and not pool.ceil_mode and not pool.return_indices
    return plain and is_all(pool.kernel_size, 2) and is_all(pool.stride, 2)


def _leave_out_dropout(module: nn.Module) -> None:
    for name, layer in list(module.named_children()):
        if _is_idle(layer) and _is_monais(module, "ADN"):  # a sequence that nobody indexes
            delattr(module, name)
        elif _is_idle(layer):
            setattr(module, name, nn.Identity())


def _is_idle(layer: Any) -> bool:
    return type(layer) in DROPOUTS and layer.p == 0.0


def _is_monais(module: nn.Module, name: str) -> bool:
    return type(module).__name__ == name and type(module).__module__.startswith("monai.")


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
