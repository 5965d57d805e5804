"""MONAI networks as builders: one small function per name of the catalogue.

Each builder asks MONAI for instance norm and activations that are not in place; `norms.py` then puts
the chosen norm everywhere, also where MONAI hard-codes batch norm. MONAI is imported inside the
builders: importing any of its networks imports all of them (seconds).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from medfl_ray.errors import ModelError

NORM = ("instance", {"affine": True})
LEAKY = ("leakyrelu", {"negative_slope": 0.01, "inplace": False})
RELU = ("relu", {"inplace": False})


@dataclass(frozen=True)
class NetworkArguments:
    """What a builder is asked for; `features` are the channels per resolution level."""

    spatial_dims: int
    in_channels: int
    out_channels: int
    features: tuple[int, ...]
    dropout: float
    patch_size: tuple[int, ...]


def unet(request: NetworkArguments) -> nn.Module:
    """U-Net without residual units: its first convolution is strided, so full resolution stays cheap."""
    from monai.networks.nets.unet import UNet

    return UNet(
        spatial_dims=request.spatial_dims,
        in_channels=request.in_channels,
        out_channels=request.out_channels,
        channels=request.features,
        strides=(2,) * (len(request.features) - 1),
        norm=NORM,
        act=LEAKY,
        dropout=request.dropout,
    )


def basic_unet(request: NetworkArguments) -> nn.Module:
    """U-Net of five levels with two convolutions each; a sixth feature is the last layer's width."""
    from monai.networks.nets.basic_unet import BasicUNet

    features = request.features if len(request.features) == 6 else (*request.features, request.features[0])
    return BasicUNet(
        spatial_dims=request.spatial_dims,
        in_channels=request.in_channels,
        out_channels=request.out_channels,
        features=features,
        act=LEAKY,
        norm=NORM,
        dropout=request.dropout,
    )


def segresnet(request: NetworkArguments) -> nn.Module:
    """Residual encoder-decoder of the BraTS 2018 winner; channels double at every level."""
    from monai.networks.nets.segresnet import SegResNet

    first, levels = request.features[0], len(request.features)
    doubled = tuple(first * 2**level for level in range(levels))
    if request.features != doubled:
        raise ModelError(f"segresnet doubles its channels at every level; set model.features to {list(doubled)}")
    return SegResNet(
        spatial_dims=request.spatial_dims,
        init_filters=first,
        in_channels=request.in_channels,
        out_channels=request.out_channels,
        dropout_prob=request.dropout or None,
        act=RELU,
        norm=NORM,
        num_groups=1,
        blocks_down=(1, *(2,) * (levels - 1)),
        blocks_up=(1,) * (levels - 1),
    )


def dynunet(request: NetworkArguments) -> nn.Module:
    """The network of nnU-Net, deep supervision off."""
    from monai.networks.nets.dynunet import DynUNet

    levels = len(request.features)
    strides = [1] + [2] * (levels - 1)
    network = DynUNet(
        spatial_dims=request.spatial_dims,
        in_channels=request.in_channels,
        out_channels=request.out_channels,
        kernel_size=[3] * levels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=list(request.features),
        dropout=request.dropout or None,
        norm_name=NORM,
        act_name=LEAKY,
        deep_supervision=False,
    )
    # MONAI registers each block twice, once here and once inside skip_layers, which alone is used.
    for alias in ("input_block", "downsamples", "bottleneck", "upsamples"):
        delattr(network, alias)
    return network


def attention_unet(request: NetworkArguments) -> nn.Module:
    """U-Net whose skip connections pass attention gates; MONAI's own is hard-coded to batch norm."""
    from monai.networks.nets.attentionunet import AttentionUnet

    return AttentionUnet(
        spatial_dims=request.spatial_dims,
        in_channels=request.in_channels,
        out_channels=request.out_channels,
        channels=request.features,
        strides=(2,) * (len(request.features) - 1),
        dropout=request.dropout,
    )


def unetr(request: NetworkArguments) -> nn.Module:
    """Vision transformer encoder with a convolutional decoder, bound to one patch size.

    features[0] is the decoder's width, features[-1] the transformer's.
    """
    from monai.networks.nets.unetr import UNETR

    num_heads, hidden = 4, request.features[-1]
    if hidden % num_heads:
        raise ModelError(
            f"unetr has {num_heads} attention heads; the last of model.features, {hidden}, must be a multiple"
        )
    return UNETR(
        in_channels=request.in_channels,
        out_channels=request.out_channels,
        img_size=request.patch_size,
        feature_size=request.features[0],
        hidden_size=hidden,
        mlp_dim=4 * hidden,
        num_heads=num_heads,
        norm_name=NORM,
        dropout_rate=request.dropout,
        spatial_dims=request.spatial_dims,
    )


def swin_unetr(request: NetworkArguments) -> nn.Module:
    """Shifted-window transformer encoder with a convolutional decoder; only features[0] is used."""
    from monai.networks.nets.swin_unetr import SwinUNETR

    if request.features[0] % 12:
        raise ModelError(
            f"swin_unetr needs a first feature that is a multiple of 12, and model.features starts "
            f"with {request.features[0]}; set model.features to [12] or [24]"
        )
    return SwinUNETR(
        in_channels=request.in_channels,
        out_channels=request.out_channels,
        feature_size=request.features[0],
        norm_name=NORM,
        drop_rate=request.dropout,
        spatial_dims=request.spatial_dims,
    )


def densenet(request: NetworkArguments) -> nn.Module:
    """Densely connected classifier: features[0] stem channels, half of them growth, one block per level.

    A level that is n times as wide as the first gets 2n layers: (8, 16, 32) makes blocks of 2, 4 and 8.
    """
    from monai.networks.nets.densenet import DenseNet

    first = request.features[0]
    return DenseNet(
        spatial_dims=request.spatial_dims,
        in_channels=request.in_channels,
        out_channels=request.out_channels,
        init_features=first,
        growth_rate=max(1, first // 2),
        block_config=tuple(2 * max(1, features // first) for features in request.features),
        act=RELU,
        norm=NORM,
        dropout_prob=request.dropout,
    )


def replace_submodule(network: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put another module at a dotted name, in place."""
    parent_name, _, child = name.rpartition(".")
    parent: Any = network.get_submodule(parent_name) if parent_name else network
    setattr(parent, child, replacement)
