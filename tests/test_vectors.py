"""Flat vectors: what counts as a number, and a network beside one buffer."""

import numpy as np
import pytest
import torch

from medfl_ray.errors import UpdateRejected
from medfl_ray.params import FlatWeights, flatten, is_finite, load_into, tensors_of


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1.0, 3e38])
def test_numbers_of_any_size_are_finite(largest):
    assert is_finite(np.array([0.5, -largest, largest], np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("largest", [1.0, 3e38])
def test_one_element_that_is_no_number_is_found(bad, largest):
    assert not is_finite(np.array([largest, bad, -largest], np.float32))


def test_a_buffer_beside_a_network_copies_as_load_and_flatten_do():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2))
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2))
    network[0].weight.data = network[0].weight.data.contiguous(memory_format=torch.channels_last)
    beside, start = FlatWeights(tensors_of(network)), flatten(other)
    start.flags.writeable = False
    beside.load(start)
    assert np.array_equal(flatten(network), start)
    with torch.no_grad():
        network[0].weight *= 2
    change = beside.change_from(start)
    load_into(other, start)
    with torch.no_grad():
        other[0].weight *= 2
    assert np.array_equal(change, flatten(other) - start)
    beside.load(start)
    assert change.any()  # a copy of its own
    with pytest.raises(UpdateRejected, match=r"have shape \(3,\); this network needs"):
        beside.load(start[:3])
