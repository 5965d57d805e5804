"""Threads for what would hold up the event loop, apart by kind, so that one kind never waits behind another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Pool:
    """A few threads of one kind of work, which start when they are first needed."""

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """Return what the work returns.

        Cancelled, it ends after the thread does, so that the work's files can then be removed safely.
        """
        handle = self._executor.submit(work, *args)
        ending = asyncio.wrap_future(handle)
        try:
            return await asyncio.shield(ending)
        except asyncio.CancelledError:
            if not handle.cancel():  # a thread has it
                await until_done(ending)
            raise


async def until_done(ending: asyncio.Future[T]) -> None:
    """Wait for the end of something, however often this task is cancelled meanwhile, and whatever came of it."""
    while not ending.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([ending])


DISK = Pool("disk", 8)  # short reads and writes
ANSWERS = Pool("answers", 4)  # masks, pictures and tensors, coded and decoded
PACS = Pool("pacs", 8)  # sends, which may each take a minute
