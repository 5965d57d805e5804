"""Our own Ray cluster: on loopback, behind a token, and not mixed up with other people's packages."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from actors import cluster
from medfl_ray.errors import ClusterError


def test_every_port_of_our_cluster_is_on_loopback(ray_cluster):
    connections = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a worker that ended since
            connections += process.net_connections(kind="tcp")
    listening = [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, sorted(set(listening))


@pytest.mark.ci
def test_without_the_token_nobody_joins(ray_cluster):
    import ray

    address = ray.get_runtime_context().gcs_address
    script = f"import ray; ray.init(address={address!r}, logging_level=50)"
    environment = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    stranger = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert stranger.returncode != 0
    assert "InvalidAuthToken" in stranger.stdout + stranger.stderr


def test_a_foreign_package_of_our_name_is_named(monkeypatch, tmp_path):
    foreign = tmp_path / "tune"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tune", raising=False)  # ours, where an earlier test has imported it
    with pytest.raises(ClusterError, match=r"'tune'.*not to medfl-ray"):
        cluster.check_packages()


def test_our_own_packages_pass():
    assert cluster.check_packages() is None
    assert Path(cluster.__file__).parent.name == "actors"


def node(*resources, alive=True):
    return {"Alive": alive, "Resources": dict.fromkeys(("CPU", *resources), 1.0)}


@pytest.mark.parametrize(
    ("nodes", "loose"),
    [
        ([node()], ""),
        ([node(), node(alive=False)], ""),
        ([node("hospital:a"), node("hospital:b")], ""),
        ([node("hospital:a", "hospital:b"), node()], ""),
        ([node("hospital:a"), node()], "b"),
        ([node(), node()], "a, b"),
        ([node("hospital:a", "hospital:b"), node("hospital:b")], "b"),
    ],
)
def test_a_ledger_belongs_to_one_node(nodes, loose):
    if loose:
        with pytest.raises(ClusterError, match=f"2 nodes, and the ledger of {loose} lies on one"):
            cluster.check_pinned(["a", "b"], nodes)
    else:
        assert cluster.check_pinned(["a", "b"], nodes) is None


@pytest.mark.ci
def test_a_cluster_that_is_not_there_is_one_sentence():
    script = "from actors.cluster import connect; connect('127.0.0.1:1')"
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": "1", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "could not reach the Ray cluster at 127.0.0.1:1" in done.stderr
