"""The catalogue: a name of the configuration becomes a network that is fit for DP, or a reason why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from medfl_ray.config.model import ModelConfig
from medfl_ray.errors import ModelError
from medfl_ray.models import networks
from medfl_ray.models.bundle_network import build_bundle_network
from medfl_ray.models.fitness import check_fit_for_dp, drop_unused, keep_constant_buffers_out, work_out_of_place
from medfl_ray.models.networks import NetworkArguments
from medfl_ray.models.norms import use_norm
from medfl_ray.models.own_network import build_own_network


@dataclass(frozen=True)
class Entry:
    """One network: its builder, its levels and what it asks of the input size.

    Each input edge is a multiple of `divisor(levels)`. `fixed_size` networks accept only the patch
    size they were built for. `onnx_note` says why an ONNX file of the network has a fixed size, where it has.
    """

    build: Callable[[NetworkArguments], nn.Module]
    divisor: Callable[[int], int]
    min_levels: int = 2
    max_levels: int = 8
    spatial_dims: tuple[int, ...] = (2, 3)
    fixed_size: bool = False
    onnx_note: str = ""


def _per_level(levels: int) -> int:
    return int(2 ** (levels - 1))


CATALOGUE: dict[str, Entry] = {
    "unet3d": Entry(networks.unet, _per_level, spatial_dims=(3,)),
    "unet2d": Entry(networks.unet, _per_level, spatial_dims=(2,)),
    "basic_unet": Entry(networks.basic_unet, lambda levels: 16, min_levels=5, max_levels=6),
    "segresnet": Entry(networks.segresnet, _per_level),
    "dynunet": Entry(networks.dynunet, _per_level, min_levels=3),
    "attention_unet": Entry(networks.attention_unet, _per_level),
    "unetr": Entry(
        networks.unetr, lambda levels: 16, fixed_size=True, onnx_note="its position embedding belongs to one size"
    ),
    "swin_unetr": Entry(
        networks.swin_unetr, lambda levels: 32, min_levels=1, onnx_note="its window partition is traced for one size"
    ),
    "densenet": Entry(networks.densenet, lambda levels: 2 ** (levels + 1), min_levels=1),
}


def build_network(
    model: ModelConfig,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    for_dp: bool,
    patch_size: tuple[int, ...],
) -> nn.Module:
    """Build a network of the catalogue in a form that is fit for patient-level DP.

    Args:
      patch_size: patch edge lengths in voxels, [D, H, W] or [H, W].
      for_dp: also prove the fitness by a probe (one forward and backward pass on a small input).

    Raises:
      ModelError: the network cannot have these features, dimensions or patch size.
      NotFitForDP: a layer couples patients, or a parameter takes no part in the output.
    """
    entry = _entry(model)
    features = _complete(model, entry)
    _check_size(model, entry, spatial_dims, len(features), patch_size)
    request = NetworkArguments(spatial_dims, in_channels, out_channels, features, model.dropout, patch_size)
    network = entry.build(request)
    if model.factory is None and model.network is None:
        use_norm(network, model.norm, spatial_dims)
    work_out_of_place(network)
    keep_constant_buffers_out(network)
    probe = torch.zeros(2, in_channels, *smallest_size(model, spatial_dims, patch_size))
    if entry.fixed_size:
        drop_unused(network, probe)
    if for_dp:
        check_fit_for_dp(network, probe)
    return network


def size_divisor(model: ModelConfig) -> int:
    """Return the number that every input edge has to be a multiple of, in voxels."""
    entry = _entry(model)
    return entry.divisor(len(_complete(model, entry)))


def has_fixed_size(model: ModelConfig) -> bool:
    """Tell whether the network accepts no other input size than its patch size."""
    return _entry(model).fixed_size


def onnx_size_note(model: ModelConfig) -> str:
    """Return why an ONNX file of the network accepts one size only; empty where space is dynamic."""
    return _entry(model).onnx_note


def smallest_size(model: ModelConfig, spatial_dims: int, patch_size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the smallest input edges on which the network can be probed, in voxels."""
    if has_fixed_size(model):
        return patch_size
    edge = size_divisor(model)
    if model.network is not None:
        return (2 * edge,) * spatial_dims
    # Instance norm needs more than one voxel per channel at the lowest level: two of them do.
    return (edge * (2 if model.norm == "instance" else 1), *(edge,) * (spatial_dims - 1))


def _entry(model: ModelConfig) -> Entry:
    if model.network is not None:
        return Entry(
            partial(build_bundle_network, model.network), lambda levels: model.size_divisor, min_levels=1, max_levels=99
        )
    if model.factory is not None:
        return Entry(
            partial(build_own_network, model.factory), lambda levels: model.size_divisor, min_levels=1, max_levels=99
        )
    if model.type not in CATALOGUE:
        raise ModelError(f"no network {model.type!r} in the catalogue; it has {', '.join(CATALOGUE)}")
    return CATALOGUE[model.type]


def _complete(model: ModelConfig, entry: Entry) -> tuple[int, ...]:
    features = model.features
    if len(features) > entry.max_levels:
        raise ModelError(f"{model.type} has at most {entry.max_levels} levels; model.features lists {len(features)}")
    while len(features) < entry.min_levels:
        features = (*features, features[-1] * 2)
    return features


def _check_size(model: ModelConfig, entry: Entry, spatial_dims: int, levels: int, patch_size: tuple[int, ...]) -> None:
    if spatial_dims not in entry.spatial_dims:
        raise ModelError(
            f"{model.type} has {entry.spatial_dims[0]} spatial dimensions and the data {spatial_dims}; "
            "choose another model.type"
        )
    if len(patch_size) != spatial_dims:
        raise ModelError(
            f"the patch size {list(patch_size)} has {len(patch_size)} values; the network has {spatial_dims} dimensions"
        )
    divisor = entry.divisor(levels)
    if any(edge % divisor for edge in patch_size):
        nearest = [max(divisor, round(edge / divisor) * divisor) for edge in patch_size]
        raise ModelError(
            f"{model.type} with {levels} levels needs patch edges that are multiples of {divisor} voxels; "
            f"training.patch_size_voxels is {list(patch_size)}; the nearest that fits is {nearest}"
        )
    if model.norm == "instance" and math.prod(patch_size) == divisor**spatial_dims:
        raise ModelError(
            f"instance norm needs more than one voxel at the lowest level of {model.type}; "
            f"raise training.patch_size_voxels above {divisor} or set model.norm to group"
        )
