"""MONAI is loaded without the libraries that training never calls, and they stay importable."""

import subprocess
import sys

import pytest

CODE = """
import sys
from medfl_ray.models.light_monai import UNUSED, load_monai
load_monai()
assert not [name for name in UNUSED if name in sys.modules], sys.modules.keys() & set(UNUSED)
import matplotlib, mlflow, optuna, pandas, sklearn.metrics
from monai.networks.nets import BasicUNet
from monai.transforms import Spacing
import torch
network = BasicUNet(spatial_dims=2, features=(4, 4, 4, 4, 4, 4))
print(tuple(network(torch.zeros(1, 1, 32, 32)).shape))
"""


@pytest.mark.ci
def test_monai_works_without_them_and_they_work_after_it():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 2, 32, 32)", done.stderr[-2000:]


def test_a_loaded_monai_is_left_alone():
    import monai

    from medfl_ray.models.light_monai import load_monai

    before = sys.modules["monai"]
    load_monai()
    assert sys.modules["monai"] is before is monai
