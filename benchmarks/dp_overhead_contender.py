"""The contenders of dp_overhead.py, each in a process of its own, where it takes a timed step whenever it is told to.

Shapes: N patients of a batch, one patch each.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import monai.networks.nets.basic_unet  # noqa: F401 - loaded once, before the processes are forked
import numpy as np
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.messages import Mechanism
from medfl_ray.models.catalogue import build_network
from medfl_ray.privacy.dpsgd import PatientGradientSum
from medfl_ray.privacy.noise import GaussianNoise
from medfl_ray.training.gradients.engine_choice import choose_group_size, engine_of, make_patient_like
from medfl_ray.training.gradients.patient_gradients import GradientEngine, InGroups, OneAtATime, Patient
from medfl_ray.training.losses import dice_ce
from medfl_ray.training.optimizers import make_optimizer

Step = Callable[[], None]
NUM_CLASSES = 2
SMALLEST_EDGE = 16
CLIP = 0.1
LEARNING_RATE = 1e-6  # the weights hardly move: every step does the same work
TRAINING = TrainingConfig()


class NoNoise(GaussianNoise):
    """The noise is timed apart, for every contender."""

    def draw(self, size: int, std: float) -> Any:
        """Return zeros."""
        return np.zeros(size)


class LossPerPatient:
    """The product's default loss of each patient, in the form that Opacus asks of a criterion."""

    def __init__(self) -> None:
        self.reduction = "mean"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over patients, or with reduction 'none' the loss of each, [N]."""
        losses = torch.stack([dice_ce(logits[i : i + 1], targets[i : i + 1]) for i in range(len(targets))])
        return losses.mean() if self.reduction == "mean" else losses


@dataclass(frozen=True)
class Size:
    """What a step works on: the network's features, patches of `edge` voxels per axis and a batch of patients."""

    features: tuple[int, ...]
    edge: int
    num_dims: int
    batch: int


class Case:
    """A network and a batch of made-up patients, the same for every contender."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        patch = (size.edge,) * size.num_dims
        model = ModelConfig(type="basic_unet", features=size.features, norm="group")
        self.network = build_network(model, size.num_dims, 1, NUM_CLASSES, True, patch)
        self.parameters = list(self.network.parameters())
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters)
        self.images = torch.randn(size.batch, 1, *patch)
        self.targets = torch.randint(0, NUM_CLASSES, (size.batch, *patch))
        self.optimizer = make_optimizer(TRAINING, self.parameters, LEARNING_RATE)
        self.note = ""

    @property
    def patients(self) -> list[Patient]:
        """Images and targets of each."""
        return list(zip(self.images.split(1), self.targets.split(1), strict=True))


def plain(case: Case) -> Step:
    """The ordinary training step."""
    loss = LossPerPatient()

    def step() -> None:
        case.optimizer.zero_grad()
        loss(case.network(case.images), case.targets).backward()
        case.optimizer.step()

    return step


def ours(case: Case) -> Step:
    """The engine that training would choose here."""

    def make_patient() -> Patient:
        return make_patient_like((1, *case.images.shape[1:]), NUM_CLASSES, False, case.images.device)

    size = choose_group_size("auto", case.network, dice_ce, False, make_patient)
    case.note = "patient by patient" if size == 1 else f"groups of {size}"
    return private_step(case, engine_of(size, case.network, dice_ce, False))


def ours_single(case: Case) -> Step:
    """Patient by patient."""
    return private_step(case, OneAtATime(case.network, dice_ce))


def ours_grouped(case: Case) -> Step:
    """The whole batch as one group."""
    return private_step(case, InGroups(case.network, dice_ce, group_size=len(case.images)))


def private_step(case: Case, engine: GradientEngine) -> Step:
    """The step of training/trainer.py: gradients, clipped sum, mean, optimizer."""
    num_patients = len(case.images)
    mechanism = Mechanism(
        noise_multiplier=1.0,
        sample_rate=1.0,
        max_grad_norm=CLIP,
        num_steps=1,
        num_patients=num_patients,
        delta=1e-5,
    )
    total = PatientGradientSum(case.num_parameters, mechanism, NoNoise())
    sizes = [parameter.numel() for parameter in case.parameters]

    def step() -> None:
        case.optimizer.zero_grad()
        for gradient, _ in engine(iter(case.patients)):
            total.add(gradient)
        pieces = torch.split(total.release().to(torch.float32), sizes)
        for parameter, piece in zip(case.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        case.optimizer.step()

    return step


def opacus(mode: str) -> Callable[[Case], Step]:
    """Opacus with its own optimizer and a noise multiplier of 0, for which it draws nothing."""

    def build(case: Case) -> Step:
        private: Any = PrivacyEngine().make_private(
            module=case.network,
            optimizer=case.optimizer,
            criterion=LossPerPatient(),
            data_loader=DataLoader(TensorDataset(case.images, case.targets), batch_size=len(case.images)),
            noise_multiplier=0.0,
            max_grad_norm=CLIP,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        network, optimizer, *criterion = private[:-1]
        loss = criterion[0] if criterion else LossPerPatient()

        def step() -> None:
            optimizer.zero_grad()
            loss(network(case.images), case.targets).backward()
            optimizer.step()

        return step

    return build


def noise(case: Case) -> Step:
    """What a step's noise costs: drawn for all parameters and added."""
    source, total = GaussianNoise(), torch.zeros(case.num_parameters, dtype=torch.float64)

    def step() -> None:
        total.add_(torch.from_numpy(source.draw(case.num_parameters, 1e-12)))

    return step


CONTENDERS: dict[str, Callable[[Case], Step]] = {
    "plain": plain,
    "ours": ours,
    "ours_single": ours_single,
    "ours_grouped": ours_grouped,
    "opacus_hooks": opacus("hooks"),
    "opacus_functorch": opacus("functorch"),
    "opacus_ghost": opacus("ghost"),
    "noise": noise,
}


def gradient_print(network: nn.Module) -> list[float]:
    """Return three numbers of the step's gradient by which contenders can be compared; zeros where it has none."""
    parts = [p.grad.detach().double().flatten() for p in network.parameters() if p.grad is not None]
    flat = torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64)
    waves = torch.arange(len(flat), dtype=torch.float64)
    return [float(flat.norm()), float(flat @ torch.sin(waves)), float(flat @ torch.cos(waves))]


def memory_bytes(name: str) -> int:
    """Return VmRSS (now) or VmHWM (the most) of this process; without Linux's files the most since its start."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


@dataclass(frozen=True)
class Ready:
    """A contender has taken its first step, or why not."""

    gradient: Sequence[float] = ()
    failure: str = ""
    note: str = ""


def serve(name: str, size: Size, link: Connection) -> None:
    """Build a contender and its case, then take a step for each "step" and answer (wall, processor) seconds; answer
    "peak" by the most bytes above those held before the contender was built."""
    parent = os.getppid()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Code that a first pass loads is no contender's memory.
    plain(Case(Size(size.features, SMALLEST_EDGE, size.num_dims, 1)))()
    case = Case(size)
    with contextlib.suppress(OSError):  # forget the highest memory so far
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = memory_bytes("VmRSS")
    try:
        step = CONTENDERS[name](case)
        step()
    except Exception as error:  # noqa: BLE001 - a contender's failure is a result, whatever it is
        link.send(Ready(failure=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
        return
    link.send(Ready(gradient_print(case.network), note=case.note))
    while (told := _hear(link, parent)) != "end":
        if told == "peak":
            link.send(memory_bytes("VmHWM") - before)
            continue
        wall, processor = time.perf_counter(), time.process_time()
        step()
        link.send((time.perf_counter() - wall, time.process_time() - processor))


def _hear(link: Connection, parent: int) -> str:
    """Return what is said next, or "end" once the parent is gone: the pipe stays open in this process's siblings."""
    while not link.poll(5):
        if os.getppid() != parent:
            return "end"
    return str(link.recv())
