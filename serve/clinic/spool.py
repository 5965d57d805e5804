"""A request's body on the disk: however large it is, it is never whole in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from starlette.requests import Request

from serve.clinic.pools import DISK
from serve.clinic.scratch import Scratch

WRITE_BYTES = 4 * 1024**2


@asynccontextmanager
async def spooled(request: Request, scratch: Scratch) -> AsyncIterator[Path]:
    """Yield a file with the request's body, in a folder of its own that goes away afterwards."""
    async with scratch.folder() as folder:
        path = folder / "body"
        with path.open("wb") as stream:
            await _copy(request, stream)
        yield path


async def _copy(request: Request, stream: BinaryIO) -> None:
    """Write the body in parts of a few MB, each by a thread, so that the disk never holds up other requests."""
    waiting = bytearray()
    async for part in request.stream():
        waiting += part
        if len(waiting) >= WRITE_BYTES:
            await DISK.run(stream.write, bytes(waiting))
            waiting.clear()
    await DISK.run(stream.write, bytes(waiting))
