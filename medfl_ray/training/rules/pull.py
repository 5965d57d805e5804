"""Adding a pull to the gradients of one hospital, or of N hospitals at once; see `Pull` for what it is.

Shapes: N hospitals, P values of the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medfl_ray.params import Vector
from medfl_ray.training.rules.local_job import Pull


class Nudge:
    """A pull, cut into the tensors that it acts on; `parts` has (parameter, strength, centre, offset) of each."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor | float, Tensor, Tensor | None]]) -> None:
        self._parts = parts

    def add_to_gradients(self) -> None:
        """Add it to every gradient that is there."""
        for parameter, strength, centre, offset in self._parts:
            if parameter.grad is not None:
                pulled = parameter.grad + strength * (parameter.detach() - centre)
                parameter.grad = pulled if offset is None else pulled + offset


def nudge_of(pull: Pull | None, start: Vector, tensors: Sequence[Tensor]) -> Nudge | None:
    """Prepare the pull of one hospital on the tensors of its layout, from the weights [P] it starts from."""
    if pull is None:
        return None
    centres = cut(start if pull.centre is None else pull.centre, tensors)
    offsets = [None] * len(tensors) if pull.offset is None else cut(pull.offset, tensors)
    # A tensor with two names in the layout is one parameter, which is pulled once.
    once = {
        id(one): (one, pull.strength, centre, offset)
        for one, centre, offset in zip(tensors, centres, offsets, strict=True)
    }
    return Nudge(list(once.values()))


def nudge_of_group(
    pulls: Sequence[Pull | None], starts: Sequence[Vector], parameters: Sequence[Tensor]
) -> Nudge | None:
    """Prepare the pulls of N hospitals on their parameters, each [N, ...]; None where nobody is pulled."""
    if all(pull is None for pull in pulls):
        return None
    own = [pull or Pull() for pull in pulls]
    centres = cut_rows(
        [start if p.centre is None else p.centre for p, start in zip(own, starts, strict=True)], parameters
    )
    offsets: Sequence[Tensor | None] = [None] * len(parameters)
    if any(p.offset is not None for p in own):
        zeros = np.zeros_like(starts[0])
        offsets = cut_rows([zeros if p.offset is None else p.offset for p in own], parameters)
    strengths = torch.tensor([p.strength for p in own])
    return Nudge(
        [
            (one, strengths.to(one.device).view(-1, *(1,) * (one.ndim - 1)), centre, offset)
            for one, centre, offset in zip(parameters, centres, offsets, strict=True)
        ]
    )


def cut(vector: Vector, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector [P] into pieces of the tensors' shapes, on their devices."""
    flat = torch.from_numpy(np.array(vector, dtype=np.float32))
    pieces = flat.split_with_sizes([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape).to(tensor.device) for piece, tensor in zip(pieces, tensors, strict=True)]


def cut_rows(rows: Sequence[Vector], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Cut N vectors [P] into pieces of the shapes [N, ...] of N hospitals' parameters, on their devices."""
    flat = torch.from_numpy(np.array(rows, dtype=np.float32))
    pieces = flat.split_with_sizes([one[0].numel() for one in parameters], dim=1)
    return [piece.reshape(one.shape).to(one.device) for piece, one in zip(pieces, parameters, strict=True)]
