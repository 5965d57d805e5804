"""The probe catches what couples patients, and lets our own losses and networks through."""

from __future__ import annotations

import pytest
import torch
from monai.losses.dice import DiceLoss
from torch import Tensor, nn

from medfl_ray.config.model import ModelConfig
from medfl_ray.errors import NotFitForDP
from medfl_ray.models.catalogue import build_network
from medfl_ray.training.gradients.coupling import check_loss_apart, check_patients_apart
from medfl_ray.training.gradients.engine_choice import make_patient_like
from medfl_ray.training.gradients.patient_gradients import InGroups, OneAtATime, Patient
from medfl_ray.training.losses import LOSSES, dice_ce

SHAPE = (3, 4, 8, 8)


def made_up() -> Patient:
    return make_patient_like((2, 1, 16, 16), 2, False, torch.device("cpu"))


class RunningScale(nn.Module):
    """Divides by a running intensity that every patient moves: state that no buffer list shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 0.5 * self.scale + 0.5 * float(x.std())
        out: Tensor = self.layer(x / self.scale)
        return out


class SoftmaxOverBatch(nn.Module):
    """Mixes the samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layer(x), dim=0)


@pytest.mark.parametrize("engine", [OneAtATime, InGroups])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_networks_of_the_catalogue_keep_patients_apart(engine: type, dropout: float) -> None:
    network = build_network(ModelConfig(type="unet2d", features=(4, 8), dropout=dropout), 2, 1, 2, True, (16, 16))
    check_patients_apart(engine(network, dice_ce), made_up)


def test_a_state_between_patients_is_found() -> None:
    with pytest.raises(NotFitForDP, match="keeps a state between patients"):
        check_patients_apart(OneAtATime(RunningScale(), dice_ce), made_up)


def test_batch_norm_statistics_over_patients_are_found() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2))
    network.eval()
    network[1].train()
    check_patients_apart(OneAtATime(network, dice_ce), made_up)  # within one patient: no companion in the batch
    with pytest.raises(NotFitForDP, match="another patient is replaced"):
        check_patients_apart(_WholeBatch(network), made_up)


class _WholeBatch:
    """A planted defect: all patients in one batch, so that batch norm sees them together."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __call__(self, patients):  # type: ignore[no-untyped-def]
        some = list(patients)
        logits = self._network(torch.cat([images for images, _ in some]))
        for own, (_, targets) in zip(torch.split(logits, 2), some, strict=True):
            loss = dice_ce(own, targets)
            yield torch.autograd.grad(loss, list(self._network.parameters()), retain_graph=True), loss.item()


def test_mixing_in_a_group_is_found() -> None:
    with pytest.raises(NotFitForDP, match="another patient is replaced"):
        check_patients_apart(InGroups(SoftmaxOverBatch(), dice_ce), made_up)


def per_patient(logits: Tensor, targets: Tensor, name: str) -> Tensor:
    pairs = zip(logits[:, None].unbind(), targets[:, None].unbind(), strict=True)
    return torch.stack([LOSSES[name](own, truth) for own, truth in pairs]).mean()


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_within_a_patient_pass(name: str) -> None:
    check_loss_apart(lambda logits, targets: per_patient(logits, targets, name), SHAPE)


def test_plain_cross_entropy_passes() -> None:
    check_loss_apart(nn.CrossEntropyLoss(), SHAPE)


def batch_dice(logits: Tensor, targets: Tensor) -> Tensor:
    result: Tensor = DiceLoss(to_onehot_y=True, softmax=True, batch=True)(logits, targets[:, None])
    return result


@pytest.mark.parametrize(
    "loss",
    [
        batch_dice,
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 1.0, 2.0])),
        nn.CrossEntropyLoss(ignore_index=2),
    ],
)
def test_losses_over_a_batch_are_refused(loss: object) -> None:
    with pytest.raises(NotFitForDP, match="within each patient"):
        check_loss_apart(loss, SHAPE)  # type: ignore[arg-type]
