"""A request's body on the disk: however large it is, it is never whole in memory."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import BinaryIO

from starlette.requests import Request

WRITE_BYTES = 4 * 1024**2


@asynccontextmanager
async def spooled(request: Request) -> AsyncIterator[Path]:
    """Yield a file with the request's body, in a folder of its own that goes away afterwards."""
    folder = Path(await asyncio.to_thread(mkdtemp, prefix="medfl-body-"))
    try:
        path = folder / "body"
        with path.open("wb") as stream:
            await _copy(request, stream)
        yield path
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


async def _copy(request: Request, stream: BinaryIO) -> None:
    """Write the body in parts of a few MB, each by a thread, so that the disk never holds up other requests."""
    waiting = bytearray()
    async for part in request.stream():
        waiting += part
        if len(waiting) >= WRITE_BYTES:
            await asyncio.to_thread(stream.write, bytes(waiting))
            waiting.clear()
    await asyncio.to_thread(stream.write, bytes(waiting))
