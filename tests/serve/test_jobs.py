"""The book of jobs: heartbeats, expiry, and what goes when a job goes."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from serve.clinic import jobs
from serve.clinic.jobs import JobBook, JobLimits, JobResult
from serve.clinic.pools import ANSWERS
from serve.clinic.sessions import SessionBook
from serve.refusals import NotServed

ANSWER = JobResult(b"mask", "application/octet-stream", "mask", {})


async def ended(book, job):
    while (state := book.get(job, "me")).status not in jobs.ENDED:
        await asyncio.sleep(0.01)
    return state


async def answers(folder, progress):
    return ANSWER


def test_a_job_whose_upload_takes_long_lives_and_gives_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "DEAD_AFTER_S", 0.2)
    monkeypatch.setattr(jobs, "HEARTBEAT_S", 0.02)
    book = JobBook(tmp_path)

    async def work():
        job = book.open("me").id
        async with book.beating(job):  # as the route does while the upload arrives
            await asyncio.sleep(0.5)
            assert book.get(job, "me").status == "waiting"
        book.start(job, answers)
        return await ended(book, job)

    assert asyncio.run(work()).status == "done"


def test_a_late_heartbeat_does_not_undo_a_job(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "DEAD_AFTER_S", 0.05)
    book = JobBook(tmp_path)

    async def work():
        job = book.open("me").id
        await asyncio.sleep(0.2)  # whatever held this replica up
        assert book.get(job, "me").status == "failed"
        book.start(job, answers)
        return await ended(book, job)

    assert asyncio.run(work()).status == "done"


def test_a_job_is_kept_from_its_end_on(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "HEARTBEAT_S", 0.02)
    book, other = (JobBook(tmp_path, JobLimits(keep_s=0.4)) for _ in range(2))

    async def slow(folder, progress):
        await asyncio.sleep(0.8)
        return ANSWER

    async def work():
        job = book.open("me").id
        book.start(job, slow)
        await asyncio.sleep(0.7)
        other.sweep()  # another replica's
        state = await ended(book, job)
        assert state.expires_at - time.time() > 0.2
        return state

    assert asyncio.run(work()).status == "done"


@pytest.mark.parametrize("by_another", [False, True])
def test_a_deleted_job_is_stopped_before_its_files_go(tmp_path, monkeypatch, by_another):
    monkeypatch.setattr(jobs, "HEARTBEAT_S", 0.02)
    book = JobBook(tmp_path)
    deleting = JobBook(tmp_path) if by_another else book
    written = []

    def unpack(folder):
        time.sleep(0.2)
        (folder / "slice").write_bytes(b"pixels")  # fails where the folder went too early
        written.append(folder)

    async def slow(folder, progress):
        await ANSWERS.run(unpack, folder)
        return ANSWER

    async def work():
        job = book.open("me").id
        book.start(job, slow)
        await asyncio.sleep(0.1)
        await deleting.delete(job, "me")
        with pytest.raises(NotServed):
            book.get(job, "me")
        deadline = time.monotonic() + 5
        while (tmp_path / job).exists():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    asyncio.run(work())
    assert len(written) == 1


def test_a_job_whose_state_cannot_be_read_goes_too(tmp_path):
    book, sessions = JobBook(tmp_path / "jobs"), SessionBook(tmp_path / "sessions")
    job = tmp_path / "jobs" / book.open("me").id
    session = sessions.open("me")[1]
    for folder, state in ((job, "job.json"), (session, "session.json")):
        (folder / state).write_text("{")
    for is_old in (False, True):
        for folder in (job, session):
            if is_old:
                os.utime(folder, (0, 0))
        book.sweep()
        sessions.sweep()
        assert job.exists() != is_old
        assert session.exists() != is_old
