"""The gate: nothing comes in without a token, too often, too large or too slowly, and the log has no names."""

import json
import socket

import httpx
import pytest
import structlog
from fastapi import APIRouter
from local_service import local_service, running
from tiny_models import json_request

from serve.auth import add_token

ROUTES = ["/v2", "/v2/models", "/v2/models/tiny", "/metrics", "/openapi.json", "/docs", "/nothing"]


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_wants_a_token(client, path):
    answer = client.get(path, headers={"Authorization": "Bearer " + "x" * 43})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health_needs_none(client, path):
    assert httpx.get(f"{client.base_url}{path}", trust_env=False).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v2/health/live/", "//v2/health/live", "/v2/health/live/../../models", "/V2/health/live"]
)
def test_no_spelling_of_an_open_route_opens_another(client, path):
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 401 " in connection.recv(200)


def test_a_scrapers_token_reads_the_figures_and_nothing_else(service, client):
    scraper = {"Authorization": f"Bearer {add_token(service.tokens, 'scraper', ('observe',))}"}
    service.look_at_tokens_again()
    assert client.get("/metrics", headers=scraper).status_code == 200
    assert client.get("/v2/models", headers=scraper).status_code == 403


def test_a_request_id_comes_back_and_a_dangerous_one_is_replaced(client):
    assert client.get("/v2", headers={"X-Request-ID": "study-7:a"}).headers["X-Request-ID"] == "study-7:a"
    for given in ("a b", "x" * 200, 'a"}{"'):
        answer = client.get("/v2", headers={"X-Request-ID": given})
        assert len(answer.headers["X-Request-ID"]) == 32


def test_a_stalled_body_is_refused(service, client):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as connection:
        head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.token}\r\n"
        connection.sendall(head.encode() + b"Content-Length: 5000\r\n\r\n{")
        assert b" 408 " in connection.recv(200)


def test_large_headers_are_refused(client):
    assert client.get("/v2", headers={"X-Long": "a" * 40_000}).status_code == 413


def test_too_many_requests_are_told_when_to_come_back(models, tmp_path):
    with running(local_service(models, tmp_path, limits={"burst": 3, "requests_per_minute": 6})) as client:
        statuses = [client.get("/v2").status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        answer = client.get("/v2")
        assert 1 <= int(answer.headers["Retry-After"]) <= 10
        assert client.get("/v2/health/live").status_code == 200


def test_sizes_are_limited(models, tmp_path):
    with running(local_service(models, tmp_path, limits={"max_upload_bytes": 1000})) as client:
        assert client.post("/v2/models/tiny/infer", content=b"x" * 1001).status_code == 413
        chunks = (b"x" * 100 for _ in range(20))  # without a Content-Length
        assert client.post("/v2/models/tiny/infer", content=chunks).status_code == 413
        assert client.get("/v2").status_code == 200


def failing_router():
    router = APIRouter()

    @router.post("/fail/{name}")
    async def fail(name: str):
        raise RuntimeError(f"the patient {name} is in this traceback")

    return router


def test_an_unexpected_error_is_one_sentence_and_the_log_says_where(models, tmp_path):
    with (
        structlog.testing.capture_logs() as lines,
        running(local_service(models, tmp_path, routers=[failing_router()])) as client,
    ):
        answer = client.post("/fail/MUSTERMANN", headers={"X-Request-ID": "id-7"})
    assert answer.status_code == 500
    assert answer.headers["X-Request-ID"] == "id-7"
    assert "id-7" in answer.json()["error"]
    assert "MUSTERMANN" not in answer.text + json.dumps(lines)
    (failed,) = [line for line in lines if line["event"] == "request_failed"]
    assert (failed["error"], failed["request_id"]) == ("RuntimeError", "id-7")
    assert failed["where"].startswith("fail:")


def test_the_log_has_routes_and_token_names_and_nothing_of_a_request(client):
    with structlog.testing.capture_logs() as lines:
        client.post(
            "/v2/models/MUSTERMANN/infer?name=MUSTERMANN", json=json_request(), headers={"X-Name": "MUSTERMANN"}
        )
        client.get("/MUSTERMANN")
    assert [(line["route"], line["status"]) for line in lines if line["event"] == "request"] == [
        ("/v2/models/{model}/infer", 404),
        ("none", 404),
    ]
    assert {line["token"] for line in lines if line["event"] == "request"} == {"test"}
    assert "MUSTERMANN" not in json.dumps(lines)
