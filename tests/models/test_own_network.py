"""A network of the user's own goes through the same doors as the catalogue's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from medfl_ray.config.model import ModelConfig
from medfl_ray.errors import ModelError, NotFitForDP
from medfl_ray.models.catalogue import build_network

SOURCE = """
from torch import nn

def plain(spatial_dims, in_channels, out_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, out_channels, 1))

def coupled(spatial_dims, in_channels, out_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, out_channels, 1))

def nothing(spatial_dims, in_channels, out_channels):
    return "a network"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_networks_of_a_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_networks_of_a_test", None)
    return "my_networks_of_a_test"


def build(factory: str, for_dp: bool = True) -> torch.nn.Module:
    return build_network(ModelConfig(type="custom", factory=factory), 2, 1, 3, for_dp, (10, 10))


def test_it_is_built_with_the_channels_of_the_run(module: str) -> None:
    assert build(f"{module}:plain")(torch.zeros(2, 1, 10, 10)).shape == (2, 3, 10, 10)


def test_one_that_couples_patients_is_refused_for_dp_only(module: str) -> None:
    with pytest.raises(NotFitForDP):
        build(f"{module}:coupled")
    assert build(f"{module}:coupled", for_dp=False) is not None


@pytest.mark.parametrize(
    ("factory", "said"),
    [("no_such_module:f", "cannot be imported"), ("{}:absent", "cannot be imported"), ("{}:nothing", "returned a str")],
)
def test_what_is_wrong_is_said(module: str, factory: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        build(factory.format(module))


def test_type_and_factory_belong_together() -> None:
    with pytest.raises(ValidationError, match="belong together"):
        ModelConfig(type="custom")
    with pytest.raises(ValidationError, match="belong together"):
        ModelConfig(type="unet2d", factory="a:b")
