"""A user's own network: a function named in the configuration, called as the catalogue's builders are."""

from __future__ import annotations

from torch import nn

from medfl_ray.errors import ModelError
from medfl_ray.models.networks import NetworkArguments
from medfl_ray.named_code import named_function


def build_own_network(factory: str, request: NetworkArguments) -> nn.Module:
    """Import 'module:function' and return what function(spatial_dims, in_channels, out_channels) makes.

    The module has to be importable wherever a hospital runs. Its normalisation layers are left as they are.

    Raises:
      ModelError: the function cannot be imported, or does not return a network.
    """
    make = named_function(factory, "model.factory", "put the module on PYTHONPATH of every process", ModelError)
    network = make(request.spatial_dims, request.in_channels, request.out_channels)
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"model.factory {factory!r} returned a {type(network).__name__}; it must return a torch.nn.Module"
        )
    return network
