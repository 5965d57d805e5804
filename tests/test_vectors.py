"""Flat vectors: what counts as a number."""

import numpy as np
import pytest

from medfl_ray.params import is_finite


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1.0, 3e38])
def test_numbers_of_any_size_are_finite(largest):
    assert is_finite(np.array([0.5, -largest, largest], np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("largest", [1.0, 3e38])
def test_one_element_that_is_no_number_is_found(bad, largest):
    assert not is_finite(np.array([largest, bad, -largest], np.float32))
