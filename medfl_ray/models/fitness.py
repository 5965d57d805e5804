"""Whether a network is fit for patient-level DP: the gradient of one patient must depend on that patient alone.

What is looked at statically (layers, buffers, shared parameters) is told apart from what only a probe
shows (a parameter that takes no part, samples that influence each other).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from medfl_ray.errors import NotFitForDP
from medfl_ray.models.networks import replace_submodule

# Another sample may change how a kernel rounds, never more.
COUPLING_TOLERANCE = 1e-5


def check_fit_for_dp(network: nn.Module, probe: Tensor | None = None) -> None:
    """Refuse a network whose per-patient gradient is not a function of that patient alone.

    Args:
      probe: input [2, C, *S] to try the network on; without it only layers and buffers are looked at.

    Raises:
      NotFitForDP: in one sentence, the layer or parameter, why it is unfit and what to use instead.
    """
    _refuse_coupling_layers(network)
    _refuse_buffers(network)
    _refuse_shared_parameters(network)
    if probe is not None:
        _refuse_unused_parameters(network, probe)
        _refuse_coupled_samples(network, probe)


def _refuse_coupling_layers(network: nn.Module) -> None:
    for name, module in network.named_modules():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm):
            raise NotFitForDP(
                f"layer {name!r} is {kind}: its statistics mix patients; use GroupNorm or InstanceNorm instead"
            )
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            raise NotFitForDP(f"layer {name!r} keeps running statistics over patients; set track_running_stats=False")
        if getattr(module, "inplace", False) is True:
            raise NotFitForDP(
                f"layer {name!r} ({kind}) works in place, which breaks per-patient gradients; set inplace=False"
            )


def _refuse_buffers(network: nn.Module) -> None:
    persistent = network.state_dict(keep_vars=True)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, tensor in persistent.items():
        if name not in parameters:
            raise NotFitForDP(
                f"buffer {name!r} ({tensor.dtype}) would leave the hospital without noise; "
                "make it a constant (register_buffer with persistent=False) or remove it"
            )


def _refuse_shared_parameters(network: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            raise NotFitForDP(
                f"parameter {name!r} is the same tensor as {seen[id(parameter)]!r} and would be counted twice; "
                "give each layer its own parameter"
            )
        seen[id(parameter)] = name


def unused_parameters(network: nn.Module, probe: Tensor) -> list[str]:
    """Return the names of the parameters that get no gradient on a probe [N, C, *S]."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        gradients = torch.autograd.grad(network(probe).square().sum(), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


def drop_unused(network: nn.Module, probe: Tensor) -> None:
    """Replace by an identity every submodule none of whose parameters takes part, in place."""
    unused = set(unused_parameters(network, probe))
    for name, module in list(network.named_modules()):
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        if name and own and own <= unused:
            replace_submodule(network, name, nn.Identity())
            unused -= own


def work_out_of_place(network: nn.Module) -> None:
    """Switch every in-place activation of a network to its ordinary form."""
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010 - nn.Module declares no such attribute


def keep_constant_buffers_out(network: nn.Module) -> None:
    """Take integer buffers (constant index tables) out of the state dict, in place; nothing trains them."""
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_floating_point():
                delattr(module, name)
                module.register_buffer(name, buffer, persistent=False)


def _refuse_unused_parameters(network: nn.Module, probe: Tensor) -> None:
    unused = unused_parameters(network, probe)
    if unused:
        raise NotFitForDP(
            f"parameter {unused[0]!r} takes no part in the output and would only receive noise; remove it"
        )


def _refuse_coupled_samples(network: nn.Module, probe: Tensor) -> None:
    """Replace one sample and see whether the output of the other moves, as in training and with equal dropout."""
    was_training = network.training
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(probe.shape, generator=generator)
    second = first.clone()
    second[1:] = torch.randn(second[1:].shape, generator=generator)
    network.train()
    try:
        before, after = (_output_of_first(network, batch) for batch in (first, second))
    finally:
        network.train(was_training)
    if (before - after).abs().max().item() > COUPLING_TOLERANCE * max(1.0, before.abs().max().item()):
        raise NotFitForDP(
            "the network's output for one sample moves when another sample is replaced; "
            "use layers that treat samples apart"
        )


def _output_of_first(network: nn.Module, batch: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        output: Tensor = network(batch)[0]
        return output
