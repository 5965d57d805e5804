"""The serving application in one process and without Ray, behind a real HTTP server on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import APIRouter
from manual_clock import ManualClock
from starlette.types import ASGIApp

from serve.auth import RELOAD_S, TokenBook, add_token
from serve.backend import Backend, LocalReplicas
from serve.clinic.scratch import Scratch
from serve.http_app import build_http_app
from serve.replicas.model_loader import Catalogue
from serve.replicas.replica import ModelReplica
from serve.replicas.sources import FolderSource
from serve.serving_metrics import ServingMetrics
from serve.settings import ServeSettings


@dataclass
class LocalService:
    """The application and what a test looks into."""

    app: ASGIApp
    backend: Backend
    metrics: ServingMetrics
    token: str
    tokens: Path
    clock: ManualClock

    def look_at_tokens_again(self) -> None:
        """Let so much time pass for the service that its next request reads a changed file of tokens."""
        self.clock.now += 1.1 * RELOAD_S


def local_service(
    models: Path, folder: Path, routers: Sequence[APIRouter] = (), replicas: Any = None, **settings: Any
) -> LocalService:
    """Build the application over a folder of models."""
    chosen = ServeSettings.model_validate({"poll_s": 0.05, **settings})
    metrics = ServingMetrics(chosen.drift_threshold, chosen.drift_smoothing, ray_too=False)
    replicas = replicas or LocalReplicas(ModelReplica(lambda: FolderSource(models), chosen))
    catalogue = Catalogue(FolderSource(models), replicas.describe, chosen.only, metrics.served)
    backend = Backend(replicas, catalogue, metrics, chosen.limits.inference_timeout_s)
    tokens = folder / "tokens.json"
    token, clock = add_token(tokens, "test"), ManualClock()
    app = build_http_app(
        backend, chosen, TokenBook(tokens, clock), metrics, routers, scratch=Scratch(folder / "scratch")
    )
    return LocalService(app, backend, metrics, token, tokens, clock)


@contextmanager
def running(service: LocalService) -> Iterator[httpx.Client]:
    """Run the application in a thread; yields a client with its token once a model is loaded."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(service.app, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {service.token}"}, timeout=30, trust_env=False
        ) as client:
            wait_until_ready(client)
            yield client
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def wait_until_ready(client: httpx.Client, timeout_s: float = 20) -> None:
    """Wait until the service has loaded a model."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if client.get("/v2/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet; the deadline below ends this
        assert time.monotonic() < deadline, "the service was not ready in time"
        time.sleep(0.05)
