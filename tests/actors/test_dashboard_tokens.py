"""A cluster with its dashboard: loopback only, and nothing for whoever has no token."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from ray_head import without_ray

pytestmark = pytest.mark.ci

PROCESS = Path(__file__).parent / "guarded_cluster.py"
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def guarded():
    """Where a cluster of our own with a dashboard listens."""
    with subprocess.Popen(
        [sys.executable, str(PROCESS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=without_ray()
    ) as process:
        where = json.loads(process.stdout.readline())
        yield {**where, "process": process.pid}
        process.stdin.close()
        assert process.wait(60) == 0


def test_everything_listens_on_loopback_the_metrics_port_included(guarded):
    listening = [
        connection.laddr
        for process in psutil.Process(guarded["process"]).children(recursive=True)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    ports = {address.port for address in listening}
    assert {address.ip for address in listening} <= LOOPBACK
    assert {guarded["metrics_port"], int(guarded["gcs"].rpartition(":")[2])} <= ports
    assert int(guarded["dashboard"].rpartition(":")[2]) in ports


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/jobs/"),
        ("POST", "/api/jobs/"),
        ("GET", "/api/version"),
        ("GET", "/nodes?view=summary"),
        ("GET", "/api/v0/actors"),
        ("GET", "/api/v0/logs"),
        ("GET", "/api/cluster_status"),
        ("GET", "/api/serve/applications/"),
        ("PUT", "/api/serve/applications/"),
        ("GET", "/api/data/datasets"),
    ],
)
def test_the_dashboards_routes_refuse_without_the_token(guarded, method, path):
    anyone = httpx.request(method, guarded["dashboard"] + path, json={"entrypoint": "true"})
    assert anyone.status_code == 401, anyone.text
    stranger = httpx.request(
        method,
        guarded["dashboard"] + path,
        headers={"Authorization": f"Bearer {'0' * 64}"},
        json={"entrypoint": "true"},
    )
    assert stranger.status_code == 403, stranger.text
    assert guarded["token"] not in anyone.text + stranger.text


def test_with_the_token_they_answer(guarded):
    headers = {"Authorization": f"Bearer {guarded['token']}"}
    jobs = httpx.get(guarded["dashboard"] + "/api/jobs/", headers=headers).json()
    assert [job for job in jobs if job["type"] != "DRIVER"] == []  # whoever started the cluster may be listed
