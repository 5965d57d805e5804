"""Back-pressure for uploads: without it Serve's proxy and ingress read a body faster than it is used.

Both keep what has arrived in queues without a bound, so that 1.5 GB over loopback was 2.4 GB of memory. Here the proxy
stops reading from its client while much is waiting, and the ingress stops fetching from the proxy. Both reach into
Ray 2.55.1, which is pinned; tests/serve/test_on_ray.py measures the memory. See docs/decisions/0009-uploads.md.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_WAITING_BYTES = 16 * 1024**2
MAX_WAITING_PARTS = 64
LOOK_AGAIN_S = 0.005
SAY_HELD_BACK_S = 1.0  # well below any stall_timeout_s that makes sense
HELD_BACK = {"type": "http.request", "body": b"", "more_body": True}


def middlewares() -> list[Middleware]:
    """Return what Serve's proxy puts around itself; RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    return [Middleware(HeldBackProxy)]


class HeldBackProxy:
    """Reads no more of any body while the bodies of all requests together have too much waiting in the proxy.

    Meanwhile an empty part a second says that it is not the client who has stopped.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before Serve's proxy."""
        self._app, self._proxy = app, innermost(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        is_complete = scope.get("type", "http") != "http"

        async def when_there_is_room() -> Message:
            nonlocal is_complete
            began = time.monotonic()
            while waiting_bytes(self._proxy) > MAX_WAITING_BYTES:
                if not is_complete and time.monotonic() - began > SAY_HELD_BACK_S:
                    return HELD_BACK
                await asyncio.sleep(LOOK_AGAIN_S)
            message = await receive()
            is_complete = is_complete or not message.get("more_body", False)
            return message

        await self._app(scope, when_there_is_room, send)


def innermost(app: Any) -> Any:
    """Return the application inside Serve's own middleware."""
    while hasattr(app, "_app"):
        app = app._app
    return app


def waiting_bytes(proxy: Any) -> int:
    """Return the bytes of bodies that the proxy has and no replica has fetched."""
    return sum(
        len(message.get("body", b""))
        for queue in proxy.asgi_receive_queues.values()
        for message in queue._message_queue
    )


def hold_back(receive: Any) -> None:
    """Let the ingress fetch no more of this request's body from the proxy while enough of it is waiting here."""
    fetch = receive._receive_asgi_messages

    async def fetch_when_there_is_room(metadata: Any) -> Any:
        while receive.queue.qsize() > MAX_WAITING_PARTS:
            await asyncio.sleep(LOOK_AGAIN_S)
        return await fetch(metadata)

    receive._receive_asgi_messages = fetch_when_there_is_room
