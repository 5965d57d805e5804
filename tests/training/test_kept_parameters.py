"""Which parameters stay in a hospital, found in real networks."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.errors import ModelError
from medfl_ray.params import layout_of
from medfl_ray.training.rules.kept_parameters import KeptParameters, kept_parameters
from medfl_ray.training.trainer import Trainer

EDGE = 16


def make_trainer(name: str = "unet2d", norm: str = "group", **training: object) -> Trainer:
    model = ModelConfig(type=name, features=(4, 8), spatial_dims=2, norm=norm)  # type: ignore[arg-type]
    settings = TrainingConfig(device="cpu", **training)  # type: ignore[arg-type]
    return Trainer(model, settings, "segmentation", 2, 1, 2, (EDGE, EDGE), False)


def kept(trainer: Trainer, strategy: str, *patterns: str) -> KeptParameters:
    AggregationConfig(strategy=strategy, local_parameters=patterns)
    return kept_parameters(trainer.network, trainer.layout, strategy, patterns, trainer.dummy_patient()[0][:1])


def of_type(network: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {
        f"{name}.{own}"
        for name, module in network.named_modules()
        if isinstance(module, kind)
        for own, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize(("norm", "kind"), [("group", nn.GroupNorm), ("instance", nn.InstanceNorm2d)])
def test_fedbn_keeps_every_normalisation_layer(norm: str, kind: type[nn.Module]) -> None:
    trainer = make_trainer(norm=norm)
    found = kept(trainer, "fedbn")
    assert found.names == of_type(trainer.network, kind)
    assert found.names | found.shared == set(trainer.layout.names)
    sizes = {name: parameter.numel() for name, parameter in trainer.network.named_parameters()}
    assert found.mask.sum() == sum(sizes[name] for name in found.names)
    assert found.mask.shape == (trainer.layout.size,)


@pytest.mark.parametrize("strategy", ["fedper", "fedrep"])
def test_the_last_layer_is_the_head(strategy: str) -> None:
    trainer = make_trainer()
    found = kept(trainer, strategy)
    layers = {name.rpartition(".")[0] for name in found.names}
    assert len(layers) == 1
    # The layer that gives the network's two output channels.
    assert dict(trainer.network.named_parameters())[f"{layers.pop()}.bias"].shape == (2,)


def test_patterns_name_what_stays() -> None:
    trainer = make_trainer()
    first = trainer.layout.names[0]
    found = kept(trainer, "fedper", first, "*.bias")
    assert found.names == {name for name in trainer.layout.names if name == first or name.endswith(".bias")}
    with pytest.raises(ModelError, match=r"'decoder\.\*' matches no parameter"):
        kept(trainer, "fedper", "decoder.*")


def test_something_has_to_be_shared() -> None:
    with pytest.raises(ModelError, match="nothing would be shared"):
        kept(make_trainer(), "fedper", "*")
    with pytest.raises(ModelError, match="nothing would be shared"):
        kept(make_trainer(trainable="last"), "fedper")


class Normalised(nn.Sequential):
    """A network with statistics that run along, in floating point only."""

    def __init__(self) -> None:
        norm = nn.BatchNorm2d(2)
        norm.num_batches_tracked = None
        super().__init__(nn.Conv2d(1, 2, 1), norm, nn.Conv2d(2, 2, 1))


def test_silobn_keeps_statistics_alone_and_says_so_where_there_are_none() -> None:
    network, probe = Normalised(), make_trainer().dummy_patient()[0][:1]
    layout = layout_of(network)
    found = kept_parameters(network, layout, "silobn", (), probe)
    assert found.names == {"1.running_mean", "1.running_var"}
    own = np.concatenate([np.full(one.numel(), "running" in name) for name, one in network.state_dict().items()])
    assert (found.mask == own).all()
    both = kept_parameters(network, layout, "fedbn", (), probe)
    assert both.names == found.names | {"1.weight", "1.bias"}
    with pytest.raises(ModelError, match="this network has none"):
        kept(make_trainer(), "silobn")
