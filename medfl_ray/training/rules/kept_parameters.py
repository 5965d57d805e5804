"""Which parameters stay in a hospital while the others are shared: by strategy, or by patterns of their names.

The choice looks at the network alone and is the same at every hospital. Shapes: P values of the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from medfl_ray.errors import ModelError
from medfl_ray.params import Layout
from medfl_ray.training.trained_space import NORMS, names_of_last_layer


@dataclass(frozen=True, eq=False)
class KeptParameters:
    """Names of the tensors that stay in the hospital, of those that are shared, and the mask [P] of the former."""

    names: frozenset[str]
    shared: frozenset[str]
    mask: npt.NDArray[np.bool_]


def kept_parameters(
    network: nn.Module, layout: Layout, strategy: str, patterns: Sequence[str], probe: Tensor
) -> KeptParameters:
    """Return what stays in the hospital: what the patterns match, or without any what the strategy is known for.

    fedbn: scale, shift and statistics of normalisation layers (Li et al. 2021, arXiv:2102.07623). silobn: their
    statistics alone (Andreux et al. 2020). fedper, fedrep: the last layer (Arivazhagan et al. 2019, arXiv:1912.00818;
    Collins et al. 2021, arXiv:2102.07078).

    Args:
      probe: made-up image [1, C, *S] that shows which layer is the last to work.

    Raises:
      ModelError: a pattern matches nothing, the network has nothing of the kind, or nothing would be shared.
    """
    names = _matching(layout, patterns) if patterns else KEPT_BY_STRATEGY[strategy](network, layout, strategy, probe)
    kept = [name in names for name in layout.names]
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not trained - names:
        raise ModelError(
            f"aggregation.strategy {strategy!r} leaves every trained parameter in the hospital, so that nothing would "
            "be shared; narrow aggregation.local_parameters, or widen training.trainable"
        )
    sizes = [math.prod(shape) for shape in layout.shapes]
    return KeptParameters(frozenset(names), frozenset(layout.names) - names, np.repeat(kept, sizes))


def _matching(layout: Layout, patterns: Sequence[str]) -> set[str]:
    names: set[str] = set()
    for pattern in patterns:
        matched = {name for name in layout.names if fnmatchcase(name, pattern)}
        if not matched:
            raise ModelError(
                f"aggregation.local_parameters: {pattern!r} matches no parameter of the network; its parameters are "
                f"named like {layout.names[0]!r} and {layout.names[-1]!r}"
            )
        names |= matched
    return names


def last_layer(network: nn.Module, layout: Layout, strategy: str, probe: Tensor) -> set[str]:
    """Name the layer that is the last to work."""
    return names_of_last_layer(network, probe)


def norm_layers(network: nn.Module, layout: Layout, strategy: str, probe: Tensor) -> set[str]:
    """Name scale, shift and statistics of the normalisation layers."""
    of_norms = _names_of_norms(network, layout)
    if not of_norms:
        raise ModelError(f"aggregation.strategy {strategy!r}: the network has no normalisation layer with parameters")
    return of_norms


def norm_statistics(network: nn.Module, layout: Layout, strategy: str, probe: Tensor) -> set[str]:
    """Name the running statistics of the normalisation layers."""
    statistics = _names_of_norms(network, layout) - {name for name, _ in network.named_parameters()}
    if not statistics:
        raise ModelError(
            f"aggregation.strategy {strategy!r} keeps the running statistics of normalisation layers in the hospital "
            "and this network has none: group and instance norm take them from each image. Use fedbn, or fedavg, which "
            "is then the same"
        )
    return statistics


def _names_of_norms(network: nn.Module, layout: Layout) -> set[str]:
    norms = {name for name, module in network.named_modules() if isinstance(module, (*NORMS, _NormBase))}
    return {name for name in layout.names if name.rpartition(".")[0] in norms}


KEPT_BY_STRATEGY: dict[str, Callable[[nn.Module, Layout, str, Tensor], set[str]]] = {
    "fedbn": norm_layers,
    "silobn": norm_statistics,
    "fedper": last_layer,
    "fedrep": last_layer,
}
"""What stays in the hospital where no pattern names it, for every strategy that is `partial`."""
