"""Layers that couple patients are refused with the reason; a clean network of the user's own passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medfl_ray.errors import NotFitForDP
from medfl_ray.models.fitness import check_fit_for_dp, drop_unused

PROBE = torch.zeros(2, 1, 8, 8)


class CentresBatch(nn.Module):
    """Subtracts the batch's mean: coupling that no list of layer types can know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layer(x)
        return features - features.mean(dim=0, keepdim=True)


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 3, padding=1)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


class Idle(nn.Module):
    """A layer that the forward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


def test_an_ordinary_network_passes() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    check_fit_for_dp(network, PROBE)
    assert network.training


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "'1' is BatchNorm2d.*use GroupNorm or InstanceNorm"),
        (nn.SyncBatchNorm(2), "SyncBatchNorm"),
        (nn.InstanceNorm2d(1, affine=True, track_running_stats=True), "track_running_stats=False"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)), "in place.*inplace=False"),
        (Shared(), "'second.weight' is the same tensor as 'first.weight'"),
        (Idle(), "'idle.weight' takes no part"),
        (CentresBatch(), "moves when another sample is replaced"),
    ],
)
def test_what_couples_patients_is_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(NotFitForDP, match=message):
        check_fit_for_dp(network, PROBE)


def test_a_buffer_would_leave_without_noise() -> None:
    network = nn.Conv2d(1, 1, 3)
    network.register_buffer("seen", torch.zeros(1))
    with pytest.raises(NotFitForDP, match=r"'seen'.*persistent=False"):
        check_fit_for_dp(network)


def test_idle_layers_can_be_dropped() -> None:
    network = Idle()
    drop_unused(network, PROBE)
    check_fit_for_dp(network, PROBE)
