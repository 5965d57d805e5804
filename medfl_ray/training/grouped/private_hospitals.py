"""Private steps of several hospitals in lockstep: every (hospital, patient) pair is a member of one network.

A member computes with its hospital's current weights, and its gradient goes to that hospital's own sum, noise and
release. Nothing of one hospital enters another's step.

Shapes: H hospitals, M members of a pass, K patches of a patient, C channels, L output channels, S voxels per axis,
P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from medfl_ray.messages import Mechanism
from medfl_ray.models.grouped import stack
from medfl_ray.privacy.dpsgd import PrivateStep
from medfl_ray.training.gradients.patient_gradients import forward
from medfl_ray.training.local_data import LocalData
from medfl_ray.training.losses import loss_of_each
from medfl_ray.training.trainer import Trainer

Private = tuple[LocalData, Mechanism, np.random.Generator]
"""A hospital's patients, its mechanism, and secret random numbers for patches and augmentation."""


class PrivateHospitals:
    """Current weights of H hospitals and the noised gradient of each of their steps."""

    def __init__(self, trainer: Trainer, members: nn.Module, most: int, hospitals: Sequence[Private]) -> None:
        """Start all hospitals from the weights of the trainer's network; `most` is the largest M."""
        self._trainer, self._members, self._most = trainer, members, most
        self._hospitals = hospitals
        own = list(trainer.network.parameters())
        self.parameters = [nn.Parameter(one.detach().expand(len(hospitals), *one.shape).clone()) for one in own]
        self._sizes = [one.numel() for one in own]
        self._steps = [
            PrivateStep(mechanism, sum(self._sizes), data.num_train_patients) for data, mechanism, _ in hospitals
        ]
        self.losses: list[list[float]] = [[] for _ in hospitals]

    def gradients(self, active: Sequence[bool]) -> list[Tensor]:
        """Return the released gradients of one step, each [H, ...]; zeros for a hospital that is not active.

        A hospital that draws nobody releases its noise like any other; one that is not active releases nothing.

        Raises:
          LabelError: a target exceeds the network's output channels.
        """
        pairs = self._pairs(active)
        while some := list(islice(pairs, self._most)):
            self._add(some)
        flat = torch.zeros(len(active), sum(self._sizes))
        for row, step, works in zip(flat, self._steps, active, strict=True):
            if works:
                row.copy_(step.release())
        return [
            part.reshape(own.shape).to(own.device)
            for part, own in zip(torch.split(flat, self._sizes, 1), self.parameters, strict=True)
        ]

    def _pairs(self, active: Sequence[bool]) -> Iterator[tuple[int, int]]:
        for hospital, step in enumerate(self._steps):
            if active[hospital]:
                yield from ((hospital, int(index)) for index in step.draw())

    def _add(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Add the gradients of M patients to the sums of their hospitals."""
        trainer = self._trainer
        parameters = list(self._members.parameters())
        rows = torch.tensor([hospital for hospital, _ in pairs], device=trainer.device)
        for member, own in zip(parameters, self.parameters, strict=True):
            member.data = own.detach()[rows]
        patients = [self._draw(*pair) for pair in pairs]
        targets = torch.stack([truth for _, truth in patients])
        trainer.check_labels(targets)
        images = stack([image for image, _ in patients]).to(trainer.device)
        logits = forward(self._members, images, trainer.training.mixed_precision)
        own_logits = logits.view(-1, len(pairs), *logits.shape[1:]).transpose(0, 1)
        losses = loss_of_each(trainer.loss)(own_logits, targets.to(trainer.device))
        gradients = torch.autograd.grad(losses.sum(), parameters)
        for place, ((hospital, _), loss) in enumerate(zip(pairs, losses.tolist(), strict=True)):
            self._steps[hospital].add(gradient[place] for gradient in gradients)
            self.losses[hospital].append(loss)

    def _draw(self, hospital: int, index: int) -> tuple[Tensor, Tensor]:
        data, _, rng = self._hospitals[hospital]
        return data.train_patches(index, self._trainer.training.patches_per_patient, rng)
