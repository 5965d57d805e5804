"""The HTTP application: routers behind the gate, and one form for every error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import medfl_ray
from medfl_ray.errors import MedflError
from medfl_ray.store.state_folders import state_root
from serve.auth import TokenBook
from serve.backend import Backend
from serve.clinic.pools import DISK
from serve.clinic.scratch import Scratch
from serve.gate import LEFT, METRICS_ROUTE, OPEN_ROUTES, Gate, refusal_response
from serve.protocols.open_inference_routes import open_inference_router
from serve.protocols.sign_in import SIGN_IN_ROUTES, sign_in_router
from serve.refusals import Refusal, status_of
from serve.serving_metrics import ServingMetrics
from serve.settings import ServeSettings

log = structlog.get_logger("medfl_ray.serve")


def build_http_app(
    backend: Backend,
    settings: ServeSettings,
    tokens: TokenBook,
    metrics: ServingMetrics,
    routers: Sequence[APIRouter] = (),
    behind_proxy: bool = False,
    scratch: Scratch | None = None,
) -> FastAPI:
    """Return the application; while it runs, it follows the models' source.

    Args:
      routers: what is served beside the Open Inference Protocol.
      behind_proxy: whether Serve's proxy stands before it.
      scratch: where bodies lie while they are used; in the state folder by default.
    """

    bodies = scratch or Scratch(state_root() / "serve" / "scratch")

    @contextlib.asynccontextmanager
    async def following(app: FastAPI) -> AsyncIterator[None]:
        await DISK.run(bodies.sweep)
        task = asyncio.create_task(_follow(backend, settings.poll_s))
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await DISK.run(bodies.close)

    app = FastAPI(title="medfl-ray", version=medfl_ray.__version__, docs_url=None, redoc_url=None, lifespan=following)
    open_routes = OPEN_ROUTES
    if settings.slicer_sign_in:
        app.include_router(sign_in_router(tokens))
        open_routes |= SIGN_IN_ROUTES
    app.include_router(open_inference_router(backend, settings.limits, bodies))
    for router in routers:
        app.include_router(router)

    @app.get(METRICS_ROUTE)
    async def figures() -> PlainTextResponse:
        """Figures of this ingress replica, for Prometheus."""
        return PlainTextResponse(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    _answer_errors(app)
    app.add_middleware(
        Gate,
        tokens=tokens,
        limits=settings.limits,
        metrics=metrics,
        behind_proxy=behind_proxy,
        open_routes=open_routes,
    )  # the only one, and so before every route
    return app


async def _follow(backend: Backend, poll_s: float) -> None:
    while True:
        try:
            await backend.catalogue.refresh()
        except Exception as error:  # noqa: BLE001 - whatever happens, the next look may go well
            log.error("models_not_followed", error=type(error).__name__)
        await asyncio.sleep(poll_s)


def _answer_errors(app: FastAPI) -> None:
    """Give every expected error the protocol's form; the gate answers the others."""

    async def expected(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MedflError)
        if isinstance(error, Refusal):
            return refusal_response(error)
        return JSONResponse({"error": str(error)}, status_of(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, Refusal):  # raised while FastAPI read a form: it wraps whatever comes up then
            return refusal_response(error.__cause__)
        headers = dict(error.headers) if error.headers else None
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first: dict[str, Any] = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{where[:128]}: {first['msg']}"}, 400)

    async def left(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the client went before its request was complete"}, LEFT)

    handlers: dict[type[Exception], Callable[[Request, Exception], Any]] = {
        MedflError: expected,
        ClientDisconnect: left,
        HTTPException: http,
        RequestValidationError: invalid,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
