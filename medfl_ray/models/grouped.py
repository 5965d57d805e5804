"""One network as N members that share a forward pass and nothing else.

Every convolution repeats its weights once per member and gives each member a group of its own, so that the
gradient of a repeated weight *is* that member's gradient. All other layers see ordinary samples: a batch
holds sample k of every member side by side, [K * N, C, *S] with the member as the faster index, which a
convolution may view as [K, N * C, *S] without moving a voxel.

Shapes: N members, K samples of a member, C channels, L output channels, S voxels per axis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medfl_ray.models.networks import replace_submodule

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Grouped(nn.Module):
    """A layer whose parameters have a leading axis of N members; called as the original layer is."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, num_members: int) -> None:
        super().__init__()
        # A plain attribute inside a tuple: the original's parameters must not be registered here as well.
        self._original = (layer,)
        for name in ("weight", "bias"):
            parameter = getattr(layer, name, None)
            repeated = None if parameter is None else _repeat(parameter, num_members)
            self.register_parameter(name, repeated)

    @property
    def num_members(self) -> int:
        """Number N, read from the weights: see `repeat_weights`."""
        return len(self.weight)

    @property
    def original(self) -> Any:
        """The layer that is repeated."""
        return self._original[0]

    def per_sample(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Repeat a parameter [N, C] over a batch [K * N, C, *S], ready to be broadcast."""
        repeated = parameter.repeat(len(x) // self.num_members, 1)
        return repeated.view(*repeated.shape, *(1,) * (x.ndim - 2))


class GroupedConv(Grouped):
    """Convolution, plain or transposed: the original's groups once per member."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [K * N, C, *S]."""
        layer, kind = self.original, type(self.original)
        if is_pointwise(layer):
            return self._mix_channels(x)
        samples = x.reshape(len(x) // self.num_members, -1, *x.shape[2:])
        weight = self.weight.flatten(0, 1)
        bias = None if self.bias is None else self.bias.flatten()
        groups = self.num_members * layer.groups
        if kind in TRANSPOSED:
            extra = (layer.stride, layer.padding, layer.output_padding, groups, layer.dilation)
            out = TRANSPOSED[kind](samples, weight, bias, *extra)
        else:
            out = CONVOLUTIONS[kind](samples, weight, bias, layer.stride, layer.padding, layer.dilation, groups)
        return out.reshape(len(x), -1, *out.shape[2:])

    def _mix_channels(self, x: Tensor) -> Tensor:
        """Convolve with a kernel of one voxel: a product of small matrices, quicker than a convolution's set-up."""
        samples = x.reshape(len(x) // self.num_members, self.num_members, x.shape[1], -1)
        out = torch.matmul(self.weight.flatten(2), samples)
        if self.bias is not None:
            out = out + self.bias[..., None]
        return out.reshape(len(x), -1, *x.shape[2:])


class GroupedNorm(Grouped):
    """Group or instance norm: statistics per sample as ever, scale and shift per member."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [K * N, C, *S], seen as [K, N * C, *S]: the groups of all members side by side."""
        layer = self.original
        groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
        samples = x.reshape(len(x) // self.num_members, -1, *x.shape[2:])
        bias = None if self.bias is None else self.bias.flatten()
        out = functional.group_norm(samples, self.num_members * groups, self.weight.flatten(), bias, layer.eps)
        return out.view_as(x)


class GroupedPReLU(Grouped):
    """Leaky rectifier with a learned slope of each member, for all channels or for each."""

    def forward(self, x: Tensor) -> Tensor:
        """Rectify [K * N, C, *S]."""
        return torch.where(x >= 0, x, self.per_sample(self.weight, x) * x)


class GroupedLinear(Grouped):
    """Linear map of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [K * N, *T, C] to [K * N, *T, C']."""
        members = x.reshape(len(x) // self.num_members, self.num_members, -1, x.shape[-1])
        out = torch.einsum("kntc,ndc->kntd", members, self.weight)
        if self.bias is not None:
            out = out + self.bias[:, None]
        return out.reshape(*x.shape[:-1], -1)


LAYERS: dict[type[nn.Module], type[Grouped]] = {
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), GroupedConv),
    **dict.fromkeys((nn.GroupNorm, *INSTANCE_NORMS), GroupedNorm),
    nn.PReLU: GroupedPReLU,
    nn.Linear: GroupedLinear,
}


def why_not_grouped(network: nn.Module) -> str:
    """Return the first reason why a network cannot be grouped, empty if it can."""
    for name, module in network.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        kind = type(module).__name__
        if type(module) not in LAYERS:
            return f"layer {name!r} is {kind}, whose parameters have no grouped form"
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"layer {name!r} pads with {module.padding_mode!r}; a grouped convolution pads with zeros"
        if getattr(module, "track_running_stats", False):
            return f"layer {name!r} keeps running statistics"
    return ""


def group(network: nn.Module, num_members: int) -> nn.Module:
    """Return a network of N members, each with the given network's weights; the given one is left as it is.

    Its parameters have the same names and order and a leading axis N. It maps images [K * N, C, *S], the
    member being the faster index, to [K * N, L, *S]; see `stack` and `unstack`. `why_not_grouped` is to be
    asked first: a layer without a grouped form would share its parameters among the members.
    """
    members = copy.deepcopy(network)
    for name, module in list(members.named_modules()):
        if list(module.parameters(recurse=False)):
            grouped = LAYERS[type(module)](module, num_members)
            if not name:
                return grouped
            replace_submodule(members, name, grouped)
    return members


def repeat_weights(network: nn.Module, members: nn.Module, num_members: int | None = None) -> None:
    """Give every member the weights of a network, in place; with a number, change how many members there are."""
    with torch.no_grad():
        for source, target in zip(network.parameters(), members.parameters(), strict=True):
            if num_members is not None and len(target) != num_members:
                target.data = source.new_empty((num_members, *source.shape))
            target.copy_(source.expand_as(target))


def stack(images: list[Tensor]) -> Tensor:
    """Put the samples [K, C, *S] of N members into one batch [K * N, C, *S]."""
    return torch.stack(images, dim=1).flatten(0, 1)


def unstack(outputs: Tensor, num_members: int) -> tuple[Tensor, ...]:
    """Return each member's outputs [K, L, *S] from those of a batch [K * N, L, *S]."""
    return torch.unbind(outputs.reshape(-1, num_members, *outputs.shape[1:]), dim=1)


def is_pointwise(layer: Any) -> bool:
    """Whether a layer is a plain convolution that sees one voxel at a time."""

    def is_all(values: tuple[int, ...] | str, number: int) -> bool:
        return set(values) == {number}

    plain = type(layer) in CONVOLUTIONS and layer.groups == 1
    return plain and is_all(layer.kernel_size, 1) and is_all(layer.stride, 1) and is_all(layer.padding, 0)


def _repeat(parameter: nn.Parameter, num_members: int) -> nn.Parameter:
    """Return the parameter once per member; a frozen one stays frozen."""
    # In plain order, whatever the original's is: a grouped convolution would turn other weights at each pass.
    repeated = parameter.detach().expand(num_members, *parameter.shape).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(repeated, requires_grad=parameter.requires_grad)
