"""How often a token may ask, and how much and how slowly a request may send."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Message, Receive

from serve.refusals import Refusal, TooLarge, TooMany, TooSlow
from serve.settings import Limits


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """A token bucket per caller; each ingress replica counts for itself, so n replicas admit up to n times the rate."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_minute / 60, float(burst), clock
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, caller: str) -> None:
        """Count a request.

        Raises:
          TooMany: the caller has used up its share.
        """
        now = self._clock()
        bucket = self._buckets.setdefault(caller, _Bucket(self._burst, now))
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._per_second)
        bucket.filled_at = now
        if bucket.tokens < 1:
            refusal = TooMany(f"too many requests; a token may send {self._per_second * 60:g} a minute")
            refusal.retry_after_s = (1 - bucket.tokens) / self._per_second
            raise refusal
        bucket.tokens -= 1


def check_declared_size(content_length: str | None, limits: Limits) -> None:
    """Refuse a body by its Content-Length, before any of it is read.

    Raises:
      Refusal: the header is no number.
      TooLarge: it is over the limit.
    """
    if content_length is None:
        return
    if not (content_length.isascii() and content_length.isdigit()) or len(content_length) > 18:
        raise Refusal("the header Content-Length is not a number of bytes")
    _check_size(int(content_length), limits)


def _check_size(num_bytes: int, limits: Limits) -> None:
    if num_bytes > limits.max_upload_bytes:
        raise TooLarge(f"the request is larger than the {limits.max_upload_bytes} bytes that this service takes")


def limited(receive: Receive, limits: Limits) -> Receive:
    """Watch a request's body while it arrives: its size, its pauses and its whole time.

    The returned function raises TooLarge or TooSlow where a part goes over a limit, and goes on raising it.
    """
    return _Watched(receive, limits)


class _Watched:
    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._num_bytes, self._complete = 0, False
        self._refusal: Refusal | None = None
        self._deadline = time.monotonic() + limits.upload_timeout_s

    async def __call__(self) -> Message:
        """Return the next part."""
        if self._complete:  # what comes now is the end of the connection, which may be long in coming
            return await self._receive()
        if self._refusal is None:
            try:
                return await self._next_part()
            except Refusal as refusal:
                self._refusal = refusal
        raise self._refusal

    async def _next_part(self) -> Message:
        remaining = self._deadline - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), min(self._limits.stall_timeout_s, max(remaining, 0)))
        except TimeoutError:
            raise TooSlow(
                f"no part of the request's body came for {self._limits.stall_timeout_s:g} s, or all of it took over "
                f"{self._limits.upload_timeout_s:g} s"
            ) from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            _check_size(self._num_bytes, self._limits)
            self._complete = not message.get("more_body", False)
        else:
            self._complete = True
        return message
