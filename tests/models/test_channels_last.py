"""The quick twin: the network's own parameters, values and gradients, with channels side by side in memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from medfl_ray.config.model import ModelConfig
from medfl_ray.models.catalogue import CATALOGUE, build_network
from medfl_ray.models.channels_last import (
    ORDERS,
    ChannelsLastGroupNorm,
    PointwiseConvolution,
    channels_last_copy,
    keeps_order,
)
from medfl_ray.models.grouped import group

FEATURES = {"segresnet": (8, 16), "swin_unetr": (12,), "densenet": (8, 16), "unetr": (8, 16)}


def make_network(name, spatial_dims=3, norm="group"):
    torch.manual_seed(0)
    model = ModelConfig(type=name, features=FEATURES.get(name, (8, 16, 16)), norm=norm)
    return build_network(model, spatial_dims, 1, 2, False, (32,) * spatial_dims)


def gradients(network, images, parameters, mixed_precision=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
        out = network(images)
    out = out.float()
    loss = (out * torch.linspace(-1, 1, out[0].numel()).view(out[0].shape).cos()).square().mean()
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)]), out.detach()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "spatial_dims"), [(name, dims) for name, entry in CATALOGUE.items() for dims in entry.spatial_dims]
)
def test_the_twin_computes_what_the_network_does(name, spatial_dims):
    network = make_network(name, spatial_dims)
    images = torch.randn(2, 1, *(32,) * spatial_dims)
    expected, logits = gradients(network, images, list(network.parameters()))
    twin = channels_last_copy(network, on_cpu=True)
    own = [value.data_ptr() for value in network.parameters()]
    assert [value.data_ptr() for value in twin.parameters()] == own
    assert [key for key, _ in twin.named_parameters()] == [key for key, _ in network.named_parameters()]
    found, twin_logits = gradients(twin, images, list(network.parameters()))
    assert relative(twin_logits, logits) < 1e-5
    # Both are as exact as float32 is; a voxel within that of a rectifier's kink may still fall on its other side.
    assert relative(found, expected) < 5e-4
    again, _ = gradients(network, images, list(network.parameters()))
    assert relative(again, expected) < 5e-4


@pytest.mark.parametrize(
    ("name", "spatial_dims"), [(name, dims) for name, entry in CATALOGUE.items() for dims in entry.spatial_dims]
)
def test_an_exact_twin_computes_the_same_bits(name, spatial_dims):
    network = make_network(name, spatial_dims)
    images = torch.randn(2, 1, *(32,) * spatial_dims)
    parameters = list(network.parameters())
    expected, logits = gradients(network, images, parameters)
    found, twin_logits = gradients(channels_last_copy(network, on_cpu=True, same_bits=True), images, parameters)
    assert torch.equal(twin_logits, logits)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_convolutional_networks_have_their_channels_side_by_side(spatial_dims):
    twin = channels_last_copy(make_network("basic_unet", spatial_dims), on_cpu=True)
    norms = [module for module in twin.modules() if "GroupNorm" in type(module).__name__]
    assert norms
    assert {type(norm) for norm in norms} == {ChannelsLastGroupNorm}
    seen = []
    for norm in norms:
        norm.register_forward_hook(
            lambda _module, inputs, _out: seen.append(inputs[0].is_contiguous(memory_format=ORDERS[spatial_dims + 2]))
        )
    twin(torch.randn(2, 1, *(32,) * spatial_dims))  # of a single sample the strides do not tell
    assert len(seen) == len(norms)
    assert all(seen)


def test_members_of_a_group_have_their_weights_in_plain_order_all_the_same():
    network = make_network("basic_unet", 2)
    channels_last_copy(network, on_cpu=True)
    assert any(not weight.is_contiguous() for weight in network.parameters())
    assert all(weight.is_contiguous() for weight in group(network, 3).parameters())


@pytest.mark.parametrize(
    ("name", "spatial_dims", "norm"),
    [("basic_unet", 2, "instance"), ("unetr", 3, "group"), ("basic_unet", 3, "instance")],
)
def test_other_networks_keep_their_order(name, spatial_dims, norm):
    network = make_network(name, spatial_dims, norm)
    assert not keeps_order(network)
    twin = channels_last_copy(network, on_cpu=True)
    assert not any(isinstance(module, ChannelsLastGroupNorm) for module in twin.modules())


def test_on_a_gpu_the_network_is_its_own_twin():
    network = make_network("basic_unet")
    assert channels_last_copy(network, on_cpu=False) is network


@pytest.mark.parametrize("shape", [(2, 16, 48, 48, 48), (3, 8, 96, 80), (1, 6, 20, 20, 20)])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_group_norm_over_many_voxels_is_as_exact_as_float32(shape, mean):
    layer = torch.nn.GroupNorm(2, shape[1])
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0)
        layer.bias.uniform_(-1.0, 1.0)
    images = (mean + torch.randn(shape)).contiguous(memory_format=ORDERS[len(shape)]).requires_grad_()
    change = torch.randn(shape)
    parameters = [images, layer.weight, layer.bias]
    out = ChannelsLastGroupNorm(layer)(images)
    wide = [value.detach().double().requires_grad_() for value in parameters]
    exact = torch.nn.functional.group_norm(wide[0], 2, *wide[1:], layer.eps)
    usual = torch.nn.functional.group_norm(images.contiguous(), 2, *parameters[1:], layer.eps)
    found, expected = (
        torch.autograd.grad(one, given, change.to(one)) for one, given in ((out, parameters), (exact, wide))
    )
    common = torch.autograd.grad(usual, parameters, change)
    assert (out - exact).abs().max() <= 4 * (usual - exact).abs().max()
    for own, other, truth in zip(found, common, expected, strict=True):
        assert relative(own, truth) <= 4 * relative(other, truth) + 1e-7


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_single_voxels_is_a_product_of_matrices_without_a_copy(spatial_dims, bias):
    kind = (torch.nn.Conv2d, torch.nn.Conv3d)[spatial_dims - 2]
    network = torch.nn.Sequential(kind(1, 6, 3, padding=1), kind(6, 3, 1, bias=bias))
    twin = channels_last_copy(network, on_cpu=True)
    assert type(twin[1]) is PointwiseConvolution
    images = torch.randn(2, 1, *(12,) * spatial_dims)
    parameters = list(network.parameters())
    found, twin_logits = gradients(twin, images, parameters)
    wide = copy.deepcopy(network).double()
    expected, logits = gradients(wide, images.double(), list(wide.parameters()))
    assert twin_logits.is_contiguous(memory_format=ORDERS[spatial_dims + 2])
    assert relative(twin_logits, logits) < 1e-5
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(
    "other", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"padding": "same"}, {"kernel_size": (1, 3)}]
)
def test_other_convolutions_stay_pytorchs(other):
    layer = torch.nn.Conv2d(4, 6, **({"kernel_size": 1} | other))
    twin = channels_last_copy(torch.nn.Sequential(layer), on_cpu=True)
    assert type(twin[0]) is torch.nn.Conv2d
    images = torch.randn(2, 4, 9, 9)
    np.testing.assert_allclose(twin(images).detach(), layer(images).detach(), rtol=1e-5, atol=1e-5)


def test_group_norm_over_few_voxels_and_of_vectors_is_pytorchs_own():
    layer = torch.nn.GroupNorm(2, 4)
    for shape in ((3, 4), (3, 4, 5000), (3, 4, 8, 8)):
        images = torch.randn(shape)
        assert torch.equal(ChannelsLastGroupNorm(layer)(images), layer(images))


def test_group_norm_in_bfloat16_is_near_the_one_in_float32():
    layer = torch.nn.GroupNorm(4, 16)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0)
    quick, exact = ChannelsLastGroupNorm(layer), copy.deepcopy(layer).double()
    images = (3 + torch.randn(2, 16, 18, 17, 16)).contiguous(memory_format=torch.channels_last_3d)
    change = torch.randn_like(images)
    answers = []
    for norm, kind in ((exact, torch.float64), (quick, torch.float32), (quick, torch.bfloat16)):
        x = images.to(kind, copy=True).requires_grad_()
        answers.append(torch.autograd.grad(norm(x), [x, norm.weight, norm.bias], change.to(kind)))
    for expected, found, rough in zip(*answers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert relative(rough.double(), expected) < 2e-2
