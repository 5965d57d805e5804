"""What every request passes before a route sees it: id, token and limits; afterwards the log and the figures."""

from __future__ import annotations

import re
import secrets
import time
import traceback
from collections.abc import Callable

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.auth import Role, TokenBook, check_role
from serve.flow_control import hold_back
from serve.limits import RateLimit, check_declared_size, limited
from serve.refusals import Refusal, TooLarge, TooMany, Unauthenticated
from serve.serving_metrics import ServingMetrics
from serve.settings import Limits

OPEN_ROUTES = frozenset({"/v2/health/live", "/v2/health/ready"})
METRICS_ROUTE = "/metrics"
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
OUR_FAULT = 500
LEFT = 499  # the client went before there was an answer
MAX_HEADER_BYTES = 32 * 1024
log = structlog.get_logger("medfl_ray.serve")


class Gate:
    """ASGI middleware around the whole application; every request passes it."""

    def __init__(
        self,
        app: ASGIApp,
        tokens: TokenBook,
        limits: Limits,
        metrics: ServingMetrics,
        behind_proxy: bool,
        open_routes: frozenset[str] = OPEN_ROUTES,
    ) -> None:
        """Stand before an application.

        Args:
          open_routes: addresses that need no token.
          behind_proxy: whether Serve's proxy stands before us. It writes X-Request-ID into answers itself, and hands
            over bodies as fast as they come.
        """
        self._app, self._tokens, self._limits, self._metrics = app, tokens, limits, metrics
        self._rate = RateLimit(limits.requests_per_minute, limits.burst)
        self._behind_proxy, self._open_routes = behind_proxy, open_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets, and none comes in without a token
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        if self._behind_proxy:
            hold_back(receive)
        answer = _Answer(send, None if self._behind_proxy else request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        self._metrics.started()
        try:
            await self._pass(scope, headers, limited(receive, self._limits), answer)
        finally:
            seconds, route = time.perf_counter() - started, _route(scope)
            self._metrics.ended(route, answer.status, seconds)
            if _path(scope) not in self._open_routes:
                self._note(scope, route, answer.status, seconds)

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, answer: _Answer) -> None:
        try:
            self._check(scope, headers)
            await self._app(scope, receive, answer)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, answer)
        except Exception as error:  # noqa: BLE001 - no words of a traceback leave the service
            request_id = scope["state"]["request_id"]
            log.error("request_failed", error=type(error).__name__, where=_where(error), request_id=request_id)
            if not answer.has_begun:
                text = f"the service failed on this request; its log has the reason under {request_id}"
                await JSONResponse({"error": text}, OUR_FAULT)(scope, receive, answer)

    def _check(self, scope: Scope, headers: Headers) -> None:
        path = _path(scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise TooLarge(f"the request's headers are larger than {MAX_HEADER_BYTES} bytes")
        if path not in self._open_routes:
            token = self._tokens.identify(headers.get("authorization"))
            scope["state"] |= {"token": token.name, "owner": token.sha256, "roles": token.roles}
            self._rate.admit(token.name)
            role: Role = "observe" if path == METRICS_ROUTE else "infer"
            check_role(token, role)
        check_declared_size(headers.get("content-length"), self._limits)

    def _note(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        """Write one line; it has nothing that a client chose except an id of safe letters: no path, name or file."""
        log.info(
            "request",
            method=scope["method"] if scope["method"] in {"GET", "POST", "PUT", "DELETE", "HEAD"} else "other",
            route=route,
            status=status,
            seconds=round(seconds, 4),
            token=scope["state"].get("token"),
            request_id=scope["state"]["request_id"],
        )


class _Answer:
    """Passes the answer on and remembers its status."""

    def __init__(self, send: Send, request_id: str | None) -> None:
        self._send, self._request_id = send, request_id
        self.status = LEFT

    @property
    def has_begun(self) -> bool:
        """Whether the client has been sent a status."""
        return self.status != LEFT

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._request_id is not None:
                MutableHeaders(scope=message)["X-Request-ID"] = self._request_id
        await self._send(message)


def refusal_response(refusal: Refusal) -> JSONResponse:
    """Return a refusal as every route of this service says it."""
    headers = {}
    if isinstance(refusal, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(refusal, TooMany):
        headers["Retry-After"] = str(max(1, round(refusal.retry_after_s)))
    return JSONResponse({"error": str(refusal)}, refusal.status, headers)


def _request_id(given: str | None, make: Callable[[], str] = lambda: secrets.token_hex(16)) -> str:
    """Return the client's id if it is harmless in a log, otherwise a new one."""
    return given if given is not None and REQUEST_ID.fullmatch(given) else make()


def _where(error: Exception) -> str:
    """Return the function and line that failed; a traceback's text could hold what a client sent."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.name}:{last.lineno}"


def _path(scope: Scope) -> str:
    """Return the address below the prefix that the application is mounted at, as the router will see it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _route(scope: Scope) -> str:
    """Return the pattern of the route that answered; never the address itself, which a client could fill."""
    return str(getattr(scope.get("route"), "path", "none"))
