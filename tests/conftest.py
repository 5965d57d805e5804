"""Fixtures for all tests: one thread per process, one Ray cluster per session."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from actors.cluster import secure_environment

secure_environment()  # before any test file imports Ray, which reads it once

import pytest  # noqa: E402


def pytest_report_header():
    """Say which part of the lists that are too long for every day runs."""
    from sampling import sample_number

    return f"part of the sampled lists: MEDFL_SAMPLE={sample_number()}"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Keep this process at one computing thread; two on a busy machine collapse."""
    import gc

    import torch

    torch.set_num_threads(1)
    gc.freeze()  # the libraries' objects stay; each collection that a test asks for would else look at all of them


@pytest.fixture(autouse=True)
def no_passages():
    """Let every test count the passages of a failpoint from zero."""
    yield
    from medfl_ray import failpoints

    failpoints._passages.clear()


@pytest.fixture(scope="session", autouse=True)
def state_of_the_tests(tmp_path_factory):
    """Keep ledgers and finished runs out of the user's own state folder, in the tests' child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray cluster of our own for all tests, on loopback and behind a token; it ends with the session."""
    from actors.cluster import connect, disconnect

    os.environ["RAY_metrics_report_interval_ms"] = "500"  # noqa: SIM112 - Ray's spelling; tests of metrics wait for it
    # Workers unpickle functions of the tests, whose modules import their neighbours.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    yield connect(num_cpus=2)
    disconnect()
