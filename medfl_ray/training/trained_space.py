"""Which directions of the weights are trained: all, a few layers, or a low-rank part of every convolution.

What is not trained gets neither gradient nor noise. The noise's norm grows with the square root of the number of
trained numbers, so fine-tuning few of them keeps more of the signal for the same epsilon. The choice looks at the
network alone, never at data, and is the same at every hospital.

Shapes: P parameters of the network, T trained numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from medfl_ray.errors import ModelError

Subset = Literal["all", "last", "norm", "low_rank"]
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
SMALL = 512  # A tensor of fewer elements than this belongs to a small layer.
BASIS_SEED = 20220616  # Public: the low-rank directions must be the same at every hospital and in every round.


@dataclass(frozen=True, eq=False)
class TrainedSpace:
    """The trained parameters, and for a low-rank one the orthonormal rows [rank, inputs] that its change stays in.

    The factors are those of LoRA (Hu et al. 2021, arXiv:2106.09685) with the inner one frozen at random
    (Zhang et al. 2023, arXiv:2308.03303): the change of a weight [outputs, inputs] is B A with A fixed and B
    trained. The gradient of B is the weight's times A transposed, so any engine's gradients will do.
    """

    parameters: tuple[nn.Parameter, ...]
    bases: tuple[Tensor | None, ...]

    @property
    def size(self) -> int:
        """Number T of trained numbers."""
        return sum(
            parameter.numel() if basis is None else len(parameter) * len(basis)
            for parameter, basis in zip(self.parameters, self.bases, strict=True)
        )

    @property
    def is_plain(self) -> bool:
        """Whether every trained parameter is trained in full, so that a gradient is used as it is."""
        return all(basis is None for basis in self.bases)

    def narrow(self, gradient: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Turn the gradient of the trained parameters, one tensor each, into that of the T trained numbers."""
        if self.is_plain:
            return tuple(gradient)
        return tuple(
            part if basis is None else part.reshape(len(part), -1) @ basis.to(part.device, part.dtype).T
            for part, basis in zip(gradient, self.bases, strict=True)
        )

    def widen(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Turn T numbers, flat, into one tensor per trained parameter, in its shape."""
        wide, position = [], 0
        for parameter, basis in zip(self.parameters, self.bases, strict=True):
            count = parameter.numel() if basis is None else len(parameter) * len(basis)
            part = flat[position : position + count]
            if basis is not None:
                part = part.view(len(parameter), len(basis)) @ basis.to(part.device, part.dtype)
            wide.append(part.reshape(parameter.shape))
            position += count
        return tuple(wide)

    def restrict_gradients(self) -> None:
        """Keep of the gradients in .grad what lies in the trained directions, in place."""
        for parameter, basis in zip(self.parameters, self.bases, strict=True):
            if basis is not None and parameter.grad is not None:
                rows = basis.to(parameter.grad.device, parameter.grad.dtype)
                flat = parameter.grad.reshape(len(parameter), -1)
                parameter.grad = ((flat @ rows.T) @ rows).view_as(parameter)


def freeze_the_rest(network: nn.Module, subset: Subset, rank: int, probe: Tensor) -> TrainedSpace:
    """Freeze what a subset leaves out, in place, and return what is trained.

    all: every parameter. last: the last layer. norm: normalisation layers, biases and tensors of fewer than 512
    elements. low_rank: the same, and a random low-rank part of every larger weight.

    Args:
      probe: made-up image [1, C, *S] that shows which layer is the last to work.

    Raises:
      ModelError: the network has nothing of the kind.
    """
    named = list(network.named_parameters())
    everything = {name for name, _ in named}
    if subset == "last":
        chosen, small = names_of_last_layer(network, probe), everything
    elif subset == "norm":
        chosen, small = _of_small_layers(network), everything
    else:
        chosen, small = everything, everything if subset == "all" else _of_small_layers(network)
    parameters, bases = [], []
    for number, (name, parameter) in enumerate(named):
        parameter.requires_grad_(name in chosen)
        if name in chosen:
            parameters.append(parameter)
            bases.append(None if name in small else _basis(parameter, rank, number))
    if not parameters:
        raise ModelError(f"training.trainable is {subset!r} and the network has no such layer; use 'all'")
    return TrainedSpace(tuple(parameters), tuple(bases))


def names_of_last_layer(network: nn.Module, probe: Tensor) -> set[str]:
    """Return the parameters' names of the layer that works last; the order of registration is another matter."""
    worked: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, _output, prefix=prefix: worked.append(prefix))
        for prefix, module in _layers(network)
    ]
    with torch.no_grad():
        network(probe)
    for hook in hooks:
        hook.remove()
    return {name for name, _ in network.named_parameters() if worked and name.rpartition(".")[0] == worked[-1]}


def _of_small_layers(network: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in _layers(network)
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or parameter.numel() < SMALL
    }


def _layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in network.named_modules() if list(module.parameters(recurse=False))]


def _basis(parameter: nn.Parameter, rank: int, number: int) -> Tensor | None:
    """Draw the fixed directions of one weight; None where they would not save anything."""
    inputs = math.prod(parameter.shape[1:])
    if parameter.ndim < 2 or rank >= inputs:
        return None
    generator = torch.Generator().manual_seed(BASIS_SEED + number)
    random = torch.randn(inputs, rank, generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(random).Q.T.contiguous()
    return rows
