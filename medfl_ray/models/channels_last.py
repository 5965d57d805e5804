"""A network whose images lie in memory with their channels side by side, the order that a CPU convolves quickest.

The twin shares the original's parameters, with their names and order, so whatever trains one trains the other.
Shapes: N samples, C channels, S voxels per axis, V voxels of an image, G groups of a norm.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from medfl_ray.models.networks import replace_submodule
from medfl_ray.models.quick_layers import quicken

ORDERS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Order with channels side by side, by the number of axes of a batch."""
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
KNOWN = (*CONVOLUTIONS, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.GroupNorm, nn.PReLU)
"""Layers with parameters that keep the order of their input; others (attention, instance norm) would copy it."""


def quick_twin(network: nn.Module, on_cpu: bool) -> nn.Module:
    """Return a network that computes the same, more quickly where this is possible, with the very same parameters.

    On a GPU it is the network itself. The original keeps its layers, for export, evaluation and groups.
    """
    if not on_cpu:
        return network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, shared)
    if not keeps_order(network):
        return quicken(twin)
    volumes = any(type(module) is nn.Conv3d for module in network.modules())
    for name, module in list(twin.named_modules()):
        if volumes and type(module) is nn.GroupNorm and module.affine:  # on images PyTorch's own is as quick
            replace_submodule(twin, name, ChannelsLastGroupNorm(module))
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim in ORDERS:  # weights that lie as the images do need not be turned for each pass
                parameter.data = parameter.data.contiguous(memory_format=ORDERS[parameter.ndim])
    twin.register_forward_pre_hook(_put_channels_last)
    return twin


def keeps_order(network: nn.Module) -> bool:
    """Tell whether a network is made of convolutions and layers that keep the order of what they get."""
    kinds = {type(module) for module in network.modules() if list(module.parameters(recurse=False))}
    return bool(kinds & {*CONVOLUTIONS}) and kinds <= {*KNOWN}


class ChannelsLastGroupNorm(nn.Module):
    """Group norm whose backward pass over images with channels side by side is a few products of small matrices."""

    def __init__(self, original: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = original.num_groups, original.eps
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, *S]."""
        if x.dtype == torch.float64 or x.ndim not in ORDERS or not x.is_contiguous(memory_format=ORDERS[x.ndim]):
            return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        out: Tensor = _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-untyped-call]
        return out


class _GroupNorm(torch.autograd.Function):
    """PyTorch's forward pass and its own gradients, in float32 whatever the input is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        num_voxels = x[0, 0].numel()
        out, mean, rstd = torch.native_group_norm(x, weight, bias, len(x), x.shape[1], num_voxels, num_groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        mean, rstd = mean.float(), rstd.float()
        num_channels, num_groups = x.shape[1], mean.shape[1]
        width = num_channels // num_groups
        rows, change = _rows(x), _rows(gradients[0])
        # Sums over the voxels, per sample and channel: of the gradient, and of its product with the input.
        along = torch.bmm(change.transpose(1, 2), rows).diagonal(dim1=1, dim2=2)
        total = torch.matmul(torch.ones(1, rows.shape[1], dtype=rows.dtype), change)[:, 0]
        mean_of, rstd_of = (value.repeat_interleave(width, 1) for value in (mean, rstd))
        weight_gradient = ((along - total * mean_of) * rstd_of).sum(0)
        along_group, total_group = ((value * weight).reshape(-1, num_groups, width).sum(2) for value in (along, total))
        slope = (total_group * mean - along_group) * rstd**3 / (width * rows.shape[1])
        offset = -slope * mean - total_group * rstd / (width * rows.shape[1])
        slope, offset = (value.repeat_interleave(width, 1)[:, None] for value in (slope, offset))
        out = torch.addcmul(offset, rows, slope).addcmul_(change, (rstd_of * weight)[:, None])
        back = out.to(x.dtype).reshape(len(x), *x.shape[2:], num_channels).movedim(-1, 1)
        return back, weight_gradient, total.sum(0), None, None


def _rows(x: Tensor) -> Tensor:
    """See images [N, C, *S] as float32 rows [N, V, C]; nothing moves where channels lie side by side already."""
    return x.movedim(1, -1).flatten(1, -2).float()


def _put_channels_last(_network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy images into the order; the strides of a single channel would not tell that it is meant."""
    images, *others = arguments
    return (torch.empty_like(images, memory_format=ORDERS[images.ndim]).copy_(images), *others)
