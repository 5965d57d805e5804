"""The network of a MONAI bundle, built from its definition: layers of MONAI and torch, and nothing else.

A definition names classes. Only subclasses of torch.nn.Module from monai.networks and torch.nn are made, so that a
configuration that came from elsewhere cannot run code of its choice.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from medfl_ray.errors import ModelError
from medfl_ray.models.networks import NetworkArguments

ALLOWED = ("monai.networks.", "torch.nn.")
KNOWN_KEYS = ("_target_", "_desc_")


def build_bundle_network(definition: Mapping[str, Any], request: NetworkArguments) -> nn.Module:
    """Build the network that a bundle defines; its normalisation layers are left as they are.

    Raises:
      ModelError: the definition names something else than a network of MONAI or torch, or does not fit the run.
    """
    for name, asked in (("spatial_dims", request.spatial_dims), ("out_channels", request.out_channels)):
        given = definition.get(name, asked)
        if given != asked:
            raise ModelError(f"the bundle's network has {name} {given}; the run needs {asked}")
    if definition.get("in_channels", request.in_channels) != request.in_channels:
        raise ModelError(
            f"the bundle's network takes {definition['in_channels']} image channels; the data have "
            f"{request.in_channels}"
        )
    network = _made(definition)
    if not isinstance(network, nn.Module):
        raise ModelError("the bundle's definition makes no network; it needs a _target_")
    return network


def _made(value: Any) -> Any:
    """Make every `_target_` inside a value, the innermost first."""
    if isinstance(value, list):
        return [_made(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "_target_" not in value:
        return {key: _made(item) for key, item in value.items()}
    unknown = [key for key in value if key.startswith("_") and key not in KNOWN_KEYS]
    if unknown:
        raise ModelError(f"the bundle's network uses {unknown[0]!r}, which is not taken here; leave it out")
    kind = allowed_class(str(value["_target_"]))
    arguments = {key: _made(item) for key, item in value.items() if key not in KNOWN_KEYS}
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise ModelError(f"the bundle's {kind.__name__} does not take its arguments: {error}") from None


def allowed_class(target: str) -> type[nn.Module]:
    """Return the layer or network that a definition names, in full or as a name of monai.networks.nets.

    Raises:
      ModelError: it is none of MONAI's networks or torch's layers.
    """
    path = target if "." in target else f"monai.networks.nets.{target}"
    module, _, name = path.rpartition(".")
    if f"{module}.".startswith(ALLOWED):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            found = None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ModelError(
        f"the bundle's network is made of {target!r}; only networks and layers of monai.networks and torch.nn are "
        "built from a bundle. For code of your own use model.type: custom"
    )
