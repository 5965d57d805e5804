"""Fixtures for all tests: one thread per process, one Ray cluster per session."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from actors.cluster import secure_environment

secure_environment()  # before any test file imports Ray, which reads it once

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Keep this process at one computing thread; two on a busy machine collapse."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def registry_of_the_tests(tmp_path_factory):
    """Keep finished runs out of the user's own registry, in the tests' child processes too."""
    os.environ["MEDFL_REGISTRY"] = str(tmp_path_factory.mktemp("registry"))
    yield
    del os.environ["MEDFL_REGISTRY"]


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray cluster of our own for all tests, on loopback and behind a token; it ends with the session."""
    from actors.cluster import connect, disconnect

    # Workers unpickle functions of the tests, whose modules import their neighbours.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    yield connect(num_cpus=2)
    disconnect()
