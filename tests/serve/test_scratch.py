"""Folders of requests: they go with the request, with the process, and with the next process after a kill."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest
from clinic_service import clinic_service
from local_service import running

from serve.clinic.pools import DISK, Pool
from serve.clinic.scratch import Scratch

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from serve.clinic.scratch import Scratch

async def work():
    async with Scratch(Path(sys.argv[1])).folder() as folder:
        (folder / "upload").write_bytes(b"pixels")
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(work())
"""


def uploads(root):
    return list(root.rglob("upload"))


def leave_a_folder(root):
    """A process that is killed in the middle of a request."""
    subprocess.run([sys.executable, "-c", KILLED, str(root)], check=False)
    assert len(uploads(root)) == 1


def test_a_folder_is_private_goes_with_its_request_and_is_left_alone_by_others(tmp_path):
    mine, other = Scratch(tmp_path), Scratch(tmp_path)

    async def work():
        async with mine.folder() as folder:
            (folder / "upload").write_bytes(b"pixels")
            assert folder.stat().st_mode & 0o077 == 0
            assert folder.parent.stat().st_mode & 0o077 == 0
            other.sweep()
            mine.sweep()
            assert folder.exists()
        assert not folder.exists()

    asyncio.run(work())
    mine.close()
    assert [path.name for path in tmp_path.iterdir()] == ["guard"]


def test_what_a_killed_service_left_goes_when_the_next_one_starts(tmp_path):
    state = tmp_path / "state"
    leave_a_folder(state / "scratch")
    service = clinic_service(tmp_path)
    with running(service):
        deadline = time.monotonic() + 5
        while uploads(state):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_expired_images_go_without_another_request(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.clinic.service.SWEEP_S", 0.05)
    monkeypatch.setattr("serve.clinic.sessions.KEEP_S", 0.3)
    with running(clinic_service(tmp_path)) as client:
        assert client.put("/session/", content=b"x" * 1000).status_code == 200
        assert uploads(tmp_path / "state")
        deadline = time.monotonic() + 5
        while uploads(tmp_path / "state"):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_cancelled_thread_ends_before_its_caller(tmp_path):
    begun, ended = threading.Event(), threading.Event()

    def write():
        begun.set()
        time.sleep(0.2)
        ended.set()

    async def work():
        writing = asyncio.create_task(DISK.run(write))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert ended.is_set()

    asyncio.run(work())


def test_a_full_pool_does_not_hold_up_another():
    slow, free = Pool("slow", 1), threading.Event()

    async def work():
        waiting = [asyncio.create_task(slow.run(free.wait, 5)) for _ in range(20)]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(DISK.run(lambda: 7), 2) == 7
        free.set()
        await asyncio.gather(*waiting)

    asyncio.run(work())
