"""Normalisation that looks at one sample only, so that it cannot couple patients."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from medfl_ray.models.networks import replace_submodule

MAX_GROUPS = 8
MIN_CHANNELS_PER_GROUP = 4
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def num_groups_for(num_channels: int) -> int:
    """Return the largest number of groups up to 8 that divides the channels into groups of 4 or more."""
    limit = max(1, min(MAX_GROUPS, num_channels // MIN_CHANNELS_PER_GROUP))
    return max(groups for groups in range(1, limit + 1) if num_channels % groups == 0)


def use_norm(network: nn.Module, norm: Literal["group", "instance"], spatial_dims: int) -> None:
    """Replace every batch, instance and group norm of a network by the chosen one, in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, (_BatchNorm, _InstanceNorm)):
            channels = module.num_features
        elif isinstance(module, nn.GroupNorm):
            channels = module.num_channels
        else:
            continue
        replace_submodule(network, name, _make_norm(norm, channels, spatial_dims))


def _make_norm(norm: Literal["group", "instance"], num_channels: int, spatial_dims: int) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(num_groups_for(num_channels), num_channels)
    return INSTANCE_NORMS[spatial_dims](num_channels, affine=True)
