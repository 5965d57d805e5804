"""Starts Ray, Serve and the application on this machine, and ends them."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from actors.cluster import connect, disconnect
from medfl_ray.errors import ClusterError
from serve.settings import ServeSettings

APPLICATION = "medfl"
READY_TIMEOUT_S = 180.0
POLL_S = 0.25


@contextmanager
def served(
    settings: ServeSettings, host: str = "127.0.0.1", port: int = 8000, address: str | None = None
) -> Iterator[str]:
    """Serve models while the context lasts; yields the URL once a model is loaded.

    Args:
      address: of a Ray cluster to join; by default one of our own, on loopback and behind a token.

    Raises:
      ClusterError: the port is taken, Ray does not start, or no model could be loaded.
    """
    _check_port(host, port)
    cluster = connect(address)
    try:
        from ray import serve as ray_serve

        from serve.replicas.deployments import application

        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # its notices concern nobody here
        ray_serve.start(http_options=http_options(settings, host, port))
        try:
            ray_serve.run(application(_on_gpu(settings, cluster.num_gpus)), name=APPLICATION)
        except RuntimeError:
            raise ClusterError(f"the service did not start: {_reason()}") from None
        _wait_until_ready(host, port)
        yield f"http://{host}:{port}"
        ray_serve.delete(APPLICATION)  # requests that are being answered come to their end
        if not cluster.started:
            ray_serve.shutdown()  # type: ignore[no-untyped-call]
    finally:
        disconnect()


def http_options(settings: ServeSettings, host: str, port: int) -> dict[str, object]:
    """Return the options of Serve's HTTP proxy; no request outlives its longest upload and answer."""
    limits = settings.limits
    return {
        "host": host,
        "port": port,
        "request_timeout_s": limits.upload_timeout_s + limits.inference_timeout_s + 30,
        "keep_alive_timeout_s": 30,
    }


def _on_gpu(settings: ServeSettings, num_gpus: float) -> ServeSettings:
    if num_gpus < 1 or settings.scaling.num_gpus:
        return settings
    return settings.model_copy(update={"scaling": settings.scaling.model_copy(update={"num_gpus": 1.0})})


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), reuse_port=False):
            return
    except OSError as error:
        raise ClusterError(
            f"port {port} of {host} cannot be used ({os.strerror(error.errno or 0)}); choose another with --port"
        ) from None


def _wait_until_ready(host: str, port: int) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not _is_ready(host, port):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"no model was loaded within {READY_TIMEOUT_S:g} s: promote a version (medfl-ray models promote), or "
                "look into the logs of Serve's replicas for version_refused"
            )
        time.sleep(POLL_S)


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _reason() -> str:
    """Return the last line of what Serve says of our application: our own error, without its traceback."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(APPLICATION)
    if application is None:
        return "Serve does not know the application"
    messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if "medfl_ray.errors" in line]
    return lines[-1].partition(": ")[2] if lines else "look into the logs of Serve's replicas"
