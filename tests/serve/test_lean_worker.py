"""A replica's process goes on without pandas, resampling included."""

import subprocess
import sys
from pathlib import Path

import pytest

import serve.replicas.lean_worker

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from serve.replicas.lean_worker import without_pandas
without_pandas()
import numpy as np
import serve.replicas.deployments
assert sys.modules["pandas"] is None
for name in ("pyarrow", "torch", "monai", "highdicom", "serve.clinic.service", "serve.ingress"):
    assert name not in sys.modules, name
from medfl_ray.data.prepare.placement import place
placed, _ = place(np.ones((1, 8, 8, 8), np.float32), np.eye(4), "RAS", (2.0, 2.0, 2.0), "bilinear")
print(placed.shape)
"""


@pytest.mark.ci
def test_serve_and_resampling_work_without_pandas():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 4, 4, 4)"


def test_the_hook_names_the_function():
    assert serve.replicas.lean_worker.HOOK in serve.replicas.lean_worker.environment().values()
    module, _, name = serve.replicas.lean_worker.HOOK.rpartition(".")
    assert getattr(sys.modules[module], name) is serve.replicas.lean_worker.without_pandas
