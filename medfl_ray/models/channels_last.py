"""A network whose images lie in memory with their channels side by side, the order that a CPU convolves quickest.

The twin shares the original's parameters, with their names and order, so whatever trains one trains the other.
Shapes: N samples, C channels, S voxels per axis, V voxels of an image, G groups of a norm.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from medfl_ray.models.grouped import is_pointwise
from medfl_ray.models.networks import replace_submodule
from medfl_ray.models.quick_layers import leave_out_idle, quicken

ORDERS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Order with channels side by side, by the number of axes of a batch."""
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
KNOWN = (*CONVOLUTIONS, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm, nn.PReLU)
"""Layers with parameters that keep the order of their input; others (attention, instance norm) would copy it."""
MANY_VOXELS = 2**12
"""Voxels of an image up to which PyTorch's own group norm is exact, and quicker."""
CACHED_VALUES = 2**16
"""So many float32 values are worked on at once, so that they stay in a core's cache."""


def channels_last_copy(network: nn.Module, on_cpu: bool, same_bits: bool = False) -> nn.Module:
    """Return a network that computes the same, more quickly where this is possible, with the very same parameters.

    On a GPU it is the network itself. The original keeps its layers, for export, evaluation and groups.

    Args:
      same_bits: leave every operation as it is, and its order of sums.
    """
    if not on_cpu:
        return network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    fast_copy = copy.deepcopy(network, shared)
    if same_bits:
        return leave_out_idle(fast_copy)
    if not keeps_order(network):
        return quicken(fast_copy)
    for name, module in list(fast_copy.named_modules()):
        if type(module) is nn.GroupNorm and module.affine:
            replace_submodule(fast_copy, name, ChannelsLastGroupNorm(module))
        elif is_pointwise(module):
            replace_submodule(fast_copy, name, PointwiseConvolution(module))
    with torch.no_grad():
        for parameter in fast_copy.parameters():
            if parameter.ndim in ORDERS:  # weights that lie as the images do need not be turned for each pass
                parameter.data = parameter.data.contiguous(memory_format=ORDERS[parameter.ndim])
    fast_copy.register_forward_pre_hook(_put_channels_last)
    # To concatenate interpolated volumes is quicker from the copy that padding makes of them (6 % of a U-Net's step).
    return leave_out_idle(fast_copy, padding=False)


def keeps_order(network: nn.Module) -> bool:
    """Tell whether a network is made of convolutions and layers that keep the order of what they get."""
    kinds = {type(module) for module in network.modules() if list(module.parameters(recurse=False))}
    return bool(kinds & {*CONVOLUTIONS}) and kinds <= {*KNOWN}


class ChannelsLastGroupNorm(nn.Module):
    """Group norm over images with channels side by side, as exact as PyTorch's own over images in the usual order.

    PyTorch adds up the voxels of such images one after the other in float32, which loses four digits at 64^3 voxels.
    """

    def __init__(self, original: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = original.num_groups, original.eps
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, *S]."""
        few = x.numel() < MANY_VOXELS * x.shape[0] * x.shape[1]
        if few or x.ndim not in ORDERS or x.dtype == torch.float64 or not _side_by_side(x):
            return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        out: Tensor = _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-untyped-call]
        return out


class PointwiseConvolution(nn.Module):
    """Convolution with kernels of one voxel, as a product of the rows of channels with a matrix.

    In one thread PyTorch takes a path for it that copies images with channels side by side into the usual order.
    """

    def __init__(self, original: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, *S] to [N, C', *S]."""
        return nn.functional.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class _GroupNorm(torch.autograd.Function):
    """Both passes over rows of channels, in float32 whatever the input is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        rows = _rows(x)
        mean, rstd = _moments(rows, num_groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        mean_of, rstd_of = (_per_channel(value, x.shape[1]) for value in (mean, rstd))
        slope = rstd_of * weight.float()
        return _images(torch.addcmul(bias.float() - mean_of * slope, rows, slope), x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        num_groups, num_channels = mean.shape[1], x.shape[1]
        rows, change = _rows(x), _rows(gradients[0])
        size = rows.shape[1] * num_channels // num_groups
        # Sums over the voxels, per sample and channel: of the gradient, and of its product with the input.
        product = change * rows
        along, total = product.sum(1, keepdim=True), change.sum(1, keepdim=True)
        mean_of, rstd_of = (_per_channel(value, num_channels) for value in (mean, rstd))
        weight_gradient = ((along - total * mean_of) * rstd_of).sum((0, 1))
        along_group, total_group = (_per_group(value * weight, num_groups) for value in (along, total))
        slope = (total_group * mean - along_group) * rstd**3 / size
        offset = -slope * mean - total_group * rstd / size
        slope, offset = (_per_channel(value, num_channels) for value in (slope, offset))
        out = torch.addcmul(offset, rows, slope, out=product).addcmul_(change, rstd_of * weight)
        return _images(out, x), weight_gradient, total.sum((0, 1)), None, None


def _moments(rows: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / standard deviation, [N, G] each; the squares are taken about the mean, so none cancel."""
    num_samples, num_voxels, num_channels = rows.shape
    size = num_voxels * num_channels // num_groups
    mean = _per_group(rows.sum(1, keepdim=True), num_groups) / size
    centre = _per_channel(mean, num_channels)
    squares = torch.zeros_like(centre, dtype=torch.float64)
    for part in torch.split(rows, max(1, CACHED_VALUES // (num_samples * num_channels)), dim=1):
        squares += (part - centre).square_().sum(1, keepdim=True)
    return mean, (_per_group(squares, num_groups) / size + eps).rsqrt().float()


def _per_group(value: Tensor, num_groups: int) -> Tensor:
    """Add up [N, 1, C] to [N, G]."""
    return value.reshape(len(value), num_groups, -1).sum(2)


def _per_channel(value: Tensor, num_channels: int) -> Tensor:
    """Repeat [N, G] to [N, 1, C]."""
    return value.repeat_interleave(num_channels // value.shape[1], 1)[:, None]


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """See rows [N, V, C] as images [N, C, *S] of the type and size of others."""
    return rows.to(like.dtype).reshape(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


def _rows(x: Tensor) -> Tensor:
    """See images [N, C, *S] as float32 rows [N, V, C]; nothing moves where channels lie side by side already."""
    return x.movedim(1, -1).flatten(1, -2).float()


def _side_by_side(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=ORDERS[x.ndim])


def _put_channels_last(_network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy images into the order; the strides of a single channel would not tell that it is meant."""
    images, *others = arguments
    return (torch.empty_like(images, memory_format=ORDERS[images.ndim]).copy_(images), *others)
