"""The application on a real Ray cluster: promotion under load, lost replicas and hostile connections."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest
from local_service import wait_until_ready
from tiny_models import binary_request, json_request, promote, read_answer, write_model

from serve.auth import add_token
from serve.settings import ServeSettings

pytestmark = pytest.mark.ci
INFER = "/v2/models/tiny/infer"
NUM_REQUESTS = 100
LABELS_ONLY = {"outputs": [{"name": "labels", "parameters": {"binary_data": True}}]}


@dataclass(frozen=True)
class Deployed:
    """A service on Ray."""

    url: str
    port: int
    token: str
    models: Path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def client(self, timeout_s: float = 60) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=timeout_s, trust_env=False)


@pytest.fixture(scope="module")
def deployed(ray_cluster, tmp_path_factory) -> Iterator[Deployed]:
    """The application with a fast model of two versions and a slow one, on one replica of each kind."""
    from ray import serve as ray_serve

    from serve.launcher import http_options
    from serve.replicas.deployments import application

    folder = tmp_path_factory.mktemp("served")
    models = folder / "models"
    write_model(models / "tiny" / "1", mark=1)
    write_model(models / "tiny" / "2", mark=2)
    write_model(models / "slow" / "1", mark=3, name="slow", num_slow=100)
    promote(models, 1)
    settings = ServeSettings.model_validate(
        {
            "models": models, "tokens": folder / "tokens.json", "poll_s": 0.1, "voxels_per_batch": 4 * 8**3,
            "limits": {"burst": 10_000, "stall_timeout_s": 2},
        }
    )  # fmt: skip
    token = add_token(folder / "tokens.json", "test")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    ray_serve.start(http_options=http_options(settings, "127.0.0.1", port))
    ray_serve.run(application(settings), name="medfl")
    service = Deployed(f"http://127.0.0.1:{port}", port, token, models)
    with service.client() as client:
        wait_until_ready(client)
        while len(client.get("/v2/models").json()["models"]) < 2:
            time.sleep(0.1)
    yield service
    ray_serve.shutdown()


async def segment(client: httpx.AsyncClient, scan: bytes) -> tuple[int, str, set[int]]:
    """Send one volume of several windows; return its status, its version, and the classes in the mask."""
    answer = await client.post("/v2/models/tiny/segment", content=scan)
    if answer.status_code != 200:
        return answer.status_code, answer.text, set()
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content)).get_fdata()
    assert mask.shape == (17, 18, 19)
    return 200, answer.headers["X-Model-Version"], {int(value) // 10 for value in np.unique(mask)}


async def ask(client: httpx.AsyncClient, num_windows: int = 24) -> tuple[int, str, set[int]]:
    """Send one request of several batches; return its status, the version that it names, and the classes in it."""
    body, headers = binary_request((num_windows, 1, 8, 8, 8), **LABELS_ONLY)
    answer = await client.post(INFER, content=body, headers=headers)
    if answer.status_code != 200:
        return answer.status_code, answer.text, set()
    message, tensors = read_answer(answer.content, int(answer.headers["Inference-Header-Content-Length"]))
    assert message["model_version"] == answer.headers["X-Model-Version"]
    return 200, message["model_version"], {int(value) for value in np.unique(tensors["labels"])}


def test_no_request_fails_or_mixes_versions_while_a_model_is_promoted_and_rolled_back(deployed):
    over, scan = threading.Event(), nib.Nifti1Image(np.zeros((17, 18, 19), np.float32), np.eye(4)).to_bytes()

    def change() -> None:
        for count in range(1000):
            promote(deployed.models, 2 if count % 2 == 0 else 1)
            if over.wait(0.4):
                return

    async def load() -> list[tuple[int, str, set[int]]]:
        async with httpx.AsyncClient(
            base_url=deployed.url, headers=deployed.headers, timeout=60, trust_env=False,
            limits=httpx.Limits(max_connections=NUM_REQUESTS),
        ) as client:  # fmt: skip
            answers = []
            for _ in range(2):  # all of a wave are under way at once
                answers += await asyncio.gather(*(ask(client) for _ in range(NUM_REQUESTS)))
            return answers + await asyncio.gather(*(segment(client, scan) for _ in range(NUM_REQUESTS)))

    changing = threading.Thread(target=change)
    changing.start()
    try:
        answers = asyncio.run(load())
    finally:
        over.set()
        changing.join()
        promote(deployed.models, 1)
    assert [answer for answer in answers if answer[0] != 200] == []
    assert {version for _, version, _ in answers} == {"1", "2"}  # else nothing was tried
    assert [answer for answer in answers if answer[2] != {int(answer[1])}] == []


def kill_replica(deployment: str) -> None:
    import ray

    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if f"#{deployment}#" in a["name"]]
    assert names
    for name in names:
        ray.kill(ray.get_actor(name, namespace="serve"))


def slow_request(deployed: Deployed, answers: list[httpx.Response | httpx.TransportError]) -> threading.Thread:
    body, headers = binary_request((1, 1, 48, 48, 48), **LABELS_ONLY)

    def send() -> None:
        with deployed.client(timeout_s=100) as client:
            try:
                answers.append(client.post("/v2/models/slow/infer", content=body, headers=headers))
            except httpx.TransportError as error:
                answers.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_request_whose_model_replica_is_killed_is_sent_again(deployed):
    answers: list[httpx.Response | httpx.TransportError] = []
    threads = [slow_request(deployed, answers) for _ in range(3)]
    time.sleep(0.6)
    assert not answers  # they are under way
    kill_replica("models")
    for thread in threads:
        thread.join(100)
    assert [answer.status_code for answer in answers] == [200] * 3
    with deployed.client() as client:
        assert 'medfl_serve_retries_total{model="slow"}' in client.get("/metrics").text


def test_a_request_whose_ingress_is_killed_fails_clearly_and_the_service_comes_back(deployed):
    answers: list[httpx.Response | httpx.TransportError] = []
    thread = slow_request(deployed, answers)
    time.sleep(0.4)
    kill_replica("ingress")
    started = time.monotonic()
    thread.join(60)
    assert len(answers) == 1
    assert time.monotonic() - started < 30
    assert not isinstance(answers[0], httpx.Response) or answers[0].status_code >= 500
    with deployed.client() as client:
        wait_until_ready(client, 60)
        assert client.post(INFER, json=json_request()).status_code == 200


def raw(deployed: Deployed, content: bytes, wait_s: float = 5) -> bytes:
    """Send bytes and return what comes back within a time; the connection stays open on our side."""
    with socket.create_connection(("127.0.0.1", deployed.port), timeout=wait_s) as connection:
        connection.sendall(content)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
                if b"\r\n\r\n" in received:
                    return received
        except (TimeoutError, ConnectionError):
            pass  # what came until then is looked at
        return received


def head(deployed: Deployed, *lines: str, path: str = INFER) -> bytes:
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {deployed.token}", *lines, "", ""]
    ).encode("latin-1")


def test_hostile_connections_are_refused_within_five_seconds(deployed):
    started = time.monotonic()
    cases = {
        "a body that stops": (head(deployed, "Content-Length: 5000") + b"{", b" 408 "),
        "a body over the limit": (head(deployed, f"Content-Length: {2**40}"), b" 413 "),
        "a length that is no number": (head(deployed, "Content-Length: many"), b" 400 "),
        "huge headers": (head(deployed, f"X-Long: {'a' * 60_000}", "Content-Length: 0"), b" 413 "),
        "a token of another kind": (head(deployed, "Content-Length: 0").replace(b"Bearer", b"Basic"), b" 401 "),
        "a wrong token": (head(deployed, "Content-Length: 0").replace(b"Bearer ", b"Bearer x"), b" 401 "),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", b" 400 "),
    }
    for name, (content, expected) in cases.items():
        before = time.monotonic()
        answer = raw(deployed, content)
        assert expected in answer.split(b"\r\n")[0], (name, answer[:200])
        assert time.monotonic() - before < 5, name
    assert time.monotonic() - started < 30
    with deployed.client() as client:
        assert client.post(INFER, json=json_request()).status_code == 200


def memory_of_serving() -> dict[int, int]:
    """Bytes of memory that the proxy and the ingress have for themselves, by process."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            words = " ".join(process.cmdline())
            if words.startswith("ray::") and ("Proxy" in words or "ingress" in words):
                memory = process.memory_info()
                found[process.pid] = memory.rss - memory.shared
    return found


def test_a_large_upload_is_never_whole_in_memory(deployed):
    before, peak, over = memory_of_serving(), {}, threading.Event()
    assert len(before) >= 2

    def watch() -> None:
        while not over.wait(0.05):
            for process, size in memory_of_serving().items():
                peak[process] = max(size, peak.get(process, 0))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with deployed.client() as client:
            parts = (b"\1" * 2**20 for _ in range(600))
            answer = client.post(INFER, content=parts, headers={"Inference-Header-Content-Length": "10"})
    finally:
        over.set()
        watching.join()
    assert answer.status_code == 400  # it came to its end and was read
    assert max(peak[process] - size for process, size in before.items()) < 200 * 2**20


def test_the_proxys_request_id_comes_back_once(deployed):
    with deployed.client() as client:
        answer = client.get("/v2", headers={"X-Request-ID": "abc-1"})
    assert answer.headers.get_list("X-Request-ID") == ["abc-1"]


def test_the_json_of_an_answer_is_that_of_the_model_that_was_asked_for(deployed):
    with deployed.client() as client:
        answer = client.post("/v2/models/tiny/versions/2/infer", json=json_request()).json()
    assert json.loads(json.dumps(answer))["outputs"][1]["data"] == [2] * 64
