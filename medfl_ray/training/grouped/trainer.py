"""Many small hospitals trained as convolution groups of one network; each one's mathematics is its own.

They start from the same weights, or each from its own, and draw their batches exactly as they would alone. A hospital
whose batch is smaller is padded with samples of weight 0; one that needs fewer steps is read out after its last step
and what the network does with it afterwards is thrown away. So no step of one hospital depends on another.

Shapes: N hospitals, B patients of a batch, K patches of a patient, C channels, L output channels, S voxels
per axis, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from medfl_ray.errors import ModelError
from medfl_ray.models.grouped import group, repeat_weights, why_not_grouped
from medfl_ray.models.quick_layers import quicken
from medfl_ray.params import Vector, is_finite
from medfl_ray.training.batches import drawn_batches
from medfl_ray.training.gradients.patient_gradients import Patient, forward
from medfl_ray.training.grouped.group_forming import form_groups
from medfl_ray.training.grouped.private_hospitals import Private, PrivateHospitals
from medfl_ray.training.local_data import LocalData
from medfl_ray.training.losses import loss_of_each
from medfl_ray.training.optimizers import make_optimizer
from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome
from medfl_ray.training.rules.pull import cut_rows, nudge_of_group
from medfl_ray.training.trainer import Trainer


@dataclass(frozen=True, eq=False)
class HospitalTask:
    """One hospital of a group: its patients, what it is to do, and weights [P] of its own to start from, if any."""

    data: LocalData
    job: LocalJob
    start: Vector | None = None

    @property
    def kind(self) -> tuple[bool, float, list[str]]:
        """What hospitals of one group have in common: privacy, learning rate, frozen tensors."""
        return self.job.mechanism is not None, self.job.learning_rate, sorted(self.job.frozen)


class GroupedTrainer:
    """Trains hospitals in groups of one trainer's network, or one after the other where that cannot be grouped."""

    def __init__(self, trainer: Trainer, group_size: int) -> None:
        """Take the number of hospitals that are trained at once, at least 1; 1 trains them in turn."""
        self._trainer = trainer
        self._group_size = group_size
        self._members: nn.Module | None = None
        self.why_in_turn = "" if group_size > 1 else "training.hospitals_per_group is 1"
        if not self.why_in_turn:
            self.why_in_turn = why_not_together(trainer)

    @property
    def group_size(self) -> int:
        """How many hospitals are trained at once."""
        return 1 if self.why_in_turn else self._group_size

    def train(self, weights: Vector, tasks: Sequence[HospitalTask]) -> Iterator[tuple[int, LocalOutcome]]:
        """Yield (position in `tasks`, outcome) of every hospital, in no particular order.

        Raises:
          ModelError, LabelError, NotFitForDP: what training raises; hospitals that were yielded before are done.
        """
        together = [i for i, task in enumerate(tasks) if self._goes_together(task)]
        for position in sorted(set(range(len(tasks))) - set(together)):
            task = tasks[position]
            start = weights if task.start is None else task.start
            yield position, self._trainer.train(start, task.data, task.job)
        by_kind = sorted(together, key=lambda i: tasks[i].kind)
        for (private, *_), same in groupby(by_kind, key=lambda i: tasks[i].kind):
            kind = list(same)
            # Whom a private hospital draws is its secret; its groups follow from the number of steps alone.
            sizes = [(tasks[i].job.num_steps, 0 if private else tasks[i].data.num_train_patients) for i in kind]
            for positions in form_groups(sizes, self._group_size, self._trainer.training.batch_size):
                some = [kind[position] for position in positions]
                outcomes = self._train_group(weights, [tasks[i] for i in some])
                yield from zip(some, outcomes, strict=True)

    def _goes_together(self, task: HospitalTask) -> bool:
        if self.group_size == 1 or task.job.num_steps < 1:
            return False
        # Asked for the size, the trainer has also proven that its network keeps patients apart.
        return task.job.mechanism is None or self._trainer.group_size() > 1

    def _train_group(self, weights: Vector, tasks: Sequence[HospitalTask]) -> list[LocalOutcome]:
        trainer = self._trainer
        trainer.flat_weights.load(weights)
        steps = [task.job.num_steps for task in tasks]
        starts = [weights if task.start is None else task.start for task in tasks]
        final = np.empty((len(tasks), trainer.layout.size), dtype=np.float32)
        with ExitStack() as stack:
            group_of = self._private_group if tasks[0].job.mechanism is not None else self._plain_group
            hospitals = group_of(tasks, [stack.enter_context(trainer.random_numbers(task.job)) for task in tasks])
            parameters = hospitals.parameters
            if any(task.start is not None for task in tasks):
                load_rows(parameters, starts)
            nudge = nudge_of_group([task.job.pull for task in tasks], starts, parameters)
            is_frozen = [name in tasks[0].job.frozen for name in trainer.layout.names]
            optimizer = make_optimizer(trainer.training, parameters, tasks[0].job.learning_rate)
            for step in range(max(steps)):
                gradients = hospitals.gradients([step < todo for todo in steps])
                for parameter, gradient, frozen in zip(parameters, gradients, is_frozen, strict=True):
                    parameter.grad = None if frozen else gradient
                if nudge is not None:
                    nudge.add_to_gradients()
                optimizer.step()
                done = [i for i, todo in enumerate(steps) if todo == step + 1]
                if done:
                    final[done] = torch.cat([p.detach()[done].flatten(1) for p in parameters], 1).numpy(force=True)
        return [
            _outcome(row, start, task, losses)
            for row, start, task, losses in zip(final, starts, tasks, hospitals.losses, strict=True)
        ]

    def _plain_group(self, tasks: Sequence[HospitalTask], rngs: Sequence[np.random.Generator]) -> PlainHospitals:
        draws = [drawn_batches(self._trainer.training, task.data, rng) for task, rng in zip(tasks, rngs, strict=True)]
        return PlainHospitals(self._trainer, self._load_members(len(tasks)), draws)

    def _private_group(self, tasks: Sequence[HospitalTask], rngs: Sequence[np.random.Generator]) -> PrivateHospitals:
        trainer = self._trainer
        hospitals: list[Private] = []
        for task, rng in zip(tasks, rngs, strict=True):
            trainer.refuse_unfit(task.job)
            assert task.job.mechanism is not None
            hospitals.append((task.data, task.job.mechanism, rng))
        return PrivateHospitals(trainer, self._load_members(1), trainer.group_size(), hospitals)

    def _load_members(self, count: int) -> nn.Module:
        if self._members is None:
            self._members = group(self._trainer.network, count)
            if self._trainer.device.type == "cpu":
                quicken(self._members)
        repeat_weights(self._trainer.network, self._members, count)
        return self._members.train()


class PlainHospitals:
    """Current weights of N hospitals and the gradient of each of their steps, without DP."""

    def __init__(self, trainer: Trainer, members: nn.Module, draws: Sequence[Iterator[list[Patient]]]) -> None:
        """Take the batches of each hospital, without end."""
        self._trainer, self._members, self._draws = trainer, members, draws
        self.parameters: list[nn.Parameter] = list(members.parameters())
        self.losses: list[list[float]] = [[] for _ in draws]

    def gradients(self, active: Sequence[bool]) -> Sequence[Tensor]:
        """Return the gradients of one step, each [N, ...]; zeros for a hospital that is not active."""
        own = self._losses([next(draw) if works else [] for draw, works in zip(self._draws, active, strict=True)])
        gradients = torch.autograd.grad(own.sum(), self.parameters)
        for losses, loss, works in zip(self.losses, own.tolist(), active, strict=True):
            if works:
                losses.append(loss)
        return gradients

    def _losses(self, batches: Sequence[Sequence[Patient]]) -> Tensor:
        """Return each hospital's mean loss over its own patients, [N]; 0 for one that has none left."""
        most, count = max(len(batch) for batch in batches), len(batches)
        images, targets = (_pad(batches, most, i) for i in (0, 1))
        self._trainer.check_labels(targets)
        images, targets = images.to(self._trainer.device), targets.to(self._trainer.device)
        num_patches = images.shape[2]
        weight = torch.tensor(
            [[1 / len(batch) if place < len(batch) else 0.0 for batch in batches] for place in range(most)],
            device=images.device,
        )
        logits = forward(self._members, images.transpose(2, 1).flatten(0, 2), self._trainer.training.mixed_precision)
        logits = logits.view(most, num_patches, count, *logits.shape[1:]).transpose(1, 2).flatten(0, 1)
        each = loss_of_each(self._trainer.loss)(logits, targets.flatten(0, 1))
        return (each.view(most, count) * weight).sum(0)


def why_not_together(trainer: Trainer) -> str:
    """Return the first reason why hospitals cannot be trained as groups of a trainer's network, empty if they can."""
    network = trainer.network
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in network.modules()):
        return "the network drops units out at random, which each hospital draws for itself"
    if trainer.training.trainable != "all":
        return f"training.trainable is {trainer.training.trainable!r}, which groups do not know"
    if list(network.state_dict()) != [name for name, _ in network.named_parameters()]:
        return "the network has buffers, which the members of a group would share"
    return why_not_grouped(network)


def load_rows(parameters: Sequence[nn.Parameter], rows: Sequence[Vector]) -> None:
    """Give each of N hospitals its own weights [P], in place; the parameters are [N, ...]."""
    with torch.no_grad():
        for parameter, own in zip(parameters, cut_rows(rows, parameters), strict=True):
            parameter.copy_(own)


def _outcome(row: Vector, start: Vector, task: HospitalTask, losses: Sequence[float]) -> LocalOutcome:
    delta = row - start
    if not is_finite(delta):
        raise ModelError("training diverged: the weights are no longer finite; lower training.learning_rate")
    return LocalOutcome(delta, task.job.num_steps, float(np.mean(losses)) if losses else float("nan"))


def _pad(batches: Sequence[Sequence[Patient]], most: int, which: int) -> Tensor:
    """Stack images or targets [K, ...] of N batches into [B, N, K, ...], with zeros where a batch is shorter."""
    nothing = torch.zeros_like(next(batch[0] for batch in batches if batch)[which])
    rows = [batch[place][which] if place < len(batch) else nothing for place in range(most) for batch in batches]
    return torch.stack(rows).view(most, len(batches), *nothing.shape)
