"""The grouped engine gives the reference's gradients, and is left alone where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.messages import Mechanism
from medfl_ray.models.catalogue import build_network
from medfl_ray.privacy.dpsgd import PatientGradientSum
from medfl_ray.training.gradients import engine_choice, patient_gradients
from medfl_ray.training.gradients.engine_choice import choose_engine, choose_group_size, make_patient_like
from medfl_ray.training.gradients.patient_gradients import GradientEngine, InGroups, OneAtATime, Patient
from medfl_ray.training.losses import dice_ce, make_loss

CPU = torch.device("cpu")


def network_of(name: str = "unet2d") -> nn.Module:
    torch.manual_seed(0)  # with some weights a voxel lies so near a rectifier's kink that rounding takes it across
    return build_network(ModelConfig.model_validate({"type": name, "features": (4, 8)}), 2, 2, 3, True, (32, 32))


def patients_of(num_patients: int, classification: bool = False) -> list[Patient]:
    torch.manual_seed(0)
    return [make_patient_like((2, 2, 32, 32), 3, classification, CPU) for _ in range(num_patients)]


class NoNoise:
    """Noise of zeros, so that a release is the clipped sum itself."""

    def draw(self, size: int, std: float) -> object:
        import numpy as np

        return np.zeros(size)


def clipped_sum(engine: GradientEngine, patients: list[Patient], network: nn.Module) -> Tensor:
    mechanism = Mechanism(noise_multiplier=1, sample_rate=1, max_grad_norm=0.5, num_steps=1, num_patients=1, delta=1e-5)
    total = PatientGradientSum(sum(p.numel() for p in network.parameters()), mechanism, NoNoise())  # type: ignore[arg-type]
    for gradient, _ in engine(iter(patients)):
        total.add(gradient)
    return total.release()


@pytest.mark.parametrize("name", ["unet2d", "segresnet", "dynunet", "attention_unet", "densenet"])
def test_same_clipped_sum(name: str) -> None:
    """Seven patients in groups of three: two whole groups and one that is smaller."""
    task = "classification" if name == "densenet" else "segmentation"
    network, patients = network_of(name), patients_of(7, task == "classification")
    loss = make_loss("dice_ce", task)  # type: ignore[arg-type]
    expected = clipped_sum(OneAtATime(network, loss), patients, network)
    found = clipped_sum(InGroups(network, loss, group_size=3), patients, network)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_groups_follow_the_network() -> None:
    network, patients = network_of(), patients_of(2)
    engine = InGroups(network, dice_ce)
    list(engine(iter(patients)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    losses = [loss for _, loss in engine(iter(patients))]
    assert losses == pytest.approx([loss for _, loss in OneAtATime(network, dice_ce)(iter(patients))], rel=1e-5)


def test_nobody_drawn() -> None:
    assert list(InGroups(network_of(), dice_ce)(iter([]))) == []


def choose(wanted: str, network: nn.Module) -> GradientEngine:
    return choose_engine(wanted, network, dice_ce, False, lambda: make_patient_like((1, 2, 32, 32), 3, False, CPU))  # type: ignore[arg-type]


def test_the_wish_is_followed_where_possible() -> None:
    network = network_of()
    assert isinstance(choose("single", network), OneAtATime)
    assert isinstance(choose("grouped", network), InGroups)
    assert isinstance(choose("auto", network), OneAtATime | InGroups)
    assert isinstance(choose("grouped", network_of("unetr")), OneAtATime)
    assert network.training


def test_a_network_that_is_grouped_wrongly_is_not_grouped() -> None:
    """Its head mixes the batch axis into the features, so grouped members would get each other's gradients."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(2, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out * (1.0 + out.mean(dim=0, keepdim=True))

    assert isinstance(choose("grouped", Mixes()), OneAtATime)


def measured(monkeypatch: pytest.MonkeyPatch, seconds_per_patient: dict[int, float]) -> list[int]:
    """Let each size take a given time, and return the list in which the sizes timed appear."""
    timed: list[int] = []

    def seconds(engine: GradientEngine, patients: list[Patient]) -> float:
        size = engine._group_size if isinstance(engine, InGroups) else 1
        timed.append(size)
        return seconds_per_patient[size] * len(patients)

    monkeypatch.setattr(engine_choice, "_seconds", seconds)
    return timed


def size_for(wanted: str, network: nn.Module, group_size: int | None = None) -> int:
    make = lambda: make_patient_like((1, 2, 32, 32), 3, False, CPU)  # noqa: E731
    return choose_group_size(wanted, network, dice_ce, False, make, group_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "wanted", "chosen", "tried"),
    [
        ({1: 1.0, 2: 0.8, 4: 0.6, 8: 0.4}, "auto", 8, [1, 2, 4, 8]),
        ({1: 1.0, 2: 0.8, 4: 0.79, 8: 0.1}, "auto", 2, [1, 2, 4]),
        ({1: 1.0, 2: 1.1, 4: 0.9, 8: 0.9}, "auto", 4, [1, 2, 4, 8]),
        ({1: 1.0, 2: 2.0, 4: 2.0, 8: 2.0}, "auto", 1, [1, 2, 4, 8]),
        ({2: 2.0, 4: 3.0, 8: 3.0}, "grouped", 2, [2, 4]),
    ],
)
def test_the_smallest_group_wins_that_is_not_clearly_beaten(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], wanted: str, chosen: int, tried: list[int]
) -> None:
    timed = measured(monkeypatch, seconds)
    assert size_for(wanted, network_of()) == chosen
    assert timed == tried


def test_measuring_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = measured(monkeypatch, {1: 1.0, 2: 0.5, 4: 0.2, 8: 0.1})
    monkeypatch.setattr(engine_choice, "MEASURING_S", 0.0)
    assert size_for("auto", network_of()) == 2
    assert timed == [1, 2]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_recorded_size_is_taken_without_measuring(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    timed = measured(monkeypatch, {})
    assert size_for("auto", network_of(), size) == size
    assert size_for("auto", network_of("unetr"), size) == 1  # which cannot be grouped
    assert timed == []


@pytest.mark.parametrize("engine", ["single", "grouped"])
def test_trainer_learns_with_either(engine: str) -> None:
    import numpy as np

    from medfl_ray.training.trainer import LocalJob, Trainer

    class Data:
        num_train_patients, labels, holdout = 6, {1: "a"}, ()

        def train_patches(self, patient_index: int, num_patches: int, rng: np.random.Generator) -> Patient:
            images = torch.from_numpy(rng.normal(size=(num_patches, 1, 16, 16)).astype(np.float32))
            return images, (images[:, 0] > 0).long()

    training = TrainingConfig.model_validate({"device": "cpu", "patient_gradients": engine})
    trainer = Trainer(ModelConfig(type="unet2d", features=(4, 8)), training, "segmentation", 2, 1, 2, (16, 16), True)
    mechanism = Mechanism(
        noise_multiplier=1e-3, sample_rate=0.9, max_grad_norm=1, num_steps=30, num_patients=6, delta=1e-5
    )
    start = trainer.initial_weights(0)
    first = trainer.train(start, Data(), LocalJob(1, 0.1, mechanism, ()))
    later = trainer.train(start, Data(), LocalJob(30, 0.1, mechanism, ()))
    assert later.mean_loss < first.mean_loss


def test_large_volumes_go_two_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger group would hold the activations of all its patients, and a large convolution gains nothing from it."""
    timed = measured(monkeypatch, {1: 1.0, 2: 0.1, 4: 0.1, 8: 0.1})
    monkeypatch.setattr(patient_gradients, "LARGE_PATIENT_VOXELS", 32 * 32)
    assert size_for("auto", network_of()) == 2
    assert timed == []
    assert size_for("single", network_of()) == 1
    assert size_for("grouped", network_of()) > 1
