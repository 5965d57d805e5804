"""Hostile uploads against a service in a process of its own: refused soon, in little memory, and it lives on."""

from __future__ import annotations

import gzip
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest
from hostile_uploads import HOSTILE

TESTS = Path(__file__).parents[1]
SECONDS, MEMORY_BYTES = 5.0, 512 * 1024**2
SEGMENT = "/v2/models/bright/segment"
LONG_FIELD = b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n" + b"y" * 10**6
HONEST = gzip.compress(nib.Nifti1Image(np.eye(6, dtype=np.float32)[..., None] * 500, np.eye(4)).to_bytes())


class Service:
    """A running service and how much memory its processes have."""

    def __init__(self, process: subprocess.Popen[str], client: httpx.Client) -> None:
        self.client, self._process = client, psutil.Process(process.pid)

    def resident(self) -> int:
        """Resident bytes of the service and of its readers; pages that forks share count once, in the largest."""
        own = self._process.memory_info().rss
        children = []
        for child in self._process.children(recursive=True):
            try:
                children.append(child.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        return own + max(children, default=0)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "clinic_service.py"), str(folder)],
        cwd=TESTS.parent, env={"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    port, token = process.stdout.readline().split()
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, trust_env=False) as client:
        deadline = time.monotonic() + 30
        while client.get("/v2/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Both the service's own libraries and the reader are loaded before anything is measured.
        assert client.post(SEGMENT, content=HONEST, timeout=60).status_code == 200
        yield Service(process, client)
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


class Watch:
    """The largest resident size of a service while a block runs."""

    def __init__(self, service: Service) -> None:
        self._service, self._over = service, threading.Event()
        self._before = self.peak = service.resident()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def growth(self) -> int:
        return self.peak - self._before

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.peak = max(self.peak, self._service.resident())


def test_there_are_many_of_them():
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_hostile_upload_is_refused(service, tmp_path, name):
    body = HOSTILE[name](tmp_path)
    with Watch(service) as watch:
        started = time.monotonic()
        answer = service.client.post(SEGMENT, content=body)
        seconds = time.monotonic() - started
    assert 400 <= answer.status_code < 500, answer.text
    message = answer.json()["error"]
    assert 20 < len(message) < 400, message
    assert "passwd" not in message
    assert str(tmp_path) not in message
    assert seconds < SECONDS
    assert watch.growth < MEMORY_BYTES
    assert service.client.get("/v2/health/live").status_code == 200


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong-token-wrong-token-wrong", "Basic Zm9vOmJhcg=="])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", SEGMENT), ("GET", "/v2/jobs/AAAAAAAAAAAAAAAAAAAAAA"), ("GET", "/info/"), ("POST", "/infer/bright"),
        ("PUT", "/session/"), ("GET", "/datastore/"), ("PUT", "/datastore/label"), ("GET", "/auth/token/valid"),
    ],
)  # fmt: skip
def test_a_wrong_token_gets_nowhere(service, method, path, authorization):
    answer = service.client.request(method, path, content=HONEST, headers={"Authorization": authorization})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Type": "multipart/form-data"}, HONEST),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"--x\r\nnonsense"),
        ({"Content-Type": "multipart/form-data; boundary=" + "x" * 5000}, HONEST),
        (
            {"Content-Type": "multipart/form-data; boundary=x"},
            LONG_FIELD,
        ),
        ({"Content-Encoding": "gzip"}, HONEST),
    ],
    ids=["no boundary", "no parts", "long boundary", "long field", "encoded"],
)
def test_a_damaged_request_is_refused(service, headers, body):
    started = time.monotonic()
    answer = service.client.post(SEGMENT, content=body, headers=headers)
    assert 400 <= answer.status_code < 500, answer.text
    assert time.monotonic() - started < SECONDS
    assert service.client.get("/v2/health/live").status_code == 200


def test_a_declared_size_over_the_limit_is_refused_before_the_body(service):
    address = (service.client.base_url.host, service.client.base_url.port)
    with socket.create_connection(address, timeout=SECONDS) as connection:
        lines = [
            f"POST {SEGMENT} HTTP/1.1", "Host: localhost", "Content-Length: 99999999999",
            f"Authorization: {service.client.headers['Authorization']}", "", "",
        ]  # fmt: skip
        connection.sendall("\r\n".join(lines).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_the_service_still_works(service):
    answer = service.client.post(SEGMENT, content=HONEST)
    assert answer.status_code == 200
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    assert np.array_equal(np.asarray(mask.dataobj)[..., 0], np.eye(6))
